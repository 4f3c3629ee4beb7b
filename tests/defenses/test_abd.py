"""ABD as a defense: adversarial views and EDA captions on the sweep, blind to the truth."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.defenses import abd
from jax_cl_bd.errors import UserError
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    return small_repair.config("abd")


def repaired(cfg, folder, truth=None):
    return small_repair.run(abd, cfg, folder, truth)[1]


def lines(folder):
    text = (folder / "rate_0.0003" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_sees_adversarial_views_and_the_truth_changes_nothing(cfg, tmp_path):
    known = repaired(cfg, tmp_path / "known", small_repair.truth())
    blind = repaired(cfg, tmp_path / "blind")
    assert known.verdict == blind.verdict and known.verdict["clean_pairs"] == 40
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    reached = [line["train/adversarial_cosine"] for line in lines(tmp_path / "known")
               if "train/adversarial_cosine" in line]
    assert len(reached) == 2 and all(-1 < r < 1 - 1e-4 for r in reached)
    again = repaired(cfg, tmp_path / "known")  # computes nothing anew
    assert again.verdict == known.verdict
    assert len(lines(tmp_path / "known")) == len(lines(tmp_path / "blind"))
    jax.tree.map(np.testing.assert_array_equal, again.variables, known.variables)


def test_other_models_and_bad_settings_are_refused(cfg):
    abd.check(cfg, 40)
    for changes, says in (({"budget": 2.0}, r"defense\.budget"), ({"pgd_steps": 0}, "pgd_steps"),
                          ({"in_modality": 0.0}, "in_modality")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update(changes)
        with pytest.raises(UserError, match=says):
            abd.check(mine, 40)
    mine = ConfigDict(cfg.to_dict())
    mine.objective.name = "siglip"
    with pytest.raises(UserError, match="'clip'"):
        abd.check(mine, 40)
    with pytest.raises(UserError, match="one batch"):
        abd.check(cfg, 8)
