import jax
import numpy as np

from jax_cl_bd.models.heads import MLP, LogitScale, Projection


def test_against_numpy_with_norm_everywhere():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5)).astype(np.float32)
    head = MLP(hidden=(7,), out=3, hidden_norm=True, out_norm=True, bn_groups=2)
    variables = jax.jit(lambda k: head.init(k, x, train=False))(jax.random.key(0))
    params = variables["params"]
    assert set(params["linear1"]) == set(params["linear2"]) == {"kernel"}
    assert "bn2" not in params and set(params["bn1"]) == {"scale", "bias"}
    y, _ = head.apply(variables, x, train=True, mutable=["batch_stats"])

    def norm(h):
        parts = np.split(h, 2)
        return np.concatenate([(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) for p in parts])

    h = np.maximum(norm(x @ np.asarray(params["linear1"]["kernel"], np.float64)), 0)
    want = norm(h @ np.asarray(params["linear2"]["kernel"], np.float64))
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


def test_plain_layers_and_their_first_values():
    x = np.random.default_rng(1).normal(size=(4, 100)).astype(np.float32)
    head = MLP(hidden=(200,), out=3)
    variables = jax.jit(lambda k: head.init(k, x, train=True))(jax.random.key(0))
    assert set(variables) == {"params"}
    p = jax.tree.map(np.asarray, variables["params"])
    y = head.apply(variables, x, train=True)
    h = np.maximum(x @ p["linear1"]["kernel"] + p["linear1"]["bias"], 0)
    np.testing.assert_allclose(y, h @ p["linear2"]["kernel"] + p["linear2"]["bias"], rtol=1e-4,
                               atol=1e-5)
    for array in p["linear1"].values():  # U(-1/sqrt(100), 1/sqrt(100))
        assert 0.095 < np.abs(array).max() <= 0.1
        np.testing.assert_allclose(array.std(), 0.1 / np.sqrt(3), rtol=0.1)


def test_projection_is_linear_with_clips_first_values():
    x = np.random.default_rng(2).normal(size=(4, 100)).astype(np.float32)
    for bias in (False, True):
        head = Projection(dim=80, use_bias=bias)
        params = head.init(jax.random.key(0), x, train=False)["params"]["dense"]
        assert set(params) == ({"kernel", "bias"} if bias else {"kernel"})
        kernel = np.asarray(params["kernel"])
        np.testing.assert_allclose(kernel.std(), 0.1, rtol=0.05)
        assert np.abs(kernel).max() > 0.3  # a normal, not cut at two deviations
        shift = {"bias": np.arange(80, dtype=np.float32)} if bias else {}
        y = head.apply({"params": {"dense": {**params, **shift}}}, x, train=True)
        np.testing.assert_allclose(y, x @ kernel + shift.get("bias", 0), rtol=1e-4, atol=1e-4)


def test_logit_scale_and_bias():
    x = np.zeros((2, 3))
    variables = LogitScale(2.5).init(jax.random.key(0), x, train=False)
    assert LogitScale(2.5).apply(variables, x, train=True) == (2.5, None)
    module = LogitScale(scale_init=1.5, bias_init=-10.0)
    variables = module.init(jax.random.key(0), x, train=False)
    assert jax.tree.map(float, variables) == {"params": {"logit_scale": 1.5, "logit_bias": -10.0}}
    assert [a.shape for a in jax.tree.leaves(variables)] == [(), ()]
    assert tuple(map(float, module.apply(variables, x, train=True))) == (1.5, -10.0)
