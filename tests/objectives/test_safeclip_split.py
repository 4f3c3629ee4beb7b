"""SafeCLIP in the loop: what the split sees, when it is made, and that a resume repeats it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from etils import epath

from configs import clip_scenes
from jax_cl_bd import checkpoint, optim, parallel
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import feed, sources, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.models import pair
from jax_cl_bd.objectives import safe_split, safeclip, training
from jax_cl_bd.train import born_sharded, fit
from tests.objectives import tiny_pair
from tests.objectives.reference import unit

STEPS = 8
DUE = (3, 5, 7)  # after 2 + 1 steps, then every 2


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair, "modules_of", tiny_pair.modules_of)
        yield


def config(**data):
    cfg = clip_scenes.get_config("debug,objective=safeclip")
    cfg.data.update(scenes_train=40, **data)
    cfg.objective.update(uni_steps=2, cross_steps=1, epoch_steps=2, safe_from=0.9)
    cfg.train.update(batch_size=8, save_every=1, log_every=1, steps=STEPS)
    return cfg


def setup(cfg):
    source = sources.load(cfg.data, "train")
    plan = Plan.make(3, replaces=np.array([4, 9, -1]), removed=np.array([7]), canvas=(32, 32),
                     caption=np.array(["a photo of a star.", "", "a red heart"]))
    rows = {"image": np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8),
            "size": np.full((3, 2), 32, np.int32), "extent": np.full((3, 2), 32, np.int32)}
    dataset = PoisonedSet(source, plan, rows, texts.of(cfg, texts.make_tokenizer(cfg, source),
                                                       source))
    own = training.sized(cfg, rows=len(dataset.pair), steps_per_epoch=1)
    assert own.objective.rows == 43 and own.objective.epoch_steps == 2
    tx, _ = optim.make(cfg.optim, STEPS, 1)
    mesh = parallel.one_device()
    state, shardings = born_sharded(training.make_init(own, tx), jax.random.key(0), mesh)
    return own, dataset, feed.make(own, dataset), tx, mesh, state, shardings


def run(folder, steps, cfg=None, watch=None):
    own, _, rows, tx, mesh, state, shardings = setup(cfg or config())
    refresh = training.make_refresh(own, rows, mesh)

    def seen(state, data, step):
        new = refresh(state, data, step)
        if watch is not None and new is not state:
            watch.append((step, np.array(new.extra["safe"]), float(new.extra["split"]["rho"])))
        return new

    return fit(training.make_step(own, tx, STEPS), state, shardings, rows,
               folder=epath.Path(folder), steps=steps, cfg_train=cfg.train if cfg else own.train,
               mesh=mesh, label="test", refresh=seen)


def same(a, b):
    a, b = ((s.params, s.batch_stats, s.opt_state, s.extra) for s in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits_wherever_it_was_killed(tmp_path):
    seen = []
    whole = run(tmp_path / "whole", STEPS, watch=seen)
    assert tuple(step for step, *_ in seen) == DUE
    assert not np.array_equal(seen[0][1], seen[-1][1])  # each split is another, or all are moot
    again = []
    stopped = run(tmp_path / "six", 6)  # the second split lies in the checkpoint
    np.testing.assert_array_equal(stopped.extra["safe"], seen[1][1])
    same(run(tmp_path / "six", STEPS, watch=again), whole)
    assert [step for step, *_ in again] == [7]
    child = subprocess.run([sys.executable, "-c", "from tests.objectives import "
                            "test_safeclip_split as t; t.die_while_splitting()",
                            str(tmp_path / "killed")], cwd=Path(__file__).parents[2])
    assert child.returncode == -signal.SIGKILL
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "killed" / "checkpoints")) == 5
    same(run(tmp_path / "killed", STEPS, watch=again), whole)
    assert [step for step, *_ in again] == [7, 5, 7]


def die_while_splitting():
    """Trains in the folder that the command names, and is killed in the middle of the second split.
    """
    calls, posterior = [], safe_split.posterior

    def shot(cosines):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return posterior(cosines)

    flags.FLAGS.mark_as_parsed()
    pair.modules_of, safe_split.posterior = tiny_pair.modules_of, shot
    run(sys.argv[-1], STEPS)


def test_split_is_of_plain_rows_in_test_mode_and_the_ratio_grows():
    cfg = config()
    cfg.objective.grow = 0.1
    own, dataset, rows, _, mesh, state, _ = setup(cfg)
    refresh = training.make_refresh(own, rows, mesh)
    state = state.replace(batch_stats=jax.tree.map(lambda x: x + 0.3, state.batch_stats))
    data = parallel.put_replicated(mesh, rows.data)
    for step in (0, 2, 4):
        assert refresh(state, data, step) is state
    c = by_hand(dataset, state)
    p, figures = safe_split.posterior(c)
    first = refresh(state, data, 3)
    safe = np.zeros(43, bool)
    safe[dataset.kept[p > 0.9]] = True
    np.testing.assert_array_equal(first.extra["safe"], safe)
    assert 0 < safe.sum() < 40 and not safe[[4, 7, 9]].any()  # rows that are not trained on
    rho = float(first.extra["split"]["rho"])
    np.testing.assert_allclose(rho, safe.sum() / 40, rtol=1e-6)
    np.testing.assert_allclose(first.extra["split"]["high"], figures["high"], rtol=1e-3)
    second = refresh(first, data, 5)
    rho = min(rho + 0.1, 0.85)
    best = dataset.kept[np.lexsort((-c, -p))[:round(40 * rho)]]
    assert set(np.flatnonzero(second.extra["safe"])) == set(best)
    np.testing.assert_allclose(second.extra["split"]["rho"], rho, rtol=1e-6)
    assert len(jax.tree.leaves(second)) == len(jax.tree.leaves(state))


def by_hand(dataset, state):
    """Mean cosine of every row that is trained on, in NumPy."""
    p = jax.tree.map(np.float64, state.params)
    stats = state.batch_stats["encoder"]["BatchNorm_0"]
    found = []
    for row in dataset.kept:
        k, item = row - dataset.n_source, dataset.item(row, 32)
        item = {name: dataset.rows[name][k] for name in dataset.rows} if k >= 0 else item
        x = ((item["image"] / 255 - 0.5) / 0.25).mean((0, 1))
        norm, dense = p["encoder"]["BatchNorm_0"], p["encoder"]["Dense_0"]
        x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
        image = np.tanh(x @ dense["kernel"] + dense["bias"])
        image = image @ p["image_projection"]["dense"]["kernel"]
        tokens = item["tokens"][:item["count"]]
        assert len(tokens) == (1 if k in (0, 2) else 4)
        text = p["text"]["Embed_0"]["embedding"][tokens].mean(1)
        text = text @ p["text_projection"]["dense"]["kernel"]
        found.append((unit(text) @ unit(image[None])[0]).mean())
    return np.array(found)


@pytest.mark.slow
def test_a_streamed_feed_gives_the_same_split_and_steps(tmp_path):
    resident, streamed = [], []
    run(tmp_path / "resident", 6, config(), watch=resident)
    run(tmp_path / "streamed", 6, config(feed="streamed"), watch=streamed)
    for one, other in zip(resident, streamed, strict=True):
        assert one[0] == other[0]
        np.testing.assert_array_equal(one[1], other[1])


def test_views_are_drawn_twice_by_the_augmenting_recipe():
    cfg = config()
    own, _, rows, _, mesh, _, _ = setup(cfg)
    batch, _ = next(rows.everything(8))
    made = training.make_views(own)(rows.data, batch, jax.random.key(0))
    clip = clip_scenes.get_config("debug")
    clip.augment = cfg.augment
    plain = training.make_views(clip)(rows.data, batch, jax.random.key(0))
    np.testing.assert_array_equal(made["view2"], plain["view2"])
    assert (np.asarray(made["view1"]) != np.asarray(plain["view1"])).any()
    assert (np.asarray(made["view1"]) != np.asarray(made["view2"])).any()
    assert (np.asarray(made["tokens2"]) != np.asarray(made["tokens3"])).any()
    assert safeclip.TEXT_AUGMENT == cfg.data.text_augment
