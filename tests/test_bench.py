"""What `bench step` reports of a step that is small enough to test."""

import types

import jax
import pytest

from configs import clip_scenes, quickstart
from jax_cl_bd import bench


@pytest.mark.parametrize("config", [quickstart,
                                    pytest.param(clip_scenes, marks=pytest.mark.slow)])
def test_no_step_after_the_warm_up_compiles(config, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", types.SimpleNamespace(value=0.2))
    found = bench.step(config.get_config("debug"))
    assert found["compiles_after_warm_up"] == 0
    assert found["ratio"] == found["images_per_second"] / found["bare_images_per_second"] > 0


def test_a_step_that_compiles_is_counted():
    """The count above could not fail if the listener heard nothing."""
    seen = bench._compiles()
    jax.jit(lambda x: x * 3 + 1)(2.5).block_until_ready()
    assert len(seen) >= 1
