"""RoCLIP's pool and loss, step by step against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, roclip
from tests.objectives import tiny_pair
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import config as clip_config
from tests.objectives.test_clip import identities, pairs, reference

B, D, SLOTS, EPOCH = 6, 4, 2, 3
T = np.float32(1.5)


def config(**fields):
    return ConfigDict({"objective": {
        "name": "roclip", "dim": D, "image_projection": True, "scale_init": 2.0, "break_every": 2,
        "epoch_steps": EPOCH, "queue_batches": SLOTS, **fields}, "train": {"batch_size": B}})


def loss(x, y, t, extra, step, cfg=None):
    fns, stats = identities()
    variables = {"params": {"scale": {"logit_scale": t}}, "batch_stats": stats}
    batch = {"view1": None, "tokens": None, "view2": x, "tokens2": y}  # plain ones are not read
    value, (_, extra, metrics) = roclip.loss(cfg or config(), variables, extra, batch, fns, None,
                                             step)
    return value, (extra, metrics)


def matched(x, pool):
    """The pool's caption nearest to each image, one at a time."""
    return np.stack([pool[max(range(len(pool)), key=lambda b: pool[b] @ row)] for row in unit(x)])


def test_every_second_epoch_looks_up_first_and_then_fills_the_pool():
    extra = roclip.init_extra(config(), None, jax.random.key(0))
    assert extra["queue"].shape == (SLOTS, B, D)
    np.testing.assert_allclose(np.linalg.norm(extra["queue"], axis=-1), 1, rtol=1e-6)
    pool = list(np.float64(extra["queue"]).reshape(-1, D))  # the oldest first
    run, seen = jax.jit(loss), []
    for step in range(4 * EPOCH):
        x, y = pairs(step)
        value, (extra, metrics) = run(x, y, T, extra, step)
        epoch = step // EPOCH + 1
        if epoch % 2 == 0:
            assert metrics["matched"] == 1
            want = reference(x, matched(x, pool), T)
            assert abs(want - reference(x, matched(x, pool[B:] + list(unit(y))), T)) > 1e-3
            pool = pool[B:] + list(unit(y))
            seen.append(step)
        else:
            assert metrics["matched"] == 0
            want = reference(x, y, T)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        rows = sorted(map(tuple, np.round(np.asarray(extra["queue"]).reshape(-1, D), 4)))
        np.testing.assert_allclose(rows, sorted(map(tuple, np.round(pool, 4))), atol=2e-4)
    assert seen == [3, 4, 5, 9, 10, 11]  # epochs 2 and 4, counted from 1


def test_gradient_reaches_images_and_scale_but_no_caption_in_such_an_epoch():
    extra = roclip.init_extra(config(), None, jax.random.key(1))
    pool = np.float64(extra["queue"]).reshape(-1, D)
    x, y = pairs(1)
    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (to_x, to_y, to_t), _ = grad(x, y, T, extra, EPOCH)
    near = matched(x, pool)
    want = differences(lambda z: reference(z, near, T), x)
    np.testing.assert_allclose(to_x, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(to_t, differences(lambda t: reference(x, near, t), T), rtol=1e-3)
    assert not np.any(to_y)
    (_, to_y, _), _ = grad(x, y, T, extra, 0)
    want = differences(lambda z: reference(x, z, T), y)
    np.testing.assert_allclose(to_y, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_without_such_epochs_it_is_clip_on_the_augmented_views():
    cfg, (x, y) = config(break_every=0), pairs(2)
    extra = roclip.init_extra(cfg, None, jax.random.key(0))
    fns, stats = identities()
    variables = {"params": {"scale": {"logit_scale": T}}, "batch_stats": stats}
    want, _ = clip.loss(clip_config(), variables, {}, {"view1": x, "tokens": y}, fns, None, 0)
    for step in (0, EPOCH):
        value, (kept, _) = loss(x, y, T, extra, step, cfg)
        assert value == want
        np.testing.assert_array_equal(kept["queue"], extra["queue"])


def test_logits_are_float32_where_the_towers_are_not():
    extra = roclip.init_extra(config(), None, jax.random.key(0))
    x, y = (jnp.asarray(v, jnp.bfloat16) for v in pairs(3))
    program = str(jax.make_jaxpr(loss)(x, y, T, extra, EPOCH))
    assert "f32[6,6] = dot_general" in program and "bf16[6,6]" not in program


def test_eight_devices_equal_one():
    cfg = config(epoch_steps=1)
    cfg.train.batch_size = 16
    tiny_pair.eight_devices_equal_one(roclip, cfg, (0, 1, 3))


@pytest.mark.parametrize("fields, says", [
    ({"break_every": -1}, "break_every = -1"), ({"epoch_steps": -3}, "epoch_steps = -3"),
    ({"queue_batches": 0}, "queue_batches = 0; must be at least 1")])
def test_bad_settings_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        roclip.heads(config(**fields).objective)
