"""Gradient caching: the step of the whole batch, made in parts, and the memory it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from configs import clip_scenes, quickstart
from jax_cl_bd import parallel, pretrain
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import gradient_cache, training
from tests.objectives import tiny_pair

B, SIDE, CONTEXT = 32, 8, 5
KEEPS_GRADIENTS = optax.chain(optax.trace(decay=0.0), optax.scale(-1.0))


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return jnp.tanh(nn.Dense(6)(x.reshape(len(x), -1)))


def config(name, *, chunks=1, bn_groups=1, batch_size=B):
    pairs = name in ("clip", "siglip")
    tower = "vit" if name == "clip" else "small_resnet"  # of siglip's, "vit" has no projection
    cfg = (clip_scenes.get_config(f"none,objective={name},tower={tower},debug") if pairs
           else quickstart.get_config(f"objective={name},debug"))
    cfg.train.update(chunks=chunks, batch_size=batch_size)
    cfg.data.image_size = SIDE
    cfg.model.bn_groups = bn_groups
    if pairs:
        cfg.text.update(context=CONTEXT)
    else:
        cfg.model.update(width=4, stages=(4,))
    return cfg


def views(batch_size=B, seed=0):
    rng = np.random.default_rng(seed)
    return {**{v: rng.normal(size=(batch_size, SIDE, SIDE, 3)).astype(np.float32)
               for v in ("view1", "view2")},
            "tokens": rng.integers(2, 300, (batch_size, CONTEXT)).astype(np.int32),
            "index": np.arange(batch_size, dtype=np.int32)}


def small_towers(cfg):
    """Towers that compile at once, under the real projections and scale."""
    return {**tiny_pair.modules_of(cfg), "encoder": Flat()}


def first_state(cfg):
    return jax.jit(training.make_init(cfg, KEEPS_GRADIENTS))(jax.random.key(0))


def one_update(cfg, state, devices=1):
    """The gradients of one step, and what else comes out of it."""
    mesh = parallel.make_mesh(ConfigDict({"data": devices, "fsdp": 1}))
    shardings = parallel.state_shardings(mesh, state)
    with jax.set_mesh(mesh):
        update = jax.jit(training.make_update(cfg, KEEPS_GRADIENTS, 10),
                         out_shardings=(shardings, None))
        new, metrics = update(jax.device_put(state, shardings),
                              parallel.put_rows(mesh, views(cfg.train.batch_size)),
                              jax.random.key(3))
    return jax.device_get((new.opt_state[0].trace, (new.batch_stats, new.extra, metrics)))


@pytest.mark.parametrize("name, devices, chunks, bn_groups", [
    ("clip", 8, 4, 1), ("siglip", 1, 2, 1), ("simclr", 8, 2, 16),
    pytest.param("byol", 1, 2, 2, marks=pytest.mark.slow),
    pytest.param("simclr", 1, 4, 4, marks=pytest.mark.slow),
    pytest.param("moco", 1, 2, 2, marks=pytest.mark.slow)])
def test_parts_give_the_step_of_the_whole_batch(name, devices, chunks, bn_groups, monkeypatch):
    if name in ("clip", "siglip"):
        monkeypatch.setattr(training, "modules_of", small_towers)
    size = 64 if devices == 8 else B
    given = dict(bn_groups=bn_groups, batch_size=size)
    state = first_state(config(name, **given))
    whole, cached = (one_update(config(name, chunks=k, **given), state, devices)
                     for k in (1, chunks))
    largest = max(np.abs(g).max() for g in jax.tree.leaves(whole[0]))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest),
                 cached[0], whole[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 cached[1], whole[1])


def test_small_batches_are_another_loss():
    """What accumulation without the cache would give: the mean over the parts' own losses."""
    cfg, all_views = config("simclr", batch_size=B // 4, bn_groups=1), views()
    state = first_state(cfg)
    whole = one_update(config("simclr", bn_groups=4), state)[0]
    update = jax.jit(training.make_update(cfg, KEEPS_GRADIENTS, 10))
    parts = [update(state, {k: v[i * B // 4:(i + 1) * B // 4] for k, v in all_views.items()},
                    jax.random.key(3))[0].opt_state[0].trace for i in range(4)]
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *parts)
    distance = optax.tree.norm(jax.tree.map(lambda a, b: a - b, mean, whole))
    assert distance > 0.05 * optax.tree.norm(whole)


def test_memory_falls_with_the_number_of_chunks():
    def temporary(chunks):
        cfg = config("clip", chunks=chunks, batch_size=256)
        cfg.model.update(width=64, heads=4, patch=4)
        cfg.data.image_size = 16
        tx = optax.sgd(1.0)
        init = training.make_init(cfg, tx)
        state = jax.eval_shape(init, jax.random.key(0))
        batch = {k: jax.ShapeDtypeStruct((len(v), 16, 16, 3) if v.ndim == 4 else v.shape, v.dtype)
                 for k, v in views(256).items()}
        update = jax.jit(training.make_update(cfg, tx, 10))
        return update.lower(state, batch, jax.random.key(0)).compile(
            ).memory_analysis().temp_size_in_bytes

    sizes = [temporary(chunks) for chunks in (1, 8)]
    assert sizes[0] > 4 * sizes[1], sizes


def test_rows_come_back_in_their_order():
    x = np.arange(48).reshape(24, 2)
    np.testing.assert_array_equal(parallel.split_rows(x, 3), x.reshape(3, 8, 2))
    np.testing.assert_array_equal(parallel.join_rows(parallel.split_rows(x, 3)), x)
    mesh = parallel.make_mesh(ConfigDict({"data": 4, "fsdp": 1}))
    with jax.set_mesh(mesh):
        rows = parallel.put_rows(mesh, x)
        parts = jax.jit(lambda x: parallel.split_rows(x, 3))(rows)
        back = jax.jit(parallel.join_rows)(parts)
    np.testing.assert_array_equal(parts[1], x.reshape(4, 3, 2, 2)[:, 1].reshape(8, 2))
    np.testing.assert_array_equal(back, x)
    held = {d.device: d.data for d in rows.addressable_shards}
    for shard in parts.addressable_shards:  # of the same rows as before
        assert set(np.ravel(shard.data)) == set(np.ravel(held[shard.device]))


@pytest.mark.parametrize("chunks, bn_groups, match", [
    (0, 1, "must divide train.batch_size=32"), (5, 5, "must divide train.batch_size=32"),
    (2, 1, "set model.bn_groups to a multiple of chunks times devices, 2,"),
    (4, 2, "set model.bn_groups to a multiple of chunks times devices, 4,")])
def test_chunks_that_do_not_fit_are_refused(chunks, bn_groups, match):
    cfg = config("simclr", chunks=chunks, bn_groups=bn_groups)
    cfg.mesh.data = 1
    with pytest.raises(UserError, match=match):
        pretrain.check(cfg, 200)


def test_batch_norm_is_what_groups_are_asked_for():
    assert training.has_batch_norm(config("simclr"))
    assert not training.has_batch_norm(config("clip"))
    gradient_cache.check(config("clip", chunks=4), 8, has_batch_norm=False)
