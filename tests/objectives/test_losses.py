"""Every loss, its gradient and its bookkeeping against NumPy in float64.

The "network" is the identity, so that images are embeddings and gradients are those of the views.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import byol, moco, simclr, simsiam
from tests.objectives.reference import differences, unit

B, D = 4, 3


def config(name, bn_groups=1, **fields):
    return ConfigDict({"objective": {"name": name, "dim": D, **fields},
                       "model": {"bn_groups": bn_groups}, "train": {"batch_size": B, "steps": 0,
                                                                    "epochs": 4}})


def network(**parts):
    """apply_fns whose parts multiply by their parameter; encoder counts its calls as statistics."""
    def part(name):
        def apply(variables, x, train):
            stats = variables["batch_stats"][name]
            new = {"calls": stats["calls"] + 1, "seen": x.mean()} if stats else {}
            return x * variables["params"][name]["w"], new
        return apply

    stats = {"calls": jnp.zeros(()), "seen": jnp.zeros(())}
    variables = {"params": {n: {"w": jnp.float32(w)} for n, w in parts.items()},
                 "batch_stats": {n: stats if n == "encoder" else {} for n in parts}}
    return {n: part(n) for n in parts}, variables


def views(seed=0, batch=B):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(batch, D)).astype(np.float32) for _ in range(2))


def run(module, cfg, variables, extra, apply_fns, view1, view2, key=0, step=0):
    def f(a, b):
        return module.loss(cfg, variables, extra, {"view1": a, "view2": b}, apply_fns,
                           jax.random.key(key), step)

    (value, aux), grads = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(view1, view2)
    return value, grads, aux


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)


def nt_xent(z1, z2, temperature):
    """Chen et al. 2020, equation 1, by loops."""
    z = unit(np.concatenate([z1, z2]))
    s = z @ z.T / temperature
    total = 0
    for i in range(len(z)):
        j = (i + len(z1)) % len(z)
        others = [np.exp(s[i, k]) for k in range(len(z)) if k != i]
        total -= np.log(np.exp(s[i, j]) / sum(others))
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_simclr(temperature):
    a, b = views()
    fns, variables = network(encoder=1, projector=1)
    cfg = config("simclr", temperature=temperature)
    value, grads, (stats, extra, metrics) = run(simclr, cfg, variables, {}, fns, a, b)
    close(value, nt_xent(a, b, temperature))
    close(grads[0], differences(lambda x: nt_xent(x, b, temperature), a))
    close(grads[1], differences(lambda x: nt_xent(a, x, temperature), b))
    assert extra == {} and stats["encoder"]["calls"] == 1  # one pass for both views
    z = unit(np.concatenate([a, b]))
    s = z @ z.T - 9 * np.eye(2 * B)
    close(metrics["pretext_accuracy"], (s.argmax(1) == (np.arange(2 * B) + B) % (2 * B)).mean())


def info_nce(q, k, queue, temperature):
    q, k = unit(q), unit(k)
    total = 0
    for i in range(len(q)):
        s = np.concatenate([[q[i] @ k[i]], queue @ q[i]]) / temperature
        total -= s[0] - np.log(np.exp(s).sum())
    return total / len(q)


def moco_start(slots=3, batch=B, **fields):
    cfg = config("moco", **{"temperature": 0.2, "momentum": 0.9, "queue_batches": slots, **fields})
    cfg.train.batch_size = batch
    fns, variables = network(encoder=2, projector=1.5)
    return cfg, fns, variables, moco.init_extra(cfg, variables, jax.random.key(3))


def test_moco_loss_and_gradient():
    cfg, fns, variables, extra = moco_start()
    a, b = views(1)
    value, grads, (_, _, metrics) = run(moco, cfg, variables, extra, fns, a, b)
    queue = np.asarray(extra["queue"], np.float64).reshape(-1, D)
    close(value, info_nce(a, b, queue, 0.2))
    close(grads[0], differences(lambda x: info_nce(x, b, queue, 0.2), a))
    np.testing.assert_array_equal(grads[1], 0)  # keys carry no gradient
    nearest = (unit(a) @ queue.T).max(1) <= (unit(a) * unit(b)).sum(1)
    close(metrics["pretext_accuracy"], nearest.mean())


def test_moco_queue_starts_as_unit_vectors_and_turns():
    cfg, fns, variables, extra = moco_start()
    first = np.asarray(extra["queue"])
    assert first.shape == (3, B, D)
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), 1, rtol=1e-5)
    assert np.abs(first.reshape(-1, D).mean(0)).max() < 0.7
    kept = first.copy()
    for step in range(5):
        a, b = views(step)
        value, _, (_, extra, _) = run(moco, cfg, variables, extra, fns, a, b, step=step)
        close(value, info_nce(a, b, kept.reshape(-1, D), 0.2))  # without its own batch's keys
        kept[step % 3] = unit(b)
        np.testing.assert_allclose(extra["queue"], kept, rtol=1e-5, atol=1e-6)


def test_moco_key_encoder_follows_by_ema_and_keeps_its_statistics():
    cfg, fns, variables, extra = moco_start()
    a, b = views(2)
    _, _, (stats, extra, _) = run(moco, cfg, variables, extra, fns, a, b)
    np.testing.assert_allclose(stats["encoder"]["seen"], a.mean(), rtol=1e-5)
    np.testing.assert_allclose(extra["target"]["batch_stats"]["encoder"]["seen"], b.mean(),
                               rtol=1e-5)
    moved = {"params": {"encoder": {"w": jnp.float32(7)}, "projector": {"w": jnp.float32(0)}},
             "batch_stats": stats}
    after = moco.after_update(cfg, moved, extra, 0, 10)
    close(after["target"]["params"]["encoder"]["w"], 0.9 * 2 + 0.1 * 7)
    close(after["target"]["params"]["projector"]["w"], 0.9 * 1.5)
    assert after["target"]["batch_stats"] == extra["target"]["batch_stats"]
    assert after["queue"] is extra["queue"]


def grouped_keys(b, order, groups):
    """Keys [B, D] of an encoder that takes from each group of rows its mean, shuffled by order."""
    want = np.zeros(b.shape)
    for rows in np.split(order, groups):
        want[rows] = b[rows] - b[rows].mean(0)
    return unit(want)


@pytest.mark.parametrize("batch, groups", [(4, 2), (6, 3), (8, 4)])
def test_moco_shuffles_keys_between_groups_and_back(batch, groups):
    cfg, fns, variables, extra = moco_start(batch=batch)
    cfg.model.bn_groups = groups

    def centred(variables, x, train):  # stands for batch norm in groups
        x = x.reshape(groups, -1, D)
        return (x - x.mean(1, keepdims=True)).reshape(-1, D), {}

    fns["encoder"] = centred
    a, b = views(4, batch)
    straight = grouped_keys(b, np.arange(batch), groups)
    # 3 groups of 2: a drawn permutation. The others: a row of each of the other groups.
    orders = {4: [0, 2, 1, 3], 8: [0, 2, 1, 3, 4, 6, 5, 7]}
    key = 4  # its permutation of 6 moves rows between groups
    order = np.asarray(orders.get(batch, jax.random.permutation(jax.random.key(key), batch)))
    _, _, (_, new, _) = run(moco, cfg, variables, extra, fns, a, b, key=key)
    keys = np.asarray(new["queue"][0])
    np.testing.assert_allclose(keys, grouped_keys(b, order, groups), rtol=1e-4, atol=1e-5)
    assert np.abs(keys - straight).max() > 0.1


def test_moco_needs_a_queue():
    with pytest.raises(UserError, match="queue_batches = 0"):
        moco_start(slots=0)


def two_cosines(p1, p2, t1, t2):
    return (unit(p1) * unit(t2)).sum(1), (unit(p2) * unit(t1)).sum(1)


def byol_loss(p1, p2, t1, t2):
    c1, c2 = two_cosines(p1, p2, t1, t2)
    return (2 - 2 * c1 + 2 - 2 * c2).mean()


def simsiam_loss(p1, p2, t1, t2):
    c1, c2 = two_cosines(p1, p2, t1, t2)
    return -(c1 + c2).mean() / 2


@pytest.mark.parametrize("module, reference", [(byol, byol_loss), (simsiam, simsiam_loss)])
def test_byol_and_simsiam(module, reference):
    cfg = config(module.__name__.split(".")[-1], tau=0.99)
    fns, variables = network(encoder=1, projector=1, predictor=1)
    shift = np.array([1.0, -2.0, 0.5], np.float32)
    fns["predictor"] = lambda v, x, train: (x + shift, {})  # so that p is not z
    a, b = views(5)
    extra = module.init_extra(cfg, variables, jax.random.key(0))
    value, grads, (stats, _, metrics) = run(module, cfg, variables, extra, fns, a, b)
    close(value, reference(a + shift, b + shift, a, b))
    close(grads[0], differences(lambda x: reference(x + shift, b + shift, a, b), a))
    close(grads[1], differences(lambda x: reference(a + shift, x + shift, a, b), b))
    assert stats["encoder"]["calls"] == 2  # one pass for each view
    np.testing.assert_allclose(stats["encoder"]["seen"], b.mean(), rtol=1e-5)
    close(metrics["output_std"], unit(a).std(0).mean())


def test_byol_projects_targets_with_the_target_network():
    cfg = config("byol", tau=0.99)
    fns, variables = network(encoder=1, projector=1, predictor=1)
    fns["projector"] = lambda v, x, train: (x + v["params"]["projector"]["w"], {})
    extra = byol.init_extra(cfg, variables, jax.random.key(0))
    assert set(extra["target"]["params"]) == {"encoder", "projector"}
    extra["target"]["params"]["projector"] = {"w": jnp.float32(-3)}
    a, b = views(6)
    value, _, (_, new, _) = run(byol, cfg, variables, extra, fns, a, b)
    close(value, byol_loss(a + 1, b + 1, a - 3, b - 3))
    assert new["target"]["batch_stats"]["encoder"]["calls"] == 2


@pytest.mark.parametrize("steps, at", [(0, [0, 0, 5, 5, 15]), (20, [0, 4, 5, 9, 19])])
def test_byol_decay_and_ema(steps, at):
    cfg = config("byol", tau=0.99)
    cfg.train.steps = steps  # 0: 4 epochs of 5 steps, and tau moves once per epoch
    want = [1 - 0.01 * (np.cos(np.pi * e / 20) + 1) / 2 for e in at]
    got = [byol.decay(cfg, s, 20) for s in (0, 4, 5, 9, 19)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    _, variables = network(encoder=2, projector=1, predictor=1)
    extra = byol.init_extra(cfg, variables, jax.random.key(0))
    variables["params"]["encoder"] = {"w": jnp.float32(4)}
    after = byol.after_update(cfg, variables, extra, jnp.int32(19), 20)
    np.testing.assert_allclose(after["target"]["params"]["encoder"]["w"],
                               want[-1] * 2 + (1 - want[-1]) * 4, rtol=1e-6)
    assert after["target"]["batch_stats"] == extra["target"]["batch_stats"]


def test_simsiam_heads():
    with pytest.raises(UserError, match="layers = 0"):
        simsiam.heads(ConfigDict({"layers": 0, "hidden": 4, "dim": 4, "bottleneck": 2}))
