"""CleanCLIP on the sweep: what it moves, what its control is, which pairs it takes."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

import jax_cl_bd
from jax_cl_bd import metrics
from jax_cl_bd.defenses import _sweep, clean_clip, fine_tune
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    return small_repair.config("clean_clip")


def repaired(cfg, folder, truth=None, method=clean_clip):
    return small_repair.run(method, cfg, folder, truth)


@pytest.mark.slow
def test_moves_weights_and_the_truth_changes_nothing(cfg, tmp_path):
    mine = ConfigDict(cfg.to_dict())
    mine.defense.pairs = 20
    truth = small_repair.truth()
    suspect, known = repaired(mine, tmp_path / "known", truth)
    _, blind = repaired(mine, tmp_path / "blind")
    assert known.verdict == blind.verdict
    assert known.verdict["clean_pairs"] == 20 and known.verdict["rate"] == 3e-4
    assert [(p.rate, p.step) for p in known.points] == [(3e-4, 1), (3e-4, 2)]
    assert known.verdict["step"] == next(p.step for p in known.points if p.chosen)
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    for part in ("encoder", "text", "image_projection", "text_projection", "scale"):
        both = zip(jax.tree.leaves(suspect.pair.variables["params"][part]),
                   jax.tree.leaves(known.variables["params"][part]))
        assert any(np.abs(np.asarray(a) - b).max() > 1e-5 for a, b in both), part
    assert "in_modality_loss" in (tmp_path / "known" / "rate_0.0003" / "metrics.jsonl").read_text()
    # The folder opens by itself, and the same command over it computes nothing anew.
    opened = jax_cl_bd.load_encoder(tmp_path / "known")
    again = encoder.of_parts(known.cfg, known.variables, suspect.mesh, suspect.pair.tokenizer)
    np.testing.assert_allclose(opened.text(["a red star"]), again.text(["a red star"]), atol=1e-6)
    _, same = repaired(mine, tmp_path / "known", truth)
    assert same.verdict == known.verdict
    jax.tree.map(np.testing.assert_array_equal, same.variables, known.variables)


@pytest.mark.slow
def test_without_the_term_it_is_fine_tuning_by_the_loss_alone(cfg, tmp_path):
    mine = ConfigDict(cfg.to_dict())
    mine.defense.in_modality = 0.0
    mine.defense.points = 1
    _, swept = repaired(mine, tmp_path / "swept")
    plain = ConfigDict(mine.to_dict())
    plain.defense.optim.lr = mine.defense.rates[0]
    plain.defense.epochs = 0
    _, tuned = repaired(plain, tmp_path / "plain", method=fine_tune)
    point = _sweep.load(swept.cfg, swept.points[-1].path)
    assert swept.points[-1].step == tuned.verdict["steps"] == 2
    jax.tree.map(np.testing.assert_array_equal, point, jax.tree.map(np.asarray, tuned.variables))


@pytest.mark.slow
def test_without_the_clip_loss_it_is_the_in_modality_term_alone(cfg, tmp_path):
    mine = ConfigDict(cfg.to_dict())
    mine.defense.update(cross_modal=False, points=1)
    _, found = repaired(mine, tmp_path)
    lines = metrics.read_lines(epath.Path(tmp_path) / "rate_0.0003" / "metrics.jsonl")
    losses = [line for line in lines if "train/loss" in line]
    assert losses
    for line in losses:
        assert line["train/loss"] == pytest.approx(line["train/in_modality_loss"])
    assert jax_cl_bd.load_encoder(tmp_path).text(["a red star"]).shape == (1, 16)


def test_bad_settings_are_refused(cfg):
    clean_clip.check(cfg, 40)
    for changes, clean, says in (({"pairs": 41}, 40, "pairs=41"), ({"pairs": -1}, 40, "pairs=-1"),
                                 ({"pairs": 8}, 40, "8 clean pairs are fewer"),
                                 ({}, 15, "15 clean pairs are fewer"),
                                 ({"in_modality": -1.0}, 40, "in_modality"),
                                 ({"in_modality": 0.0, "cross_modal": False}, 40, "no loss"),
                                 ({"rates": ()}, 40, "rates")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update(changes)
        with pytest.raises(UserError, match=says):
            clean_clip.check(mine, clean)
    images = ConfigDict(cfg.to_dict())
    images.text = ConfigDict({"name": "none"})
    with pytest.raises(UserError, match="image-text"):
        clean_clip.check(images, 40)
