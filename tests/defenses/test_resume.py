"""Repairs of image-text models that are stopped and run again, and finished ones run again."""

import importlib

import jax
import numpy as np
import pytest

from jax_cl_bd import checkpoint
from tests.defenses import small_repair

UBT = {"overfit.fraction": 0.5, "overfit.steps": 2, "suspects": 4}  # of forty rows


class Stop(Exception):
    """In place of a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("name, changes, at", [
    ("clean_clip", {"rates": (3e-4, 1e-3)}, 4), ("par", {"rates": (3e-4,)}, 2),
    ("fine_tune", {}, 2), ("supervised", {}, 2), ("invertune", {}, 2), ("ubt", UBT, 2),
    ("ubt", UBT, 4), ("oracle_filter", {"oracle.name": "classifier"}, 2),
    ("oracle_filter", {"oracle.name": "classifier", "action": "relabel"}, 4)])
def test_the_same_call_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys, name, changes, at):
    """Stopped before the second of two steps is saved: of the second rate where there are two, of
    what is trained before the repair, or of the repair after it."""
    method, cfg = importlib.import_module(f"jax_cl_bd.defenses.{name}"), small_repair.config(name)
    cfg.defense.update_from_flattened_dict(changes)
    cfg.train.save_every = 1
    _, undisturbed = small_repair.run(method, cfg, tmp_path / "undisturbed")
    saves = []

    def save(*args, really=checkpoint.save):
        saves.append(args)
        if len(saves) == at:
            raise Stop
        really(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Stop):
        small_repair.run(method, cfg, tmp_path / "stopped")
    capsys.readouterr()
    _, resumed = small_repair.run(method, cfg, tmp_path / "stopped")
    assert "going on from step 1" in capsys.readouterr().out
    made = len(saves)
    _, again = small_repair.run(method, cfg, tmp_path / "stopped")
    assert len(saves) == made and "going on" not in capsys.readouterr().out
    for found in (resumed, again):
        assert found.verdict == undisturbed.verdict
        assert [p.row() for p in found.points] == [p.row() for p in undisturbed.points]
        jax.tree.map(np.testing.assert_array_equal, found.variables, undisturbed.variables)
