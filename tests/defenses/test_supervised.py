"""Supervised fine-tuning: the tower moves, the text is gone, the head answers and is measured."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

import jax_cl_bd
from jax_cl_bd import evaluate, metrics, poison
from jax_cl_bd.data import sources
from jax_cl_bd.defenses import _classifier, _sweep, front, supervised
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    cfg = small_repair.config("supervised")
    cfg.data.scenes_validation = 40
    cfg.defense.rates = (3e-4, 1e-3)
    cfg.evals.update(probes=("zero_shot", "linear_probe", "retrieval"), placements=("random",))
    return cfg


@pytest.fixture(scope="module")
def tuned(cfg, tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    return folder, *small_repair.run(supervised, cfg, folder, small_repair.truth())


def by_hand(suspect, variables, features):
    """Projection and head in NumPy."""
    params = jax.tree.map(np.asarray, variables["params"])
    z = features @ params["image_projection"]["dense"]["kernel"]
    return (z @ params["classes"]["dense"]["kernel"] + params["classes"]["dense"]["bias"]).argmax(1)


@pytest.mark.slow
def test_the_vision_weights_move_and_the_truth_changes_nothing(cfg, tuned, tmp_path):
    folder, suspect, known = tuned
    _, blind = small_repair.run(supervised, cfg, tmp_path / "blind")
    assert known.verdict == blind.verdict and known.verdict["clean_images"] == 40
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    assert set(known.variables["params"]) == {"encoder", "image_projection", "classes"}
    for part in ("encoder", "image_projection"):
        both = zip(jax.tree.leaves(suspect.pair.variables["params"][part]),
                   jax.tree.leaves(known.variables["params"][part]))
        assert all(np.abs(np.asarray(a) - b).max() > 1e-6 for a, b in both), part
    assert [(p.rate, p.step) for p in known.points] == [(3e-4, 1), (3e-4, 2), (1e-3, 1), (1e-3, 2)]
    # The folder opens by itself, as an encoder of images; once more computes nothing anew.
    opened = jax_cl_bd.load_encoder(folder)
    assert opened.text is None
    _, same = small_repair.run(supervised, cfg, folder)
    assert same.verdict == known.verdict
    jax.tree.map(np.testing.assert_array_equal, same.variables, known.variables)


def test_the_first_loss_is_the_cross_entropy_of_the_suspects_features(cfg, tuned):
    """The loss on record at step 1, from the suspect's features and the first head by NumPy."""
    folder, suspect, _ = tuned
    modules = supervised._modules(cfg, 12)
    start = supervised._start(suspect, modules, jax.random.split(jax.random.key(0))[0])
    source = sources.load(cfg.data, "train")
    rows = next(_classifier.Feed(_sweep.described(textless(cfg)), source).batches(0))["index"]
    x = np.stack([source[int(r)]["image"] for r in rows]).astype(np.float32) / 255
    x = (x - np.float32(cfg.data.mean)) / np.float32(cfg.data.std)
    tower = {kind: start[kind]["encoder"] for kind in start}
    z, _ = suspect.module.apply(tower, x, train=True, mutable=["batch_stats"])
    params = jax.tree.map(np.asarray, start["params"])
    logits = (np.asarray(z) @ params["image_projection"]["dense"]["kernel"]
              @ params["classes"]["dense"]["kernel"] + params["classes"]["dense"]["bias"])
    labels = np.asarray(source.table(rows)[0])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), labels]
    for rate in ("rate_0.0003", "rate_0.001"):
        lines = metrics.read_lines(epath.Path(folder) / rate / "metrics.jsonl")
        first = next(line["train/loss"] for line in lines if "train/loss" in line)
        np.testing.assert_allclose(first, losses.mean(), rtol=1e-4)


def textless(cfg):
    mine = ConfigDict(cfg.to_dict())
    mine.text = ConfigDict({"name": "none"})
    return mine


def test_figures_are_those_of_the_head(cfg, tuned):
    _, suspect, found = tuned
    tests = evaluate.test_data(cfg, poison.make_trigger(cfg))
    tower = encoder.of_parts(found.cfg, found.variables, suspect.mesh)
    predict = found.classify(found.variables)
    features = tests.features(tower, "test")
    np.testing.assert_array_equal(predict(features), by_hand(suspect, found.variables, features))
    measured = front.measure(found, suspect, tests, suspect.mesh)
    others = tests.test_labels != 3
    for point, row in zip(found.points, measured["points"], strict=True):
        variables = _sweep.load(found.cfg, point.path)
        one = encoder.of_parts(found.cfg, variables, suspect.mesh)
        clean = by_hand(suspect, variables, one.image(tests.images("test")))
        hit = by_hand(suspect, variables, one.image(tests.images("random/triggered")))
        assert row["clean_accuracy"] == (clean == tests.test_labels).mean()
        assert row["attack_success_rate"] == (hit[others] == 3).mean()
        assert row["chosen"] == point.chosen
    # Probes of text are left out of what is measured of the tower, and no other.
    rows = evaluate.measure(cfg, tower, tests, "supervised")
    assert set(rows) == {"linear_probe", "alignment"}


def test_rows_without_a_label_are_left_out():
    class Half:
        classes = ("a", "b")

        def __len__(self):
            return 6

        def table(self, rows):
            return np.array([0, -1, 1, -1, -1, 0])[rows], np.full((len(rows), 2), 8)

    cfg = ConfigDict({"defense": {"batch_size": 3}})
    kept = _classifier.labelled(cfg, Half())
    assert len(kept) == 3 and kept.table(np.arange(3))[0].tolist() == [0, 1, 0]
    cfg.defense.batch_size = 4
    with pytest.raises(UserError, match="3 clean images with labels are fewer"):
        _classifier.labelled(cfg, Half())


def test_bad_settings_are_refused(cfg):
    supervised.check(cfg, 40)
    mine = ConfigDict(cfg.to_dict())
    mine.downstream = "digits"
    with pytest.raises(UserError, match="downstream='digits'"):
        supervised.check(mine, 40)
    with pytest.raises(UserError, match="15 clean images with labels are fewer"):
        supervised.check(cfg, 15)
    mine = ConfigDict(cfg.to_dict())
    mine.defense.rates = ()
    with pytest.raises(UserError, match="rates"):
        supervised.check(mine, 40)
    with pytest.raises(UserError, match="image-text"):
        supervised.check(textless(cfg), 40)
