"""What arrives at test time: every test image once, half of them triggered, in no telling order."""

import numpy as np
import pytest

from configs import clip_scenes
from jax_cl_bd import evaluate, poison
from jax_cl_bd.defenses import incoming


@pytest.fixture(scope="module")
def tests():
    cfg = clip_scenes.get_config("debug,badnets")
    return evaluate.test_data(cfg, poison.make_trigger(cfg))


def test_every_image_once_and_half_of_them_triggered(tests):
    source, triggered = incoming.make(tests)
    assert len(source) == 100 and triggered.sum() == 50 and source.classes == tests.classes
    sets = [list(map(bytes, tests.images(name))) for name in ("test", "random/triggered")]
    rows = [sets[int(of)].index(bytes(source[i]["image"])) for i, of in enumerate(triggered)]
    assert sorted(rows) == list(range(100))
    # Neither the order nor the item says which.
    assert abs(np.corrcoef(np.arange(100), triggered)[0, 1]) < 0.3
    assert abs(np.corrcoef(rows, triggered)[0, 1]) < 0.3
    assert all(source[i]["label"] == -1 for i in range(100))
    again, same = incoming.make(tests)
    np.testing.assert_array_equal(source.images, again.images)
    np.testing.assert_array_equal(triggered, same)


def test_a_large_test_set_is_cut(tests, monkeypatch):
    monkeypatch.setattr(incoming, "MOST", 30)
    source, triggered = incoming.make(tests)
    assert len(source) == 30 and triggered.sum() == 15


def test_without_a_trigger_all_are_clean():
    cfg = clip_scenes.get_config("debug,targeted")
    tests = evaluate.test_data(cfg, poison.make_trigger(cfg))
    source, triggered = incoming.make(tests)
    assert len(source) == 100 and not triggered.any()
    assert sorted(map(bytes, source.images)) == sorted(map(bytes, tests.images("test")))


def test_some_images_of_a_set_in_their_order(tests, monkeypatch):
    every = tests.images("test")
    monkeypatch.setitem(tests._kept, "test", [every[:40], every[40:41], every[41:]])
    rows = np.array([99, 0, 40, 39, 41, 7])
    np.testing.assert_array_equal(tests.some("test", rows), every[rows])
