"""What `bench step` reports of a step that is small enough to test."""

import types

import jax
import pytest

from configs import clip_scenes, quickstart
from jax_cl_bd import bench, train
from jax_cl_bd.errors import UserError


@pytest.mark.parametrize("config, dispatch", [
    (quickstart, 1), pytest.param(quickstart, 3, marks=pytest.mark.slow),
    pytest.param(clip_scenes, 1, marks=pytest.mark.slow)])
def test_no_step_after_the_warm_up_compiles(config, dispatch, monkeypatch):
    asked = []

    def compile_step(step_fn, shardings, steps_per_dispatch=1):
        asked.append(steps_per_dispatch)
        return train.compile_step(step_fn, shardings, steps_per_dispatch)

    monkeypatch.setattr(bench, "SECONDS", types.SimpleNamespace(value=0.2))
    monkeypatch.setattr(bench, "compile_step", compile_step)
    cfg = config.get_config("debug")
    cfg.train.update(steps_per_dispatch=dispatch, log_every=dispatch, save_every=dispatch)
    found = bench.step(cfg)
    assert asked == [dispatch] * 2 and found["steps_per_dispatch"] == dispatch
    assert found["compiles_after_warm_up"] == 0
    assert found["ratio"] == found["images_per_second"] / found["bare_images_per_second"] > 0


def test_a_step_that_compiles_is_counted():
    """The count above could not fail if the listener heard nothing."""
    seen = bench._compiles()
    jax.jit(lambda x: x * 3 + 1)(2.5).block_until_ready()
    assert len(seen) >= 1


@pytest.mark.parametrize("members, devices, feed, message", [
    (0, 1, "resident", "--members=0 must be at least 1"),
    (2, 4, "resident", "of one device, not 4"), (2, 1, "streamed", "streamed gives each run")])
def test_a_population_that_cannot_be_timed_is_refused(members, devices, feed, message, monkeypatch):
    monkeypatch.setattr(bench, "MEMBERS", types.SimpleNamespace(value=members))
    monkeypatch.setattr(bench, "_setup", None)  # nothing is read or compiled before
    cfg = quickstart.get_config("debug")
    cfg.mesh.data, cfg.data.feed = devices, feed
    with pytest.raises(UserError, match=message):
        bench.population_rate(cfg)
