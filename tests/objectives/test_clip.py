"""CLIP's loss, gradient, precision and clamp, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_cl_bd import parallel
from jax_cl_bd.models import parts
from jax_cl_bd.objectives import clip
from tests.objectives.reference import differences, unit

B, D = 6, 4


def config(**fields):
    return ConfigDict({"objective": {
        "name": "clip", "dim": D, "image_projection": True, "scale_init": float(np.log(1 / 0.07)),
        "in_modality": 0.0, "in_modality_temperature": 0.0, **fields}})


def identities():
    """Parts that hand on what they get, so that gradients are those of the towers' outputs."""
    def same(variables, x, train):
        return x, {}

    names = ("encoder", "image_projection", "text", "text_projection")
    fns = {name: same for name in names}
    fns["scale"] = lambda v, x, train: ((v["params"]["scale"]["logit_scale"], None), {})
    return fns, {name: {} for name in (*names, "scale")}


def loss(images, texts, log_scale, cfg=None):
    fns, stats = identities()
    variables = {"params": {"scale": {"logit_scale": log_scale}}, "batch_stats": stats}
    value, (stats, extra, metrics) = clip.loss(
        cfg or config(), variables, {}, {"view1": images, "tokens": texts}, fns, None, 0)
    assert extra == {}
    return value, metrics


def pairs(seed=0, n=B, d=D):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)).astype(np.float32) for _ in range(2))


def reference(images, texts, log_scale):
    """Both directions, one pair at a time."""
    s = np.exp(log_scale) * unit(images) @ unit(texts).T
    n = len(s)
    to_text = -sum(s[i, i] - np.log(np.exp(s[i]).sum()) for i in range(n)) / n
    to_image = -sum(s[i, i] - np.log(np.exp(s[:, i]).sum()) for i in range(n)) / n
    return (to_text + to_image) / 2


@pytest.mark.parametrize("log_scale", [0.0, 2.6593, 4.6])
def test_value_gradient_and_metrics(log_scale):
    x, y = pairs(1)
    t = np.float32(log_scale)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (value, metrics), grads = step(x, y, t)
    np.testing.assert_allclose(value, reference(x, y, t), rtol=1e-5)
    for got, want in zip(grads, (differences(lambda z: reference(z, y, t), x),
                                 differences(lambda z: reference(x, z, t), y),
                                 differences(lambda z: reference(x, y, z), t))):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    s = unit(x) @ unit(y).T
    assert (s.argmax(1) == np.arange(B)).sum() != (s.argmax(0) == np.arange(B)).sum()
    np.testing.assert_allclose(metrics["pretext_accuracy"], (s.argmax(1) == np.arange(B)).mean())
    np.testing.assert_allclose(metrics["logit_scale"], np.exp(t), rtol=1e-6)
    assert set(metrics) == {"pretext_accuracy", "logit_scale"}


def test_is_symmetric_and_blind_to_length_and_order():
    x, y = pairs(1)
    t = jnp.float32(2)
    value_of = jax.jit(lambda x, y: loss(x, y, t)[0])
    value = value_of(x, y)
    order = np.array([3, 1, 5, 0, 2, 4])
    for a, b in ((y, x), (7 * x, 0.1 * y), (x[order], y[order])):
        np.testing.assert_allclose(value_of(a, b), value, rtol=1e-5)
    assert abs(value_of(x[order], y) - value) > 0.01
    one = np.ones((B, D), np.float32)  # collapsed towers know nothing
    np.testing.assert_allclose(value_of(one, one), np.log(B), rtol=1e-6)


def test_bfloat16_towers_still_have_float32_logits():
    """s = 100 and near ties: logits in bfloat16 would be off by a quarter and more."""
    rng = np.random.default_rng(2)
    base = rng.normal(size=(1, 64))
    x, y = (jnp.asarray(base + 0.2 * rng.normal(size=(8, 64)), jnp.bfloat16) for _ in range(2))
    t = jnp.float32(np.log(100))
    want = reference(np.asarray(x, np.float64), np.asarray(y, np.float64), np.log(100))
    value, _ = jax.jit(loss)(x, y, t)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=1e-5)
    program = str(jax.make_jaxpr(loss)(x, y, t))
    assert "f32[8,8] = dot_general" in program and "bf16[8,8]" not in program
    assert "Precision.HIGHEST" in program


def test_scale_is_clamped_after_the_update_and_not_in_the_pass():
    x, y = pairs(3)
    beyond = np.float32(np.log(100) + 0.3)
    (value, metrics), grad = jax.jit(jax.value_and_grad(
        lambda t: loss(x, y, t), has_aux=True))(beyond)
    np.testing.assert_allclose(value, reference(x, y, beyond), rtol=1e-4)  # no clamp in there
    np.testing.assert_allclose(metrics["logit_scale"], np.exp(beyond), rtol=1e-5)
    want = differences(lambda t: reference(x, y, t), beyond)
    assert want > 1
    np.testing.assert_allclose(grad, want, rtol=1e-3)
    other = {"w": jnp.ones(2)}
    for value, kept in ((9.0, np.log(100)), (-0.5, 0.0), (2.0, 2.0)):
        params = {"encoder": other, "scale": {"logit_scale": jnp.float32(value)}}
        after = clip.constrain(params)
        np.testing.assert_allclose(after["scale"]["logit_scale"], kept, rtol=1e-6)
        assert after["encoder"] is other and set(after) == set(params)
        assert params["scale"]["logit_scale"] == value  # a new dict


def test_heads():
    heads = clip.heads(config().objective)
    assert list(heads) == ["image_projection", "text_projection", "scale"]
    assert list(clip.heads(config(image_projection=False).objective)) == [
        "text_projection", "scale"]
    variables = {n: m.init(jax.random.key(0), jnp.ones((1, 5)), False) for n, m in heads.items()}
    for name in ("image_projection", "text_projection"):
        assert jax.tree.map(jnp.shape, variables[name]["params"]) == {"dense": {"kernel": (5, D)}}
    scale = variables["scale"]["params"]
    np.testing.assert_allclose(np.exp(scale["logit_scale"]), 1 / 0.07, rtol=1e-6)
    kept = clip.constrain({"scale": scale})["scale"]  # the names agree
    assert jax.tree.structure(kept) == jax.tree.structure(scale)


def test_image_projection_is_used_only_if_asked_for():
    x, y = pairs(4)
    fns, stats = identities()
    fns["image_projection"] = lambda v, x, train: (x[:, ::-1], {})
    variables = {"params": {"scale": {"logit_scale": jnp.float32(1)}}, "batch_stats": stats}
    for used, images in ((True, x[:, ::-1]), (False, x)):
        value, _ = clip.loss(config(image_projection=used), variables, {},
                             {"view1": x, "tokens": y}, fns, None, 0)
        np.testing.assert_allclose(value, reference(images, y, 1), rtol=1e-5)


class Image(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jnp.tanh(nn.Dense(6)(x.reshape(len(x), -1)))


class Text(nn.Module):
    @nn.compact
    def __call__(self, tokens, train):
        return nn.Embed(11, 5)(tokens).mean(1)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_eight_devices_equal_one(weight):
    cfg = config(in_modality=weight)
    heads = clip.heads(cfg.objective)
    modules = {"encoder": Image(), "image_projection": heads["image_projection"], "text": Text(),
               "text_projection": heads["text_projection"], "scale": heads["scale"]}
    rng = np.random.default_rng(5)
    batch = {**{k: rng.normal(size=(16, 2, 2, 3)).astype(np.float32) for k in ("view1", "view2")},
             **{k: rng.integers(0, 11, (16, 3)).astype(np.int32) for k in ("tokens", "tokens2")}}
    inputs = {"encoder": batch["view1"], "image_projection": np.ones((1, 6)),
              "text": batch["tokens"], "text_projection": np.ones((1, 5)), "scale": np.ones(1)}
    params = {name: module.init(jax.random.key(i), inputs[name], False)["params"]
              for i, (name, module) in enumerate(modules.items())}
    stats = {name: {} for name in modules}
    fns = parts.make_apply_fns(modules)

    def step(params, batch):
        return jax.value_and_grad(lambda p: clip.loss(
            cfg, {"params": p, "batch_stats": stats}, {}, batch, fns, None, 0), has_aux=True)(
                params)

    step = jax.jit(step)
    one = step(params, batch)
    mesh = parallel.make_mesh(ConfigDict({"data": 4, "fsdp": 2}))
    with jax.set_mesh(mesh):
        eight = step(jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
                     parallel.put_rows(mesh, batch))
    assert len(eight[0][0].sharding.device_set) == 8 and len(one[0][0].sharding.device_set) == 1
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(one[1]))
