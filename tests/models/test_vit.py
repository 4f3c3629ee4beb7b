import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models.build import build

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def config(**changes):
    return ConfigDict({"name": "vit", "width": 16, "layers": 1, "heads": 2, "patch": 4,
                       "mlp_ratio": 3, "pool": "cls", "act": "quick_gelu", "eps": 1e-5,
                       "pre_norm": True, "patch_bias": False, "dtype": "float32",
                       "bn_groups": 1} | changes)


SIGLIP = {"pool": "map", "act": "gelu_tanh", "eps": 1e-6, "pre_norm": False, "patch_bias": True}


def random_params(cfg, x=IMAGES):
    shapes = jax.eval_shape(lambda k: build(cfg).init(k, x, train=False), jax.random.key(0))
    assert set(shapes) == {"params"}
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32),
                        shapes["params"])


@functools.partial(jax.jit, static_argnums=0)
def features(module, params, x):
    return module.apply({"params": params}, x, train=True)


def run(cfg, params, x=IMAGES):
    return np.asarray(features(build(cfg), params, x))


def numpy_features(p, image, cfg):
    """One image through a tower of one block."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def norm(x, q):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.eps) * q["scale"] + q["bias"]

    def linear(x, q):
        return x @ q["kernel"] + q["bias"]

    def attend(queries, x, a):
        q, k, v = linear(queries, a["query"]), linear(x, a["key"]), linear(x, a["value"])
        out = np.zeros_like(q)
        for head in (slice(0, 8), slice(8, 16)):
            s = np.exp(q[:, head] @ k[:, head].T / math.sqrt(8))
            out[:, head] = s / s.sum(1, keepdims=True) @ v[:, head]
        return linear(out, a["out"])

    def mlp(x, q):
        h = linear(x, q["fc1"])
        if cfg.act == "quick_gelu":
            return linear(h / (1 + np.exp(-1.702 * h)), q["fc2"])
        h = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return linear(h, q["fc2"])

    kernel = p["patch_embedding"]["kernel"].reshape(-1, 16)
    x = np.stack([image[y:y + 4, z:z + 4].reshape(-1) for y in range(0, image.shape[0], 4)
                  for z in range(0, image.shape[1], 4)]) @ kernel
    x = x + p["patch_embedding"].get("bias", 0)
    if cfg.pool == "cls":
        x = np.concatenate([p["class_embedding"][None], x])
    x = x + p["position_embedding"]
    if cfg.pre_norm:
        x = norm(x, p["ln_pre"])
    y = norm(x, p["block0"]["ln1"])
    x = x + attend(y, y, p["block0"]["attention"])
    x = x + mlp(norm(x, p["block0"]["ln2"]), p["block0"]["mlp"])
    x = norm(x, p["ln_post"])
    if cfg.pool == "cls":
        return x[0]
    y = attend(p["pool"]["probe"][None], x, p["pool"]["attention"])
    return (y + mlp(norm(y, p["pool"]["ln"]), p["pool"]["mlp"]))[0]


@pytest.mark.parametrize("change", [{}, SIGLIP, {"pool": "map"}], ids=["clip", "siglip", "mixed"])
def test_against_numpy(change):
    cfg = config(**change)
    params = random_params(cfg)
    got = run(cfg, params)
    assert got.shape == (2, 16) and got.dtype == np.float32
    for image, row in zip(IMAGES, got, strict=True):
        np.testing.assert_allclose(row, numpy_features(params, image, cfg), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{}, SIGLIP], ids=["clip", "siglip"])
def test_only_the_positions_know_the_order_of_the_patches(change):
    cfg = config(**change)
    params = random_params(cfg)
    swapped = IMAGES.copy()
    swapped[:, :4, :4], swapped[:, 4:, 8:] = IMAGES[:, 4:, 8:], IMAGES[:, :4, :4]
    assert np.abs(run(cfg, params) - run(cfg, params, swapped)).max() > 1e-3
    places = params["position_embedding"]
    places[-6:] = places[-1]
    np.testing.assert_allclose(run(cfg, params), run(cfg, params, swapped), rtol=0, atol=1e-5)


def test_positions_are_made_for_the_first_images():
    cfg = config()
    params = random_params(cfg)
    assert params["position_embedding"].shape == (2 * 3 + 1, 16)
    with pytest.raises(UserError, match="5 positions.*made for 7"):
        run(cfg, params, np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match="model.patch = 4.*8 x 10"):
        run(cfg, params, np.zeros((1, 8, 10, 3), np.float32))


def test_first_values():
    cfg = config(width=64, heads=4, **SIGLIP)
    init = jax.jit(lambda k: build(cfg).init(k, jnp.zeros((1, 32, 32, 3)), train=False)["params"])
    params = init(jax.random.key(0, impl="unsafe_rbg"))  # compiles four times as fast
    std = 64**-0.5
    kernel = np.asarray(params["patch_embedding"]["kernel"])  # U(-1/sqrt(48), 1/sqrt(48))
    assert 0.98 * 48**-0.5 < np.abs(kernel).max() <= 48**-0.5
    for array, want in ((params["position_embedding"], std), (params["pool"]["probe"], std),
                        (params["block0"]["attention"]["key"]["kernel"], std),
                        (params["block0"]["attention"]["out"]["kernel"], std * 2**-0.5),
                        (params["block0"]["mlp"]["fc1"]["kernel"], 128**-0.5),
                        (params["block0"]["mlp"]["fc2"]["kernel"], std * 2**-0.5)):
        np.testing.assert_allclose(np.std(array), want, rtol=0.05 if array.ndim > 1 else 0.3)


def test_bfloat16_computes_low_and_stores_high():
    cfg, full = config(dtype="bfloat16", **SIGLIP), config(**SIGLIP)
    params = random_params(full)
    made = jax.eval_shape(lambda k: build(cfg).init(k, IMAGES, train=False), jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    low, high = run(cfg, params), run(full, params)
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, high, rtol=0, atol=0.05 * np.abs(high).max())
    assert np.abs(low - high).max() > 0


@pytest.mark.parametrize("change, told", [
    ({"heads": 5}, "model.heads = 5.*model.width = 16"), ({"pool": "clas"}, "did you mean 'cls'"),
    ({"act": "gelu_tan"}, "did you mean 'gelu_tanh'"), ({"patch": 0}, "model.patch = 0"),
    ({"dtype": "float16"}, "model.dtype"), ({"name": "vti"}, "did you mean 'vit'"),
    ({"layers": 0}, "model.layers = 0"), ({"eps": 0.0}, "model.eps = 0")])
def test_wrong_settings(change, told):
    with pytest.raises(UserError, match=told):
        build(config(**change))
