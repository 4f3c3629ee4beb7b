"""SafeCLIP's losses, rings and split against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import safe_split, safeclip
from tests.objectives import tiny_pair
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import identities

B, D, SLOTS, ROWS = 6, 4, 2, 9
T = np.float32(1.5)
INDEX = np.array([8, 0, 3, 5, 1, 7], np.int32)
SAFE = np.array([1, 1, 0, 1, 0, 0, 0, 0, 1], bool)  # of the rows, so of the batch 1 1 1 0 1 0


def config(**fields):
    return ConfigDict({"objective": {
        "name": "safeclip", "dim": D, "image_projection": True, "scale_init": 2.0,
        "queue_batches": SLOTS, "uni_steps": 2, "cross_steps": 2, "cross_rate": 0.1,
        "epoch_steps": 3, "safe_from": 0.9, "grow": 0.01, "top": 0.85, "rows": ROWS, **fields},
        "train": {"batch_size": B, "steps_per_dispatch": 1}})


def views(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(B, D)).astype(np.float32)
            for name in ("view1", "view2", "tokens2", "tokens3")}


def start(key=0):
    extra = safeclip.init_extra(config(), None, jax.random.key(key))
    return {**extra, "safe": jnp.asarray(SAFE)}


def loss(v, t, extra, step):
    fns, stats = identities()
    variables = {"params": {"scale": {"logit_scale": t}}, "batch_stats": stats}
    value, (_, extra, metrics) = safeclip.loss(
        config(), variables, extra, {**v, "tokens": None, "index": INDEX}, fns, None, step)
    return value, (extra, metrics)


def rows_of(a, b, t, rows):
    """-log softmax of the own pair among the given rows alone, one at a time; 0 of other rows."""
    s, out = np.exp(t) * unit(a) @ unit(b).T, np.zeros(B)
    for i in rows:
        out[i] = np.log(sum(np.exp(s[i, j]) for j in rows)) - s[i, i]
    return out


def nearest(z, ring):
    pool = np.float64(ring).reshape(-1, D)
    return np.stack([pool[max(range(len(pool)), key=lambda b: pool[b] @ row)] for row in unit(z)])


def wanted(v, t, extra, safe):
    i1, i2, t1, t2 = (np.float64(v[name]) for name in ("view1", "view2", "tokens2", "tokens3"))
    risky, safe = np.flatnonzero(~safe), np.flatnonzero(safe)
    near = [nearest(z, extra[name]["queue"]) for z, name in ((i1, "image"), (t1, "text"))]
    return (rows_of(i2, near[0], t, risky) + rows_of(t2, near[1], t, risky)
            + rows_of(i1, t2, t, safe) + rows_of(t1, i2, t, safe)).sum() / 2 / B


@pytest.mark.parametrize("step, safe", [(1, np.zeros(B, bool)), (2, np.ones(B, bool)),
                                        (4, SAFE[INDEX]), (5, SAFE[INDEX])])
def test_value_gradient_and_rings(step, safe):
    v, extra = views(step), start()
    (value, (new, metrics)), grads = jax.jit(jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True))(v, T, extra, step)
    np.testing.assert_allclose(value, wanted(v, T, extra, safe), rtol=1e-5)
    np.testing.assert_allclose(metrics["safe_rows"], safe.mean())
    for name in v:
        def of(z, name=name):  # neighbours are constants: those of the point itself
            return (wanted({**v, name: z}, T, extra, safe) if safe.all() or name not in
                    ("view1", "tokens2") else _held(v, name, z, extra, safe))
        want = differences(of, v[name])
        np.testing.assert_allclose(grads[0][name], want, rtol=2e-3,
                                   atol=2e-4 * max(np.abs(want).max(), 1e-3))
    np.testing.assert_allclose(grads[1], differences(lambda t: wanted(v, t, extra, safe), T),
                               rtol=1e-3)
    for name, z in (("image", v["view1"]), ("text", v["tokens2"])):  # looked up first, then written
        ring = np.array(extra[name]["queue"])
        ring[step % SLOTS, ~safe] = unit(z)[~safe]
        np.testing.assert_allclose(new[name]["queue"], ring, atol=1e-6)
    np.testing.assert_array_equal(new["safe"], SAFE)


def _held(v, name, z, extra, safe):
    """The loss where view 1 moves and its neighbours in the rings do not."""
    other, key = ("tokens3", "view1") if name == "view1" else ("view2", "tokens2")
    rows = np.flatnonzero(safe)
    return (wanted(v, T, extra, safe) + (rows_of(z, v[other], T, rows)
                                         - rows_of(v[key], v[other], T, rows)).sum() / 2 / B)


def test_logits_are_float32_where_the_towers_are_not():
    v = {name: jnp.asarray(x, jnp.bfloat16) for name, x in views(0).items()}
    program = str(jax.make_jaxpr(loss)(v, T, start(), 4))
    assert "f32[6,6] = dot_general" in program and "bf16[6,6]" not in program


def test_eight_devices_equal_one():
    cfg = config(rows=16)
    cfg.train.batch_size = 16
    tiny_pair.eight_devices_equal_one(safeclip, cfg, (0, 2, 5))


def test_the_update_is_small_while_towers_first_meet():
    scales = [float(safeclip.update_scale(config(), step)) for step in range(6)]
    np.testing.assert_allclose(scales, [1, 1, 0.1, 0.1, 1, 1])


def test_split_takes_the_component_of_larger_mean():
    rng = np.random.default_rng(0)
    c = np.concatenate([rng.normal(0.1, 0.05, 300), rng.normal(0.6, 0.1, 700)])
    p, figures = safe_split.posterior(np.float32(c))
    assert (p[:300] > 0.9).mean() < 0.01 and (p[300:] > 0.9).mean() > 0.97
    np.testing.assert_allclose([figures["low"], figures["high"], figures["high_weight"]],
                               [0.1, 0.6, 0.7], atol=0.02)
    density = [w * np.exp(-0.5 * ((0.3 - m) / s)**2) / s for w, m, s in
               ((0.3, 0.1, 0.05), (0.7, 0.6, 0.1))]  # of the true mixture, at one place
    between = np.append(np.float32(c), np.float32(0.3))
    np.testing.assert_allclose(safe_split.posterior(between)[0][-1], density[1] / sum(density),
                               atol=0.2)
    again, _ = safe_split.posterior(np.float32(c))
    np.testing.assert_array_equal(p, again)
    np.testing.assert_array_equal(safe_split.first(p, 0.9), p > 0.9)


def test_pairs_that_match_least_are_never_safe():
    """A wide upper component would reach around a narrow lower one."""
    rng = np.random.default_rng(1)
    c = np.concatenate([rng.normal(0.3, 0.01, 500), rng.normal(0.6, 0.25, 500)])
    c[0] = -0.4
    p, figures = safe_split.posterior(c)
    assert p[0] == 0 and (p[c < figures["low"]] == 0).all() and (p > 0.9).any()


def test_later_sets_take_the_highest_posteriors_and_of_equal_ones_the_highest_cosines():
    p, c = np.array([1.0, 0.2, 1.0, 0.7, 1.0]), np.array([0.5, 0.9, 0.8, 0.1, 0.6])
    for ratio, rows in ((0.4, [2, 4]), (0.6, [0, 2, 4]), (0.8, [0, 2, 3, 4]), (0.0, [])):
        np.testing.assert_array_equal(np.flatnonzero(safe_split.top(p, c, ratio)), rows)


@pytest.mark.parametrize("fields, says", [
    ({"uni_steps": -1}, "uni_steps = -1"), ({"queue_batches": 0}, "queue_batches = 0"),
    ({"cross_rate": 1.5}, r"cross_rate = 1.5; must lie in \[0, 1\]"), ({"top": -0.1}, "top")])
def test_bad_settings_are_refused(fields, says):
    with pytest.raises(UserError, match=says):
        safeclip.heads(config(**fields).objective)


def test_a_plan_that_does_not_fit_is_refused():
    safeclip.check_steps(config(), 5)
    with pytest.raises(UserError, match="leave none of the 4 steps"):
        safeclip.check_steps(config(), 4)
    cfg = config()
    cfg.train.steps_per_dispatch = 2
    with pytest.raises(UserError, match="every 3 .*multiples of train.steps_per_dispatch=2"):
        safeclip.check_steps(cfg, 9)
