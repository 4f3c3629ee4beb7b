import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.models.norm import BatchNorm


def reference(x, groups, scale, bias):
    """Batch norm of [N, ..., C] in float64, and the moments that the running averages take."""
    parts = np.split(np.asarray(x, np.float64), groups)
    axes = tuple(range(x.ndim - 1))
    out = [(p - p.mean(axes)) / np.sqrt(p.var(axes) + 1e-5) * scale + bias for p in parts]
    n = parts[0][..., 0].size
    return (np.concatenate(out), np.mean([p.mean(axes) for p in parts], 0),
            np.mean([p.var(axes) * n / (n - 1) for p in parts], 0))


@pytest.mark.parametrize("shape", [(8, 5, 3, 4), (8, 4)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_train_mode_against_numpy(shape, groups):
    rng = np.random.default_rng(0)
    x = (3 * rng.normal(size=shape) + 5).astype(np.float32)
    norm = BatchNorm(groups=groups)
    variables = norm.init(jax.random.key(0), jnp.asarray(x), train=False)
    scale, bias = rng.normal(size=(2, 4)).astype(np.float32)
    variables = {**variables, "params": {"scale": scale, "bias": bias}}
    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    want, mean, var = reference(x, groups, scale, bias)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_eval_mode_uses_running_statistics_alone():
    x = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    variables = {"params": {"scale": np.array([2.0, 1.0]), "bias": np.array([0.0, 1.0])},
                 "batch_stats": {"mean": np.array([1.0, -1.0]), "var": np.array([4.0, 0.25])}}
    y = BatchNorm(groups=7).apply(variables, x, train=False)
    want = (x - [1, -1]) / np.sqrt(np.array([4, 0.25]) + 1e-5) * [2, 1] + [0, 1]
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_init_in_train_mode_leaves_fresh_statistics():
    x = jnp.full((4, 2), 9.0) + jnp.arange(4.0)[:, None]
    stats = BatchNorm().init(jax.random.key(0), x, train=True)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)


def test_large_mean_does_not_cancel():
    x = np.random.default_rng(2).normal(size=(64, 3)).astype(np.float32) + 3000
    norm = BatchNorm(affine=False)
    variables = norm.init(jax.random.key(0), x, train=False)
    assert "params" not in variables
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    want, _, _ = reference(x, 1, 1, 0)
    np.testing.assert_allclose(y, want, atol=2e-3)


def test_bfloat16_output_keeps_float32_statistics():
    x = jnp.ones((4, 3), jnp.bfloat16)
    norm = BatchNorm(dtype=jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x, train=False)
    y, new = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves((variables, new))} == {jnp.dtype("float32")}


def test_groups_must_divide_the_batch():
    x = jnp.ones((6, 2))
    norm = BatchNorm(groups=4)
    variables = norm.init(jax.random.key(0), x, train=False)
    with pytest.raises(UserError, match=r"bn_groups = 4 .* 6 images"):
        norm.apply(variables, x, train=True, mutable=["batch_stats"])
