import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models.build import build


def config(**changes):
    return ConfigDict({"name": "small_resnet", "stem": "cifar", "width": 64, "stages": (4, 8, 16),
                       "stem_stride": 1, "first_stride": 1, "dtype": "float32",
                       "bn_groups": 1} | changes)


def shapes(cfg, side):
    module = build(cfg)
    x = jnp.zeros((2, side, side, 3))
    variables = jax.eval_shape(lambda k: module.init(k, x, train=False), jax.random.key(0))
    features = jax.eval_shape(lambda v: module.apply(v, x, train=False), variables)
    return variables["params"], features


# Parameters without the classifier: torchvision's 11,689,512 - 513,000 and 25,557,032 - 2,049,000;
# the CIFAR stem has 3 x 3 in place of 7 x 7 taps, for 3 -> 64 channels.
@pytest.mark.parametrize("name, stem, count, width", [
    ("resnet18", "imagenet", 11_176_512, 512), ("resnet18", "cifar", 11_168_832, 512),
    ("resnet50", "imagenet", 23_508_032, 2048), ("resnet50", "cifar", 23_500_352, 2048)])
def test_torchvision_parameter_counts(name, stem, count, width):
    params, features = shapes(config(name=name, stem=stem), 64)
    assert sum(a.size for a in jax.tree.leaves(params)) == count
    assert features.shape == (2, width)


def test_width_scales_every_stage():
    _, features = shapes(config(name="resnet18", width=16), 32)
    assert features.shape == (2, 128)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (2, 2)])
def test_small_resnet_end(strides):
    cfg = config(stem_stride=strides[0], first_stride=strides[1])
    stride = strides[0] * strides[1]
    params, features = shapes(cfg, 32)
    assert features.shape == (2, 16) and features.dtype == jnp.float32
    assert sorted(params) == ["bn1", "conv1", "layer1_0", "layer2_0", "layer3_0"]
    maps = jax.eval_shape(lambda: build(cfg).init_with_output(
        jax.random.key(0), jnp.zeros((2, 32, 32, 3)), train=False, capture_intermediates=True))
    last = maps[1]["intermediates"]["layer3_0"]["__call__"][0]
    assert last.shape == (2, 8 // stride, 8 // stride, 16)


def test_bfloat16_computes_low_and_stores_high():
    module = build(config(dtype="bfloat16", stages=(4, 8)))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = jax.jit(lambda k: module.init(k, x, train=False))(jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    full = build(config(stages=(4, 8)))
    low, high = jax.jit(lambda v: [m.apply(v, x, train=False) for m in (module, full)])(variables)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=0.05, atol=0.02)
    assert np.abs(low - high).max() > 0


def test_initial_kernels_have_kaiming_fan_out_spread():
    module = build(config(stages=(32, 64)))
    init = jax.jit(lambda k: module.init(k, jnp.zeros((1, 8, 8, 3)), train=False)["params"])
    params = init(jax.random.key(0))
    kernel = np.asarray(params["layer2_0"]["conv1"]["kernel"])  # 3 x 3 x 32 x 64
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.03)
    assert np.abs(kernel).max() > 3 * kernel.std()  # not truncated at 2 deviations


@pytest.mark.parametrize("change, told", [
    ({"name": "resnet19"}, "resnet19.*resnet18"), ({"name": "resnet18", "stem": "cfar"}, "cifar"),
    ({"dtype": "float16"}, "dtype"), ({"bn_groups": 0}, "bn_groups = 0"),
    ({"stages": ()}, "stages"), ({"stem_stride": 4}, "stem_stride = 4")])
def test_wrong_settings(change, told):
    with pytest.raises(UserError, match=told):
        build(config(**change))
