"""What the stages put out, for every kind of image tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import activations, build

TOWERS = {
    "small_resnet": (dict(name="small_resnet", width=4, stages=(4, 8), stem="cifar", stem_stride=1,
                          first_stride=2), ("layer1_0", "layer2_0")),
    "resnet50": (dict(name="resnet50", width=2, stem="cifar", stem_stride=2, first_stride=1),
                 ("layer1_2", "layer2_3", "layer3_5", "layer4_2")),
    "clip_resnet": (dict(name="clip_resnet", width=4, stages=(2, 1), heads=2),
                    ("layer1_1", "layer2_0")),
    "vit": (dict(name="vit", width=8, layers=2, heads=2, patch=8, mlp_ratio=2, pool="cls",
                 act="gelu", eps=1e-5, pre_norm=True, patch_bias=False), ("block0", "block1"))}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("resnet50", "clip_resnet") else [])
    for name in TOWERS])
def test_the_last_block_of_every_stage(name):
    fields, names = TOWERS[name]
    module = build.build(ConfigDict({**fields, "dtype": "float32", "bn_groups": 1}))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    part = jax.jit(lambda key: module.init(key, x, train=False))(jax.random.key(0))
    assert activations.layers(part["params"]) == names
    variables = {kind: {"encoder": part.get(kind, {})} for kind in ("params", "batch_stats")}
    y, kept, stats = jax.jit(lambda v: activations.forward(
        module, v, x, names, train=False))(variables)
    plain = module.apply(part, x, train=False)
    np.testing.assert_allclose(y, plain, rtol=1e-4, atol=1e-5)
    assert list(kept) == list(names) and not stats
    if "resnet" in name and name != "clip_resnet":  # whose features are the mean of the last stage
        np.testing.assert_allclose(kept[names[-1]].mean((1, 2)), plain, rtol=1e-4, atol=1e-5)
    else:
        assert all(a.shape[0] == 2 and jnp.ptp(a) > 0 for a in kept.values())


def test_training_gives_the_new_statistics():
    fields, names = TOWERS["small_resnet"]
    module = build.build(ConfigDict({**fields, "dtype": "float32", "bn_groups": 1}))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)
    part = module.init(jax.random.key(0), x, train=False)
    variables = {kind: {"encoder": part[kind]} for kind in part}
    _, _, stats = activations.forward(module, variables, x, names, train=True)
    _, updated = module.apply(part, x, train=True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, stats, updated["batch_stats"])


def test_a_tower_without_stages_is_refused():
    with pytest.raises(UserError, match="conv1"):
        activations.layers({"conv1": {}, "bn1": {}})
