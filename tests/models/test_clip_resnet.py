"""CLIP's modified ResNet; the oracle is PyTorch's functional ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import clip_resnet
from jax_cl_bd.models.build import build


def config(**changes):
    return ConfigDict({"name": "clip_resnet", "width": 8, "stages": (1, 2), "heads": 4,
                       "dtype": "float32", "bn_groups": 1} | changes)


def random_variables(module, *args):
    shapes = jax.eval_shape(lambda k: module.init(k, *args), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            fan = np.prod(leaf.shape[:-1])
            return rng.normal(0, np.sqrt(2 / fan), leaf.shape).astype(np.float32)
        centre, spread = {"scale": (0.8, 0.2), "var": (1, 0.2)}.get(kind, (0, 0.2))
        return rng.uniform(centre - spread, centre + spread, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


class Torch:
    """The layers in PyTorch, on our variables; images are [N, C, H, W]."""

    def __init__(self, variables):
        self.torch = pytest.importorskip("torch")
        self.f = self.torch.nn.functional
        self.variables = variables

    def get(self, kind, *path):
        at = self.variables[kind]
        for name in path:
            at = at[name]
        return self.torch.from_numpy(np.array(at))

    def conv(self, x, *path, stride=1):
        kernel = self.get("params", *path, "kernel").permute(3, 2, 0, 1)
        return self.f.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(self, x, *path):
        stats = path if path[-1] != "bn3" or len(path) == 1 else (*path, "norm")
        return self.f.batch_norm(x, self.get("batch_stats", *stats, "mean"),
                                 self.get("batch_stats", *stats, "var"),
                                 self.get("params", *path, "scale"),
                                 self.get("params", *path, "bias"))

    def bottleneck(self, x, stride, *path):
        y = self.f.relu(self.norm(self.conv(x, *path, "conv1"), *path, "bn1"))
        y = self.f.relu(self.norm(self.conv(y, *path, "conv2"), *path, "bn2"))
        if stride > 1:
            y = self.f.avg_pool2d(y, stride)
        y = self.norm(self.conv(y, *path, "conv3"), *path, "bn3")
        if stride > 1 or x.shape[1] != y.shape[1]:
            if stride > 1:
                x = self.f.avg_pool2d(x, stride)
            x = self.norm(self.conv(x, *path, "downsample_conv"), *path, "downsample_bn")
        return self.f.relu(x + y)

    def pool(self, x, heads, *path):
        """AttentionPool2d of OpenAI's release, with an output layer that changes nothing."""
        width = x.shape[1]
        x = x.flatten(2).permute(2, 0, 1)  # [HW, N, C]
        x = self.torch.cat([x.mean(0, keepdim=True), x])
        x = x + self.get("params", *path, "position_embedding")[:, None]
        weights = [(self.get("params", *path, "attention", n, "kernel").T,
                    self.get("params", *path, "attention", n, "bias"))
                   for n in ("query", "key", "value")]
        y, _ = self.f.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=width, num_heads=heads,
            q_proj_weight=weights[0][0], k_proj_weight=weights[1][0], v_proj_weight=weights[2][0],
            in_proj_weight=None, in_proj_bias=self.torch.cat([b for _, b in weights]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
            out_proj_weight=self.torch.eye(width), out_proj_bias=self.torch.zeros(width),
            use_separate_proj_weight=True, training=False, need_weights=False)
        return y[0]

    def resnet(self, x, stages, heads):
        for i in (1, 2, 3):
            x = self.conv(x, f"conv{i}", stride=2 if i == 1 else 1)
            x = self.f.relu(self.norm(x, f"bn{i}"))
        x = self.f.avg_pool2d(x, 2)
        for stage, depth in enumerate(stages):
            for i in range(depth):
                x = self.bottleneck(x, 2 if stage and i == 0 else 1, f"layer{stage + 1}_{i}")
        return self.pool(x, heads, "pool")

    def images(self, x):
        return self.torch.from_numpy(x).permute(0, 3, 1, 2)


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_attention_pooling_against_torch():
    x = images(2, 3, 4, 24)
    module = clip_resnet._Pool(3, jnp.float32)
    variables = random_variables(module, x)
    torch = Torch({"params": {"pool": variables["params"]}})
    want = torch.pool(torch.images(x), 3, "pool").numpy()
    got = np.asarray(module.apply(variables, x))
    assert got.shape == (2, 24) and want.std() > 0.05
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride, channels", [(2, 6), (1, 6), (1, 16)])
def test_bottleneck_against_torch(stride, channels):
    x = images(2, 8, 6, channels)
    module = clip_resnet.Bottleneck(4, stride, 1, jnp.float32)
    variables = random_variables(module, x, False)
    assert ("downsample_conv" in variables["params"]) == (channels != 16)
    torch = Torch({kind: {"block": variables[kind]} for kind in variables})
    want = torch.bottleneck(torch.images(x), stride, "block").permute(0, 2, 3, 1).numpy()
    got = np.asarray(jax.jit(lambda v: module.apply(v, x, False))(variables))
    assert got.shape == (2, 8 // stride, 6 // stride, 16) and want.std() > 0.05
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_whole_against_torch():
    x, module = images(2, 16, 24, 3), build(config())
    variables = random_variables(module, x, False)
    torch = Torch(variables)
    want = torch.resnet(torch.images(x), (1, 2), 4).numpy()
    got = np.asarray(jax.jit(lambda v: module.apply(v, x, train=False))(variables))
    assert got.shape == (2, 64) and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_rn50_has_openais_parameter_count():
    module = build(config(width=64, stages=(3, 4, 6, 3), heads=32))
    shapes = jax.eval_shape(lambda k: module.init(k, jnp.zeros((1, 224, 224, 3)), train=False),
                            jax.random.key(0))
    # OpenAI's RN50 image tower has 38,316,896; its c_proj, here a head, is 2048 x 1024 + 1024.
    assert sum(a.size for a in jax.tree.leaves(shapes["params"])) == 38_316_896 - 2_098_176


@pytest.fixture(scope="module")
def fresh():
    module = build(config(width=16, stages=(1,), heads=2))
    x = images(4, 16, 16, 3)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles four times as fast
    return module, jax.jit(lambda k: module.init(k, x, train=False))(key), x


def test_first_values(fresh):
    _, variables, _ = fresh
    params = variables["params"]
    block = params["layer1_0"]
    assert not np.any(block["bn3"]["scale"]) and np.all(block["bn2"]["scale"] == 1)
    assert np.all(block["downsample_bn"]["scale"] == 1)
    pool = params["pool"]
    for array in (pool["position_embedding"], pool["attention"]["query"]["kernel"]):
        np.testing.assert_allclose(np.std(array), 64**-0.5, rtol=0.08)
    kernel = np.asarray(block["conv2"]["kernel"])  # 3 x 3 x 16 inputs
    assert 0.98 * 144**-0.5 < np.abs(kernel).max() <= 144**-0.5


def test_training_moves_every_statistic(fresh):
    module, variables, x = fresh
    _, new = jax.jit(lambda v: module.apply(v, x, train=True, mutable=["batch_stats"]))(variables)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new["batch_stats"],
                         variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0


def test_bfloat16_computes_low_and_stores_high(fresh):
    full, variables, x = fresh
    module = build(config(width=16, stages=(1,), heads=2, dtype="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    low, high = jax.jit(lambda v: [m.apply(v, x, train=False) for m in (module, full)])(variables)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, high, rtol=0, atol=0.05 * np.abs(high).max())
    assert np.abs(low - high).max() > 0


@pytest.mark.parametrize("sides, told", [((32, 32), "65 positions.*made for 17"),
                                         ((16, 18), "divisible by 4.*16 x 18")])
def test_other_images_than_it_was_made_for(fresh, sides, told):
    module, variables, _ = fresh
    with pytest.raises(UserError, match=told):
        jax.eval_shape(lambda x: module.apply(variables, x, train=False), jnp.zeros((1, *sides, 3)))


@pytest.mark.parametrize("change, told", [
    ({"heads": 3}, "model.heads = 3 does not divide the 64 features"),
    ({"stages": ()}, "model.stages"), ({"stages": (2, 0)}, r"model.stages = \(2, 0\)"),
    ({"width": 9}, "model.width = 9"), ({"dtype": "float64"}, "model.dtype"),
    ({"bn_groups": 0}, "bn_groups = 0"), ({"name": "clip_resnt"}, "did you mean 'clip_resnet'")])
def test_wrong_settings(change, told):
    with pytest.raises(UserError, match=told):
        build(config(**change))
