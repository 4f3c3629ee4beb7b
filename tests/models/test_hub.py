"""Weights under torchvision's names; the oracle for the features is PyTorch's functional ops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import hub
from jax_cl_bd.models.build import build

DATA = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "image_size": 32}


def random_variables(name, stem, width, seed=0):
    """Weights with norms that are not at their first values, so that a swap would show."""
    cfg = ConfigDict(hub._model(name, stem, width))
    shapes = jax.eval_shape(lambda k: build(cfg).init(k, jnp.zeros((1, 32, 32, 3)), train=False),
                            jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            fan = leaf.shape[0] * leaf.shape[1] * leaf.shape[2]
            return rng.normal(0, np.sqrt(2 / fan), leaf.shape).astype(np.float32)
        centre, spread = {"scale": (0.6, 0.1), "var": (1, 0.2)}.get(kind, (0, 0.1))
        return rng.uniform(centre - spread, centre + spread, leaf.shape).astype(np.float32)

    return build(cfg), jax.tree_util.tree_map_with_path(draw, dict(shapes))


def torch_features(arrays, depths, x):
    """A ResNet's forward pass, from torchvision's definition, on a dict of named tensors."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    w = {k: torch.from_numpy(v) for k, v in arrays.items()}

    def norm(h, name):
        return f.batch_norm(h, *(w[f"{name}.{k}"] for k in
                                 ("running_mean", "running_var", "weight", "bias")))

    def conv(h, name, stride=1):
        kernel = w[f"{name}.weight"]
        return f.conv2d(h, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    h = torch.from_numpy(x).permute(0, 3, 1, 2)
    if w["conv1.weight"].shape[-1] == 7:
        h = f.max_pool2d(f.relu(norm(conv(h, "conv1", 2), "bn1")), 3, stride=2, padding=1)
    else:
        h = f.relu(norm(conv(h, "conv1"), "bn1"))
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            at, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            if f"{at}.conv3.weight" in w:
                y = f.relu(norm(conv(h, f"{at}.conv1"), f"{at}.bn1"))
                y = f.relu(norm(conv(y, f"{at}.conv2", stride), f"{at}.bn2"))
                y = norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
            else:
                y = f.relu(norm(conv(h, f"{at}.conv1", stride), f"{at}.bn1"))
                y = norm(conv(y, f"{at}.conv2"), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in w:
                h = norm(conv(h, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            h = f.relu(h + y)
    return h.mean((2, 3)).numpy()


@pytest.mark.parametrize("name, stem, depths, side", [
    ("resnet18", "cifar", (2, 2, 2, 2), 16), ("resnet18", "imagenet", (2, 2, 2, 2), 65),
    ("resnet50", "imagenet", (3, 4, 6, 3), 64)])
def test_features_equal_torch_through_a_saved_file(tmp_path, name, stem, depths, side):
    module, variables = random_variables(name, stem, 64)
    hub.save_resnet(tmp_path, name, stem, variables, data=DATA)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    x = np.random.default_rng(1).normal(size=(2, side, side, 3)).astype(np.float32)
    want = torch_features(arrays, depths, x)
    described, read = hub.load_resnet(tmp_path)
    assert (described["model"]["name"], described["model"]["stem"]) == (name, stem)
    got = np.asarray(jax.jit(lambda v: module.apply(v, x, train=False))(read))
    assert want.std() > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_names_are_torchvisions():
    names = hub._shapes(hub._model("resnet18", "imagenet", 64))
    assert len(names) == 20 + 4 * 20  # convolutions, and four arrays per norm
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.0.weight",
            "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias"} <= set(names)
    names = hub._shapes(hub._model("resnet50", "imagenet", 64))
    assert len(names) == 53 + 4 * 53 and "layer3.5.conv3.weight" in names


def test_round_trip_is_exact_and_keeps_what_it_was_trained_with(tmp_path):
    _, variables = random_variables("resnet18", "cifar", 4)
    path = tmp_path / "deep" / "weights.safetensors"
    hub.save_resnet(path, "resnet18", "cifar", variables, data=DATA)
    described, read = hub.load_resnet(path)
    assert described["data"] == DATA and described["model"]["width"] == 4
    assert described["ignored"] == []
    assert jax.tree.structure(read) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, read, variables)


@pytest.fixture
def weights(tmp_path):
    _, variables = random_variables("resnet18", "cifar", 4)
    hub.save_resnet(tmp_path, "resnet18", "cifar", variables)
    path = tmp_path / "model.safetensors"
    return path, safetensors.numpy.load_file(path)


def test_foreign_file_is_read_and_what_is_assumed_or_dropped_is_said(weights):
    path, arrays = weights
    arrays = {k: v for k, v in arrays.items() if not k.endswith("num_batches_tracked")}
    arrays |= {"fc.weight": np.zeros((10, 32), np.float32), "fc.bias": np.zeros(10, np.float32)}
    safetensors.numpy.save_file(arrays, path)
    with pytest.warns(UserWarning) as told:
        described, _ = hub.load_resnet(path)
    text = "\n".join(str(w.message) for w in told)
    assert "fc.bias, fc.weight" in text and "normalised" in text
    assert described["ignored"] == ["fc.bias", "fc.weight"]
    assert described["data"]["mean"] == hub.IMAGENET["mean"]


@pytest.mark.parametrize("change, told", [
    (lambda a: a.pop("layer3.0.bn2.weight"), "missing: layer3.0.bn2.weight"),
    (lambda a: a.update({"layer5.0.bn1.weight": np.zeros(3)}), "unknown: layer5.0.bn1.weight"),
    (lambda a: a.update({"x.num_batches_tracked": np.zeros(())}), "unknown: x.num_batches"),
    (lambda a: a.update({"bn1.bias": np.zeros(5, np.float32)}), r"bn1.bias has shape \(5,\)"),
    (lambda a: a.pop("conv1.weight"), "conv1.weight is missing")])
def test_every_difference_is_named(weights, change, told):
    path, arrays = weights
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match=told):
        hub.load_resnet(path)


def test_no_file_and_a_cut_file(weights, tmp_path):
    path, _ = weights
    with pytest.raises(UserError, match="nowhere"):
        hub.load_resnet(tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors"):
        hub.load_resnet(path)


def test_bfloat16_is_refused_and_float16_read(weights):
    path, arrays = weights
    half = {k: v.astype(np.float16) for k, v in arrays.items()}
    safetensors.numpy.save_file(half, path)
    with pytest.warns(UserWarning, match="normalised"):
        _, read = hub.load_resnet(path)
    assert {a.dtype for a in jax.tree.leaves(read)} == {np.dtype("float32")}
    np.testing.assert_array_equal(read["params"]["bn1"]["scale"], half["bn1.weight"])
    brain = {k: v.astype(jnp.bfloat16) for k, v in arrays.items()}
    safetensors.numpy.save_file(brain, path)
    with pytest.raises(UserError, match="BF16.*convert"):
        hub.load_resnet(path)


def test_saving_what_is_not_that_model(tmp_path):
    _, variables = random_variables("resnet18", "cifar", 4)
    with pytest.raises(UserError, match="resnet50"):
        hub.save_resnet(tmp_path, "small_resnet", "cifar", variables)
    with pytest.raises(UserError, match="params/conv1/kernel"):
        hub.save_resnet(tmp_path, "resnet18", "imagenet", variables)
    with pytest.raises(UserError, match="layer1_0/conv3/kernel"):
        hub.save_resnet(tmp_path, "resnet50", "cifar", variables)
