"""PAR as a defense: it moves the towers away from the suspect, and decides without the truth."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd import defend, parallel
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import sources, texts
from jax_cl_bd.defenses import par
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,defense=par")
    cfg.data.scenes_train = 40
    cfg.mesh.data = 1
    cfg.defense.update(steps=6, points=2)
    cfg.defense.optim.update(warmup_steps=0, schedule="constant")
    return cfg


def repaired(cfg, folder, truth=None):
    mesh, source = parallel.make_mesh(cfg.mesh), sources.load(cfg.data, "train")
    suspect = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                               texts.make_tokenizer(cfg, source))
    return par.run(cfg, [suspect], Given(source, defend.validation(cfg)), truth, mesh,
                   epath.Path(folder), jax.random.key(0))


@pytest.mark.slow
def test_moves_away_and_the_truth_changes_nothing(cfg, tmp_path):
    known = repaired(cfg, tmp_path / "known", Truth(Plan.empty(), 3, None))
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
    with pytest.raises(UserError, match="tau"):
        par.check(mine, 40)
    with pytest.raises(UserError, match="one batch"):
        par.check(cfg, 8)
