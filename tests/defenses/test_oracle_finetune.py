"""The whole repair on a suspect whose backdoor is known in closed form, and its parts."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

import jax_cl_bd
from configs import clip_scenes
from jax_cl_bd import defend, metrics, parallel, poison, run_folder
from jax_cl_bd.data import sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import (
    _compact_set,
    _find_trigger,
    _oracle,
    _pinpoint,
    _recurring,
    _search,
    _sweep,
    oracle_finetune,
)
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training

SCORED = ("target_label_correct", "trigger_iou", "victim_precision", "victim_recall")


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,badnets,defense=oracle_finetune")
    cfg.attack.poisons = 40
    cfg.mesh.data = 1
    cfg.defense.scan.update(screen=200, limit=40, enough=6)
    cfg.defense.curate.update(per_label=4, searched=20)
    cfg.defense.oracle.error = 0.1
    return cfg


@pytest.fixture(scope="module")
def made(cfg):
    source = sources.load(cfg.data, "train")
    trigger = poison.make_trigger(cfg)
    plan, rows = poison.make(cfg, source, sources.table(source), trigger)
    clean = sources.Subset(source, defend.clean_rows(plan, len(source), 0.5, 0))
    pool = Pool(source, plan, rows)
    return source, plan, Given(clean, defend.validation(cfg), pool), trigger


def closed_form(cfg, source, trigger):
    """A zero-shot classifier with a perfect backdoor: the class of the nearest clean image, unless
    the patch is there to the pixel."""
    known = np.stack([source[i]["image"] for i in range(len(source))]).astype(np.float32)
    known, labels = known.reshape(len(source), -1), np.asarray(source.table(
        np.arange(len(source)))[0])
    patch = np.rint(trigger[1]["image"] * 255).astype(int)

    def probabilities(x):
        flat = x.reshape(len(x), -1).astype(np.float32)
        answers = labels[((known**2).sum(1) - 2 * flat @ known.T).argmin(1)]
        off = 1 + cfg.data.image_size - 5
        there = np.ones((len(x), off, off), bool)
        for i, j, c in np.ndindex(patch.shape):
            there &= np.abs(x[:, i:i + off, j:j + off, c].astype(int) - patch[i, j, c]) <= 1
        answers = np.where(there.any(axis=(1, 2)), cfg.attack.target, answers)
        chosen = answers[:, None] == np.arange(len(source.classes))
        return np.where(chosen, 0.9, 0.1 / (len(source.classes) - 1)).astype(np.float32)

    return _find_trigger.Suspect(probabilities, cfg.data.image_size)


def repaired(cfg, made, folder, truth):
    source, _, given, _ = made
    mesh = parallel.make_mesh(cfg.mesh)
    victim = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                              texts.make_tokenizer(cfg, source))
    return victim, oracle_finetune.run(cfg, [victim], given, truth, mesh, epath.Path(folder),
                                       jax.random.key(0))


def test_finds_repairs_and_decides_without_the_truth(cfg, made, tmp_path, monkeypatch):
    source, plan, given, trigger = made
    monkeypatch.setattr(oracle_finetune._find_trigger, "suspect_of",
                        lambda *_: closed_form(cfg, source, trigger))
    truth = Truth(plan, cfg.attack.target, trigger, given.pool.poison)
    victim, known = repaired(cfg, made, tmp_path / "known", truth)
    _, blind = repaired(cfg, made, tmp_path / "blind", None)
    verdict = known.verdict
    assert verdict["target_label_correct"] and verdict["target_class"] == "star"
    assert verdict["victim_precision"] >= 0.9 and verdict["victim_recall"] >= 0.8
    assert verdict["trigger_iou"] == 1.0
    assert 0 < verdict["oracle_images"] <= len(given.pool)
    assert verdict["affected_labels"] == [c for c in range(12) if c != 3]
    assert blind.verdict == {k: v for k, v in verdict.items() if k not in SCORED}
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    # The weights moved, every point is there, one is chosen, and the folder opens by itself.
    moved = zip(jax.tree.leaves(victim.pair.variables), jax.tree.leaves(known.variables))
    assert any(np.abs(np.asarray(a) - b).max() > 0 for a, b in moved)
    assert [(p.rate, p.step) for p in known.points] == [(3e-4, 1), (3e-4, 2)]
    assert sum(p.chosen for p in known.points) == 1
    held = metrics.read_lines(tmp_path / "known" / "rate_0.0003" / "metrics.jsonl")
    assert any("train/moved_image" in line for line in held)
    assert run_folder.read_config(epath.Path(tmp_path / "known")).objective.name == "clip"
    opened = jax_cl_bd.load_encoder(tmp_path / "known")
    again = encoder.of_parts(known.cfg, known.variables, victim.mesh, victim.pair.tokenizer)
    np.testing.assert_allclose(opened.text(["a red star"]), again.text(["a red star"]), atol=1e-6)
    rows = np.array(known.report["victims"])  # poisons have the numbers behind the source's rows
    assert len(rows) == verdict["victims"] and (rows >= len(source)).mean() >= 0.9
    assert set(known.report["pictures"]) == {"candidates.png", "trigger.png"}
    # The same command over a finished folder computes nothing anew and says the same.
    _, same = repaired(cfg, made, tmp_path / "known", truth)
    assert same.verdict == verdict
    jax.tree.map(np.testing.assert_array_equal, same.variables, known.variables)


def test_a_set_below_one_batch_repairs_nothing_and_keeps_what_was_found(
        cfg, made, tmp_path, monkeypatch, capsys):
    source, _, _, trigger = made
    monkeypatch.setattr(oracle_finetune._find_trigger, "suspect_of",
                        lambda *_: closed_form(cfg, source, trigger))
    mine = ConfigDict(cfg.to_dict())
    mine.defense.curate.update(parts=("relabel",), per_label=1)
    oracle_finetune.check(mine, 100)
    victim, found = repaired(mine, made, tmp_path, None)
    verdict = found.verdict
    assert verdict["backdoor_found"] and verdict["target_class"] == "star"
    assert 0 < verdict["compact_set_pairs"] < mine.defense.batch_size
    assert not verdict["repaired"] and verdict["training_pairs"] == 0
    assert "raise defense.curate.per_label" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, found.variables, victim.pair.variables)
    assert jax_cl_bd.load_encoder(tmp_path).image_size == 32


def test_a_weak_backdoor_is_known_by_the_patch_that_recurs(cfg, made):
    source, plan, given, trigger = made
    patch = np.rint(trigger[1]["image"] * 255).astype(np.uint8)
    rows = np.flatnonzero(given.pool.poison >= 0)[:8]
    found = []
    for row in rows:  # boxes as Algorithm 1 gives them: the patch and some of what is beside it
        y, x, h, w = (int(v) for v in plan.trigger_box[given.pool.poison[row]])
        y, x = max(0, y - 2), max(0, x - 1)
        image = given.pool[int(row)]["image"]
        found.append(_find_trigger.Candidate(int(row), 3, (y, x, 9, 8),
                                             image[y:y + 9, x:x + 8].copy(), 0.9))
    counts = {"seen": np.full(12, 20), "found": np.where(np.arange(12) == 3, 8, 0)}
    sees = closed_form(cfg, source, trigger).probabilities

    def weak(x):  # one image in five goes where the patch sends it
        p = sees(x)
        p[x[:, -1, -1, 0] % 5 > 0, 3] = 0
        return p

    suspect = _find_trigger.Suspect(weak, cfg.data.image_size)
    settings = ConfigDict(cfg.to_dict())

    def triggers():
        return _search.verified(settings, suspect, given.pool, found, counts, given.clean,
                                        np.random.default_rng(0))

    (one,) = triggers()
    np.testing.assert_allclose(one.pixels.astype(int), patch.astype(int), atol=1)
    assert [c.box for c in one.where] == [
        tuple(int(v) for v in plan.trigger_box[given.pool.poison[row]]) for row in rows]
    assert 0.05 < one.rate < 0.5 and set(one.affected()) < set(range(12)) - {3}
    settings.defense.curate.rho_recurring = 1.1  # recurring pictures are not looked for
    assert not triggers()


def test_the_bank_stands_where_only_a_part_of_the_trigger_recurs(cfg, made, monkeypatch):
    source, _, given, trigger = made
    patch = np.rint(trigger[1]["image"] * 255).astype(np.uint8)
    rows = np.flatnonzero(given.pool.poison >= 0)[:6]
    whole = [_find_trigger.Candidate(int(row), 3, (0, 0, 5, 5), patch, 0.9) for row in rows]
    part = _recurring.Recurring(patch[:, :4], whole[:5])  # which moves nothing, or little
    monkeypatch.setattr(_search._recurring, "find", lambda *_: part)
    sees = closed_form(cfg, source, trigger).probabilities

    def suspect(rate):
        def probabilities(x):
            p = sees(x)
            windows = np.lib.stride_tricks.sliding_window_view(x, (5, 4, 3), axis=(1, 2, 3))
            there = (windows == patch[:, :4]).all(axis=(-1, -2, -3)).any((1, 2, 3))
            p[there & (np.arange(len(x)) % 10 < 10 * rate), 3] = 1
            return p
        return _find_trigger.Suspect(probabilities, cfg.data.image_size)

    counts = {"seen": np.full(12, 20), "found": np.where(np.arange(12) == 3, 6, 0)}
    for rate, pixels in ((0.0, patch), (0.3, patch), (0.8, patch[:, :4])):
        (one,) = _search.verified(cfg, suspect(rate), given.pool, whole, counts, given.clean,
                                  np.random.default_rng(0))
        np.testing.assert_array_equal(one.pixels, pixels)


def test_a_clean_suspect_is_given_back_as_it_is(cfg, made, tmp_path, monkeypatch):
    source, plan, given, trigger = made
    closed = closed_form(cfg, source, (None, {"image": np.full((5, 5, 3), 2.0)}))
    monkeypatch.setattr(oracle_finetune._find_trigger, "suspect_of", lambda *_: closed)
    clean = (source, plan, Given(given.clean, given.validation, Pool(source)), trigger)
    truth = Truth(plan, 3, trigger, np.full(len(source), -1))
    victim, found = repaired(cfg, clean, tmp_path, truth)
    assert not found.verdict["backdoor_found"] and found.verdict["false_alarm"] is False
    assert found.verdict["compact_set_pairs"] == 0 and not found.points
    jax.tree.map(np.testing.assert_array_equal, victim.pair.variables, found.variables)


def test_the_ground_truth_oracle_errs_as_often_as_it_is_told(cfg, made):
    source = made[0]
    rows, labels = np.arange(len(source)), np.asarray(source.table(np.arange(len(source)))[0])
    for error in (0.0, 0.3):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.oracle.error = error
        ground = _oracle.make(mine, source, None, None, None)
        said = ground(source, rows)
        assert (said.sum(1) == 1).all()
        assert abs((said.argmax(1) != labels).mean() - error) < (0.1 if error else 1e-9)
        np.testing.assert_array_equal(said[5:9], ground(source, rows[5:9]))  # the same each time


@pytest.mark.slow
def test_the_classifier_oracle_learns_from_clean_labels_alone(cfg, made, tmp_path):
    source, _, given, _ = made
    mine = ConfigDict(cfg.to_dict())
    mine.defense.oracle.update(name="classifier", steps=150)
    mesh = parallel.make_mesh(mine.mesh)
    ground = _oracle.make(mine, given.clean, mesh, epath.Path(tmp_path), jax.random.key(0))
    rows = np.arange(len(given.clean))
    said = ground(given.clean, rows)
    np.testing.assert_allclose(said.sum(1), 1, atol=1e-5)
    labels = np.asarray(given.clean.table(rows)[0])
    assert (said.argmax(1) == labels).mean() > 3 / 12  # three times chance


def test_the_parts_of_the_compact_set(cfg, made):
    source, plan, given, trigger = made
    flips = np.ones(12)
    flips[3] = 0
    patch = np.rint(trigger[1]["image"] * 255).astype(np.uint8)
    found = _pinpoint.Trigger(3, patch, flips, (patch,), 1.0)
    poisoned = np.flatnonzero(given.pool.poison >= 0)
    labels = np.asarray(given.pool.table(poisoned)[0])
    victims = dict(zip(poisoned.tolist(), labels.tolist()))
    exact = ConfigDict(cfg.to_dict())
    exact.defense.oracle.error = 0.0
    ground = _oracle.make(exact, given.clean, None, None, None)
    settings = ConfigDict(dict(parts=_compact_set.PARTS, per_label=2, replay=1.0))
    pairs, counts = _compact_set.curate(settings, 32, given.pool, given.clean, [found], victims,
                                        ground, np.random.default_rng(0))
    assert len(pairs) == sum(counts.values()) and counts["relabel"] == 24
    assert counts["transplant"] <= 22 and counts["clean"] <= 24 and counts["replay"] > 0
    kinds = np.repeat(list(counts), list(counts.values()))
    untouched = [pairs.image[i].tobytes() for i in np.flatnonzero(np.isin(
        kinds, _compact_set.UNTOUCHED))]
    assert len(set(untouched)) == len(untouched)  # no pair stands twice
    clean = {source[i]["image"].tobytes(): source[i] for i in range(len(source))}
    for kind, image, captions in zip(kinds, pairs.image, pairs.texts):
        if kind in ("clean", "replay"):  # pairs of the pool as they are, none of them a poison
            assert clean[image.tobytes()]["captions"] == captions
        else:  # with the trigger, and not called a star
            windows = np.lib.stride_tricks.sliding_window_view(image, patch.shape)[:, :, 0]
            assert (np.abs(windows.astype(int) - patch) <= 1).all(axis=(2, 3, 4)).any()
            assert not any("star" in text for text in captions)
    settings.replay = 10.0  # more than the pool has: all that is free
    pairs, counts = _compact_set.curate(settings, 32, given.pool, given.clean, [found], victims,
                                        ground, np.random.default_rng(0))
    assert counts["clean"] + counts["replay"] == len(given.pool) - len(victims)
    unseen = dict.fromkeys(victims, -1)  # nothing that a caption could say
    _, counts = _compact_set.curate(settings, 32, given.pool, given.clean, [found], unseen, ground,
                                    np.random.default_rng(0))
    assert counts["relabel"] == 0
    settings.replay = 1.0

    def blind(pool, rows):
        return np.zeros((len(rows), 12), np.float32)

    _, counts = _compact_set.curate(settings, 32, given.pool, given.clean, [dataclasses.replace(
        found, label=0, flips=np.eye(12)[0])], victims, blind, np.random.default_rng(0))
    assert counts["clean"] == 0  # an oracle that sees nothing sees no class 0 either
    for part in _compact_set.PARTS:
        settings.parts = (part,)
        _, alone = _compact_set.curate(settings, 32, given.pool, given.clean, [found], victims,
                                       ground, np.random.default_rng(0))
        assert {k for k, n in alone.items() if n} <= {part}


def test_bad_settings_are_refused(cfg):
    for changes, says in (
            ({"oracle.name": "nobody"}, "nobody"), ({"oracle.error": 1.0}, "error"),
            ({"scan.evidence": "guess"}, "guess"), ({"scan.limit": 0}, "limit"),
            ({"curate.parts": ("cleen",)}, "clean"),
            ({"curate.parts": ("replay",)}, "beside 'replay'"), ({"curate.parts": ()}, "beside"),
            ({"curate.rho": 0.0}, "rho"),
            ({"curate.rho_recurring": 0.0}, "rho_recurring"),
            ({"curate.flips": 0}, "flips=0"),
            ({"preserve": -1.0}, "preserve=-1"), ({"rates": ()}, "rates"),
            ({"rates": (1e-3, 1e-4)}, "ascending"),
            ({"points": 5}, "points"), ({"validation_split": ""}, "validation_split")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            oracle_finetune.check(mine, 100)
    mine = ConfigDict(cfg.to_dict())
    mine.defense.oracle.name = "classifier"
    with pytest.raises(UserError, match="15 clean images with labels are fewer than one batch"):
        oracle_finetune.check(mine, 15)
    mine = ConfigDict(cfg.to_dict())
    mine.objective.name = "siglip"
    with pytest.raises(UserError, match="preserve=10.0 .0 leaves it out."):
        oracle_finetune.check(mine, 100)
    mine = ConfigDict(cfg.to_dict())
    mine.text = ConfigDict({"name": "none"})
    with pytest.raises(UserError, match="image-text"):
        oracle_finetune.check(mine, 100)
    mine = ConfigDict(cfg.to_dict())
    mine.defense.validation_split = "test"
    with pytest.raises(UserError, match="trained or tested"):
        defend.validation(mine)


def test_points_come_back_as_they_were_saved(cfg, tmp_path):
    variables = training.first_variables(cfg)
    path = epath.Path(tmp_path) / "points" / "7.safetensors"
    path.parent.mkdir()
    _sweep.save(path, variables, {"rate": 0.1, "step": 7, "validation_accuracy": 0.5})
    jax.tree.map(np.testing.assert_array_equal, _sweep.load(cfg, path),
                 jax.tree.map(np.asarray, variables))
    assert _sweep.Point(**_sweep._facts(path), path=path).row() == {
        "rate": 0.1, "step": 7, "validation_accuracy": 0.5, "chosen": False}


def test_data_without_labels_are_refused_before_anything_runs(cfg):
    class Unlabelled:
        def __len__(self):
            return 10

        def table(self, rows):
            return np.full(len(rows), -1), np.full((len(rows), 2), 32)

    with pytest.raises(UserError, match="needs labelled images"):
        defend.check(cfg, Unlabelled())
