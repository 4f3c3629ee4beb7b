"""The pool shows a poisoned set row by row, and does not tell which rows are poisons."""

import numpy as np

from configs import clip_scenes
from jax_cl_bd import poison
from jax_cl_bd.data import sources
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import _oracle


def made(arg):
    cfg = clip_scenes.get_config(f"debug,{arg}")
    cfg.data.scenes_train = 60
    source = sources.load(cfg.data, "train")
    plan, rows = poison.make(cfg, source, sources.table(source), poison.make_trigger(cfg))
    return source, plan, rows, Pool(source, plan, rows)


def test_rows_are_those_that_are_trained_on():
    source, plan, rows, pool = made("badnets")
    assert len(pool) == 60 and (pool.poison >= 0).sum() == len(plan) == 8
    assert sorted(pool.order) == sorted(plan.kept(60))
    labels, sizes = pool.table(np.arange(60))
    captions = pool.captions(np.arange(60))
    for i in range(60):
        item, k = pool[i], pool.poison[i]
        base = source[int(plan.replaces[k] if k >= 0 else pool.order[i])]
        expected = rows["image"][k] if k >= 0 else base["image"]
        np.testing.assert_array_equal(item["image"], expected)
        assert item["label"] == labels[i] == base["label"]  # what is in the picture
        assert item["captions"] == captions[i]
        assert item["index"] == i and tuple(sizes[i]) == (32, 32)
        if k >= 0:
            assert captions[i] == [plan.caption[k]] and "star" in plan.caption[k]


def test_an_object_drawn_beside_is_in_the_picture():
    source, plan, rows, pool = made("adaptive=beside")
    every = np.arange(60)
    np.testing.assert_array_equal(pool.beside(every), np.where(pool.poison >= 0, 3, -1))
    assert (made("badnets")[3].beside(every) == -1).all()
    assert (Pool(source).beside(every) == -1).all()
    cfg = clip_scenes.get_config("debug,defense=oracle_finetune")
    for error in (0.0, 0.5):
        cfg.defense.oracle.error = error
        seen = _oracle.make(cfg, source, None, None, None)(pool, every)
        own = pool.table(every)[0]
        right = seen[every, own] == 1
        poisoned = pool.poison >= 0
        np.testing.assert_array_equal(seen[:, 3] == 1, (right & poisoned) | (
            right & (own == 3)) | (~right & (seen.argmax(1) == 3)))
        assert (seen.sum(1) == np.where(right & poisoned, 2, 1)).all()
        assert right.all() if not error else 15 < right.sum() < 45


def test_the_order_says_nothing():
    pool = made("badnets")[3]
    at = np.flatnonzero(pool.poison >= 0)
    assert at.min() < 20 and at.max() > 39  # not at the end, where poisons have their numbers


def test_added_poisons_show_the_row_that_they_are_made_from():
    source, plan, _, pool = made("reference")
    assert len(pool) == 68
    i = int(np.flatnonzero(pool.poison >= 0)[0])
    k = pool.poison[i]
    assert pool[i]["label"] == source[int(plan.shadow[k])]["label"]


def test_a_clean_set_has_no_poison():
    source = made("badnets")[0]
    pool = Pool(source)
    assert len(pool) == 60 and (pool.poison == -1).all()
    np.testing.assert_array_equal(pool[3]["image"], source[int(pool.order[3])]["image"])
