"""SigLIP's loss, its gradient, both forms, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_cl_bd import parallel
from jax_cl_bd.objectives import siglip
from tests.objectives.reference import differences, unit

B, D = 6, 4


def config(**fields):
    return ConfigDict({"objective": {
        "name": "siglip", "dim": D, "image_projection": False, "text_bias": True, "ring": False,
        "scale_init": float(np.log(10)), "bias_init": -10.0, "in_modality": 0.0,
        "in_modality_temperature": 0.0, **fields}})


def identity(variables, x, train):
    return x, {}


def scale_of(variables, x, train):
    scale = variables["params"]["scale"]
    return (scale["logit_scale"], scale["logit_bias"]), {}


FNS = {"encoder": identity, "text": identity, "text_projection": identity, "scale": scale_of}


def loss(images, texts, log_scale, bias, **fields):
    variables = {"params": {"scale": {"logit_scale": log_scale, "logit_bias": bias}},
                 "batch_stats": {name: {} for name in FNS}}
    value, (_, extra, metrics) = siglip.loss(
        config(**fields), variables, {}, {"view1": images, "tokens": texts}, FNS, None, 0)
    assert extra == {}
    return value, metrics


def pairs(seed=0, n=B, d=D):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)).astype(np.float32) for _ in range(2))


def reference(images, texts, log_scale, bias):
    """The sum over pairs, one at a time."""
    x, y, total = unit(images), unit(texts), 0.0
    for i in range(len(x)):
        for j in range(len(y)):
            logit = np.exp(log_scale) * x[i] @ y[j] + bias
            total += np.log1p(np.exp(-logit if i == j else logit))
    return total / len(x)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("log_scale, bias", [(2.3, -10.0), (2.3, -2.71), (0.0, 1.0)])
def test_value_gradient_and_metrics(ring, log_scale, bias):
    x, y = pairs(1)
    args = (x, y, np.float32(log_scale), np.float32(bias))
    (value, metrics), grads = jax.jit(jax.value_and_grad(
        lambda *a: loss(*a, ring=ring), argnums=(0, 1, 2, 3), has_aux=True))(*args)
    np.testing.assert_allclose(value, reference(*args), rtol=1e-5)
    for i, got in enumerate(grads):
        want = differences(lambda z: reference(*args[:i], z, *args[i + 1:]), args[i])
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    s = unit(x) @ unit(y).T
    np.testing.assert_allclose(metrics["pretext_accuracy"], (s.argmax(1) == np.arange(B)).mean())
    np.testing.assert_allclose(metrics["logit_scale"], np.exp(log_scale), rtol=1e-6)
    assert metrics["logit_bias"] == np.float32(bias)
    assert set(metrics) == {"pretext_accuracy", "logit_scale", "logit_bias"}


@pytest.mark.parametrize("ring", [False, True])
def test_summed_over_captions_and_averaged_over_images(ring):
    """Orthogonal pairs at the published start: ln 2 for the pair, softplus(-10) for each other."""
    eye = np.eye(8, dtype=np.float32)
    value, _ = jax.jit(functools.partial(loss, ring=ring))(
        eye, eye, np.float32(np.log(10)), np.float32(-10))
    np.testing.assert_allclose(value, np.log(2) + 7 * np.log1p(np.exp(-10)), rtol=1e-5)


@pytest.mark.parametrize("ring", [False, True])
def test_bfloat16_towers_still_have_float32_logits(ring):
    rng = np.random.default_rng(2)
    base = rng.normal(size=(1, 64))
    x, y = (jnp.asarray(base + 0.2 * rng.normal(size=(8, 64)), jnp.bfloat16) for _ in range(2))
    args = (x, y, jnp.float32(np.log(100)), jnp.float32(-94))
    want = reference(np.asarray(x, np.float64), np.asarray(y, np.float64), np.log(100), -94)
    form = functools.partial(loss, ring=ring)
    value, _ = jax.jit(form)(*args)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=2e-5)
    program = str(jax.make_jaxpr(form)(*args))
    assert "Precision.HIGHEST" in program
    assert "bf16" not in "".join(line for line in program.splitlines() if "dot_general" in line)


def test_heads_and_first_values():
    for fields, want in (({}, ["text_projection", "scale"]), (
            {"image_projection": True}, ["image_projection", "text_projection", "scale"])):
        assert list(siglip.heads(config(**fields).objective)) == want
    for text_bias in (True, False):
        parts = siglip.heads(config(text_bias=text_bias, image_projection=True).objective)
        params = {name: part.init(jax.random.key(0), jnp.ones((1, 5)), False)["params"]
                  for name, part in parts.items()}
        assert ("bias" in params["text_projection"]["dense"]) == text_bias
        assert set(params["image_projection"]["dense"]) == {"kernel"}
        np.testing.assert_allclose(np.exp(params["scale"]["logit_scale"]), 10, rtol=1e-6)
        assert params["scale"]["logit_bias"] == -10
    assert not hasattr(siglip, "constrain")


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_eight_devices_equal_one(ring, weight):
    rng = np.random.default_rng(4)
    names = ("view1", "view2", "tokens", "tokens2")
    batch = {k: rng.normal(size=(16, D)).astype(np.float32) for k in names}
    params = {"logit_scale": jnp.float32(2), "logit_bias": jnp.float32(-3)}

    def step(params, batch, ring):
        def f(params, batch):
            variables = {"params": {"scale": params}, "batch_stats": {name: {} for name in FNS}}
            return siglip.loss(config(ring=ring, in_modality=weight), variables, {}, batch, FNS,
                               None, 0)
        return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, batch)

    step = jax.jit(step, static_argnums=2)
    one = step(params, batch, False)
    mesh = parallel.make_mesh(ConfigDict({"data": 4, "fsdp": 2}))
    with jax.set_mesh(mesh):
        state = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        rows = parallel.put_rows(mesh, batch)
        program = step.lower(state, rows, ring)
        eight = step(state, rows, ring)
    assert len(eight[0][0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    assert ("collective_permute" in program.as_text()) == ring  # it really went round
