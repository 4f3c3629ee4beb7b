"""What the sweep leaves behind; the repairs on it are tested under their own names."""

import types

import numpy as np
import pytest
from etils import epath

from configs import clip_scenes
from jax_cl_bd import run_folder
from jax_cl_bd.defenses import _sweep
from jax_cl_bd.errors import UserError


class Tokenizer:
    def save(self, path):
        path.write_text("{}")


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_a_repaired_model_is_kept_under_the_victims_own_loss(tmp_path, objective):
    cfg = clip_scenes.get_config(f"debug,objective={objective},defense=invertune")
    own = _sweep.described(_sweep.with_loss(cfg, "invertune", align=1.0))
    assert own.objective.name == "invertune" and own.objective.align == 1.0
    assert cfg.objective.name == objective
    suspect = types.SimpleNamespace(pair=types.SimpleNamespace(tokenizer=Tokenizer()))
    variables = {"params": {"encoder": {"w": np.ones(2, np.float32)}}, "batch_stats": {}}
    _sweep.keep(epath.Path(tmp_path), own, variables, 3, suspect)
    kept = run_folder.read_config(epath.Path(tmp_path))
    assert kept.objective.name == objective and "base" not in kept.objective
    assert (tmp_path / "checkpoints" / "3").exists()


def test_what_builds_on_clips_loss_refuses_another():
    _sweep.check_clip(clip_scenes.get_config("debug,objective=roclip,defense=par"))
    cfg = clip_scenes.get_config("debug,objective=siglip,defense=par")
    with pytest.raises(UserError, match="defense par is for .*'clip'.*'siglip'"):
        _sweep.check_clip(cfg)
    with pytest.raises(UserError, match="defense.x=1 is for"):
        _sweep.check_clip(cfg, "defense.x=1")
    with pytest.raises(UserError, match="15 clean pairs are fewer"):
        _sweep.check_batch(cfg, 15)
