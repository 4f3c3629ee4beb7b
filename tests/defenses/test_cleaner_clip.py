"""CleanerCLIP on the sweep: it aligns, resumes, and decides without the truth."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import jax_cl_bd
from jax_cl_bd.data import sources
from jax_cl_bd.defenses import cleaner_clip
from jax_cl_bd.errors import UserError
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    return small_repair.config("cleaner_clip")


def repaired(cfg, folder, truth=None):
    return small_repair.run(cleaner_clip, cfg, folder, truth)[1]


@pytest.mark.slow
def test_aligns_resumes_and_the_truth_changes_nothing(cfg, tmp_path):
    known = repaired(cfg, tmp_path / "known", small_repair.truth())
    blind = repaired(cfg, tmp_path / "blind")
    assert known.verdict == blind.verdict
    assert known.verdict["clean_pairs"] == 40
    assert known.verdict["captions_that_name_a_class"] == 1.0  # every scene says its shape
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    path = tmp_path / "known" / "rate_0.0003" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    trained = [line for line in lines if "train/align_loss" in line]
    assert len(trained) == 2 and trained[0]["train/aligned"] == 1
    assert trained[0]["train/align_loss"] > 0.5 and trained[0]["train/in_modality_loss"] > 0.5
    # The folder opens by itself, and the same command over it computes nothing anew.
    assert jax_cl_bd.load_encoder(tmp_path / "known").text(["a star"]).shape == (1, 16)
    before = path.read_text()
    again = repaired(cfg, tmp_path / "known")
    assert again.verdict == known.verdict and path.read_text() == before
    jax.tree.map(np.testing.assert_array_equal, again.variables, known.variables)


def test_bad_settings_are_refused(cfg):
    cleaner_clip.check(cfg, 40)
    for changes, says in (({"align": -1.0}, "align"), ({"negatives": 0}, "negatives"),
                          ({"pairs": 41}, "pairs=41"), ({"rates": ()}, "rates")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update(changes)
        with pytest.raises(UserError, match=says):
            cleaner_clip.check(mine, 40)
    mine = ConfigDict(cfg.to_dict())
    mine.objective.name = "siglip"
    with pytest.raises(UserError, match="'clip'"):
        cleaner_clip.check(mine, 40)


def test_one_class_name_cannot_be_exchanged(cfg, monkeypatch):
    class One:
        classes = ("banana", "Banana")

    monkeypatch.setattr(sources, "load", lambda *_: One())
    with pytest.raises(UserError, match="has 1 of them"):
        cleaner_clip.check(cfg, 40)
