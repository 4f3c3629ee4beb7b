"""Repairs of image-text models that are stopped and run again, and finished ones run again."""

import importlib

import jax
import numpy as np
import pytest

from jax_cl_bd import checkpoint
from tests.defenses import small_repair


class Stop(Exception):
    """In place of a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("name, rates, at", [("clean_clip", (3e-4, 1e-3), 4), ("par", (3e-4,), 2),
                                             ("fine_tune", None, 2)])
def test_the_same_call_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys, name, rates, at):
    """Stopped before the second of two steps, of the second rate where there are two, is saved."""
    method, cfg = importlib.import_module(f"jax_cl_bd.defenses.{name}"), small_repair.config(name)
    if rates:
        cfg.defense.rates = rates
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
