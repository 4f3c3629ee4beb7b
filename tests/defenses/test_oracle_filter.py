"""A perfect oracle drops or relabels exactly the dirty-label poisons, without the truth."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd import defend, parallel, poison
from jax_cl_bd.data import mentions, sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import _oracle, oracle_filter
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,badnets,defense=oracle_filter")
    cfg.attack.poisons = 40
    cfg.mesh.data = 1
    cfg.defense.oracle.error = 0.0
    return cfg


@pytest.fixture(scope="module")
def made(cfg):
    source = sources.load(cfg.data, "train")
    plan, rows = poison.make(cfg, source, sources.table(source), poison.make_trigger(cfg))
    clean = sources.Subset(source, defend.clean_rows(plan, len(source), 0.25, 0))
    return plan, Given(clean, defend.validation(cfg), Pool(source, plan, rows))


def repaired(cfg, given, folder, truth):
    mesh, source = parallel.make_mesh(cfg.mesh), sources.load(cfg.data, "train")
    suspect = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                               texts.make_tokenizer(cfg, source))
    return suspect, oracle_filter.run(cfg, [suspect], given, truth, mesh, epath.Path(folder),
                                      jax.random.key(0))


@pytest.mark.parametrize("action", oracle_filter.ACTIONS)
def test_a_perfect_oracle_catches_exactly_the_poisons(cfg, made, action):
    pool, rows = made[1].pool, np.arange(10, 190)
    settings = ConfigDict({"action": action, "sure": 0.25})
    ground = _oracle.make(cfg, made[1].clean, None, None, None)
    pairs, caught, counts = oracle_filter.filtered(settings, 32, pool, rows, ground,
                                                   np.random.default_rng(0))
    poisoned = pool.poison[rows] >= 0
    np.testing.assert_array_equal(caught, poisoned)
    assert counts == ({"dropped": poisoned.sum(), "relabelled": 0} if action == "drop"
                      else {"dropped": 0, "relabelled": poisoned.sum()})
    kept = rows[~poisoned] if action == "drop" else rows
    assert len(pairs) == len(kept)
    labels, given = pool.table(kept)[0], pool.captions(kept)
    for k, row in enumerate(kept):
        np.testing.assert_array_equal(pairs.image[k], pool[int(row)]["image"])
        if pool.poison[row] < 0:
            assert pairs.texts[k] == given[k]
        else:  # now says what is in the image, and no more what the attacker said
            named = [mentions.naming([pairs.texts[k]], name)[0] for name in pool.classes]
            assert np.flatnonzero(named).tolist() == [labels[k]] != [cfg.attack.target]
            assert mentions.naming([given[k]], pool.classes[cfg.attack.target])[0]


def test_an_unsure_oracle_drops_all_or_names_its_top_class(made):
    pool, rows = made[1].pool, np.arange(20)
    unsure = np.full((20, len(pool.classes)), 0.1, np.float32)
    unsure[:, 5], unsure[:4] = 0.2, 0  # of the first four rows it sees nothing at all
    for action, dropped in (("drop", 20), ("relabel", 4)):
        settings = ConfigDict({"action": action, "sure": 0.25})
        pairs, caught, counts = oracle_filter.filtered(settings, 32, pool, rows, lambda *_: unsure,
                                                       np.random.default_rng(0))
        assert caught.all() and len(pairs) == 20 - dropped
        assert counts == {"dropped": dropped, "relabelled": 20 - dropped}
        assert mentions.naming(pairs.texts, pool.classes[5]).all()


@pytest.mark.slow
def test_repairs_and_decides_without_the_truth(cfg, made, tmp_path):
    mine = ConfigDict(cfg.to_dict())
    mine.defense.update(action="relabel", pairs=120)
    plan, given = made
    truth = Truth(plan, cfg.attack.target, None, given.pool.poison)
    suspect, known = repaired(mine, given, tmp_path / "known", truth)
    _, blind = repaired(mine, given, tmp_path / "blind", None)
    verdict = dict(known.verdict)
    assert verdict.pop("victim_precision") == verdict.pop("victim_recall") == 1.0
    assert blind.verdict == verdict
    assert verdict["pairs"] == verdict["oracle_images"] == 120
    assert 0 < verdict["relabelled"] <= 40 and not verdict["dropped"]
    assert (verdict["action"], verdict["rate"]) == ("relabel", 3e-4)
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    moved = zip(jax.tree.leaves(suspect.pair.variables), jax.tree.leaves(known.variables))
    assert any(np.abs(np.asarray(a) - b).max() > 0 for a, b in moved)
    assert [(p.rate, p.step) for p in known.points] == [(3e-4, 1), (3e-4, 2)]
    # The same command over a finished folder computes nothing anew and says the same.
    _, same = repaired(mine, given, tmp_path / "known", truth)
    assert same.verdict == known.verdict
    jax.tree.map(np.testing.assert_array_equal, same.variables, known.variables)


def test_scores_say_none_where_nothing_can_be_said():
    none, some = np.zeros(4, bool), np.array([True, False, True, False])
    assert oracle_filter._score(some, np.array([True, True, False, True])) == {
        "victim_precision": 1 / 3, "victim_recall": 1 / 2}
    assert oracle_filter._score(none, some) == {"victim_precision": 0.0, "victim_recall": None}
    assert oracle_filter._score(some, none) == {"victim_precision": None, "victim_recall": 0.0}


def test_bad_settings_are_refused(cfg, made, tmp_path):
    oracle_filter.check(cfg, 50)
    for changes, says in (({"action": "drp"}, "drop"), ({"sure": 0.0}, "sure"),
                          ({"pairs": 15}, "pairs=15"), ({"oracle.error": 1.0}, "error"),
                          ({"rates": (1e-3, 1e-4)}, "ascending")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            oracle_filter.check(mine, 50)
    mine = ConfigDict(cfg.to_dict())
    mine.defense.oracle.name = "classifier"
    with pytest.raises(UserError, match="15 clean images with labels are fewer"):
        oracle_filter.check(mine, 15)
    mine = ConfigDict(cfg.to_dict())
    mine.defense.pairs = 201
    with pytest.raises(UserError, match="trained on 200"):
        repaired(mine, made[1], tmp_path, None)
    mine.defense.update(pairs=20, action="drop")
    mine.defense.oracle.error = 0.99  # almost every class is said to be another
    with pytest.raises(UserError, match="of 20 pairs, fewer than"):
        repaired(mine, made[1], tmp_path, None)
