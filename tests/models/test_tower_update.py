"""CLIP's own towers are trained: in debug mode they stay themselves, and an update moves them."""

import jax
import numpy as np
import optax
import pytest

from configs import clip_pairs, clip_scenes
from jax_cl_bd.models import build
from jax_cl_bd.objectives import training

TOWERS = [(clip_scenes, "tower=clip_resnet", "clip_resnet"), (clip_scenes, "tower=vit", "vit"),
          (clip_scenes, "tower=vit,objective=siglip", "vit"),
          (clip_pairs, "tower=rn50", "clip_resnet"), (clip_pairs, "tower=vit_b32", "vit")]
NEVER = "['attention']['key']['bias']"  # it moves no softmax


@pytest.mark.parametrize("config, arg, name", TOWERS)
def test_debug_shrinks_the_chosen_tower(config, arg, name):
    full, cfg = config.get_config(arg), config.get_config(f"debug,{arg}")
    assert cfg.model.name == full.model.name == name and cfg.data.image_size == 32
    training.check(cfg)
    shapes = jax.eval_shape(lambda key: training.init_variables(cfg, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"]["encoder"])) < 20_000


@pytest.mark.parametrize("arg", [arg for _, arg, _ in TOWERS[:3]])
def test_every_weight_has_a_gradient_through_the_pooling(arg):
    """Of weights that are not at their first values, where a gain of zero hides a block."""
    cfg = clip_scenes.get_config(f"debug,{arg}")
    module, rng = build.build(cfg.model), np.random.default_rng(0)
    x = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda k: module.init(k, x, train=False), jax.random.key(0))
    params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32),
                          shapes["params"])

    @jax.jit
    def gradient(params):
        def loss(params):
            y, _ = module.apply({"params": params, "batch_stats": stats}, x, train=True,
                                mutable=["batch_stats"])
            return (y ** 2).sum()
        stats = jax.tree.map(lambda a: np.ones(a.shape, np.float32), shapes.get("batch_stats", {}))
        return jax.grad(loss)(params)

    for path, value in jax.tree_util.tree_leaves_with_path(gradient(params)):
        place = jax.tree_util.keystr(path)
        assert np.isfinite(value).all()
        assert np.abs(value).max() > 1e-6 or place.endswith(NEVER), place


@pytest.mark.slow
@pytest.mark.parametrize("config, arg, name", TOWERS[:4])
def test_one_update_moves_the_pooling(config, arg, name):
    cfg = config.get_config(f"debug,{arg}")
    tx = optax.sgd(1.0)
    rng = np.random.default_rng(0)
    views = {"view1": rng.normal(size=(4, 32, 32, 3)).astype(np.float32),
             "tokens": rng.integers(3, 300, (4, cfg.text.context)).astype(np.int32)}
    views["tokens"][:, -1] = cfg.text.end

    @jax.jit
    def run(key):
        state = training.make_init(cfg, tx)(key)
        new, metrics = training.make_update(cfg, tx, 2)(state, views, key)
        return metrics["loss"], jax.tree.map(lambda a, b: abs(a - b).max(), state.params,
                                             new.params)

    loss, moved = run(jax.random.key(0, impl="unsafe_rbg"))  # compiles faster
    assert np.isfinite(loss)
    for path, value in jax.tree_util.tree_leaves_with_path(moved["encoder"]):
        place = jax.tree_util.keystr(path)
        assert value > 0 or "pool" not in place or place.endswith(NEVER), place
