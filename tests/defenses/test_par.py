"""PAR as a defense: it moves the towers away from the suspect, and decides without the truth."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.defenses import par
from jax_cl_bd.errors import UserError
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    cfg = small_repair.config("par")
    cfg.defense.update(steps=6, points=2)
    return cfg


def repaired(cfg, folder, truth=None):
    return small_repair.run(par, cfg, folder, truth)[1]


@pytest.mark.slow
def test_moves_away_and_the_truth_changes_nothing(cfg, tmp_path):
    known = repaired(cfg, tmp_path / "known", small_repair.truth())
    blind = repaired(cfg, tmp_path / "blind")
    assert known.verdict == blind.verdict and known.verdict["clean_pairs"] == 40
    assert known.verdict["training_pairs"] == 40
    assert known.verdict["gradient_steps"] == cfg.defense.steps * len(cfg.defense.rates)
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    lines = (tmp_path / "known" / "rate_0.0003" / "metrics.jsonl").read_text().splitlines()
    moved = [json.loads(line)["train/moved_text"] for line in lines
             if "train/moved_text" in json.loads(line)]
    assert len(moved) == 6 and moved[0] < 1e-9 < moved[-1]  # texts have no batch norm


def test_other_models_are_refused(cfg):
    mine = ConfigDict(cfg.to_dict())
    mine.objective.name = "siglip"
    with pytest.raises(UserError, match="'clip'"):
        par.check(mine, 40)
    mine = ConfigDict(cfg.to_dict())
    mine.defense.tau = 9.0
    with pytest.raises(UserError, match=r"defense\.tau = 9"):
        par.check(mine, 40)
    with pytest.raises(UserError, match="one batch"):
        par.check(cfg, 8)
