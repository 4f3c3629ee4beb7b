import dataclasses

import numpy as np
import pytest

from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError


def example():
    return Plan.make(3, removed=[7, 1], replaces=[2, -1, 9], canvas=[[4, 5]] * 3,
                     trigger_box=[1, 2, 3, 4], pair=[-1, 5, -1], seed=[1, 2, 3])


def test_kept_skips_replaced_and_removed_and_appends_poisons():
    np.testing.assert_array_equal(example().kept(10), [0, 3, 4, 5, 6, 8, 10, 11, 12])


def test_empty_plan_keeps_everything():
    plan = Plan.empty()
    assert len(plan) == 0
    np.testing.assert_array_equal(plan.kept(4), np.arange(4))
    assert plan.kept(4).dtype == np.int64
    assert plan.canvas.shape == (0, 2) and plan.trigger_box.shape == (0, 4)


def test_fields_not_given_say_none():
    plan = example()
    assert (plan.reference == -1).all() and (plan.layout == -1).all()
    assert not plan.shadow_box.any() and plan.shadow_box.shape == (3, 4)
    np.testing.assert_array_equal(plan.trigger_box, [[1, 2, 3, 4]] * 3)


def test_save_and_load(tmp_path):
    path = tmp_path / "plan.npz"
    for plan in (example(), Plan.empty()):
        plan.save(path)
        back = Plan.load(path)
        for name in vars(plan):
            np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))
            assert getattr(back, name).dtype == getattr(plan, name).dtype


def test_part_of_a_plan():
    part = example().part(np.array([2, 0]))
    np.testing.assert_array_equal(part.replaces, [9, 2])
    np.testing.assert_array_equal(part.seed, [3, 1])
    assert len(part.removed) == 0


@pytest.mark.parametrize("damage", ["missing", "short", "text", "pickle", "other"])
def test_broken_plan(tmp_path, damage):
    path = tmp_path / "plan.npz"
    example().save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("not a plan")
    elif damage == "pickle":
        np.savez(path, removed=np.array([{}], dtype=object))
    else:
        np.savez(path, removed=np.arange(3))
    with pytest.raises(UserError, match="is missing" if damage == "missing" else "--force=poison"):
        Plan.load(path)


def test_draw_repeats_only_if_it_must():
    rng = np.random.default_rng(0)
    pool = np.arange(100, 120)
    once = plans.draw(pool, 20, rng)
    np.testing.assert_array_equal(np.sort(once), pool)
    more = plans.draw(pool, 21, rng)
    assert len(more) == 21 and np.isin(more, pool).all() and len(np.unique(more)) < 21


def test_captions_are_saved_without_pickle(tmp_path):
    path = tmp_path / "plan.npz"
    texts = ["", "a photo of a caf\u00e9.", "x" * 300]
    plan = Plan.make(3, caption=texts)
    plan.save(path)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["caption"].dtype.kind == "U"
    back = Plan.load(path)
    assert back.caption.tolist() == texts
    assert back.part(np.array([2, 0])).caption.tolist() == [texts[2], ""]
    assert example().caption.tolist() == ["", "", ""]
    assert Plan.empty().caption.shape == (0,) and Plan.empty().caption.dtype.kind == "U"


def test_a_plan_saved_before_captions_existed_still_loads(tmp_path):
    path = tmp_path / "plan.npz"
    old = {name: value for name, value in vars(example()).items() if name != "caption"}
    np.savez(path, **old)
    back = Plan.load(path)
    assert back.caption.tolist() == ["", "", ""]
    np.testing.assert_array_equal(back.trigger_box, example().trigger_box)
    del old["seed"]  # a field that plans have always had
    np.savez(path, **old)
    with pytest.raises(UserError, match="--force=poison"):
        Plan.load(path)


def test_without_labels_the_rows_of_the_target_are_those_whose_captions_name_it(captioned):
    table = captioned[0].table()
    none = dataclasses.replace(table, labels=np.full(80, -1))
    # Rows 1, 5, 9, ... are stars, but row 5 does not say so, and row 4 names a star.
    expected = sorted(set(range(1, 80, 4)) - {5} | {4})
    assert plans.rows_of(none, 1, captioned[0].classes).tolist() == expected
    assert plans.rows_of(table, 1, captioned[0].classes).tolist() == list(range(1, 80, 4))
    assert len(plans.rows_of(none, 1)) == 0
    some = dataclasses.replace(table, labels=np.where(np.arange(80) < 40, table.labels, -1))
    assert plans.rows_of(some, 1, captioned[0].classes).tolist() == list(range(1, 40, 4))


def test_targets_of_data_without_labels_are_checked(config, captioned):
    table = dataclasses.replace(captioned[0].table(), labels=np.full(80, -1))
    plans.check(config(), table, captioned[0].classes)
    with pytest.raises(UserError, match="no caption of the 80 rows of 'test' holds that name"):
        plans.check(config(), table, ("a", "banana"))
    with pytest.raises(UserError, match="no class names.*data.classes_file"):
        plans.check(config(), table, ())
    bare = dataclasses.replace(table, captions=None)
    with pytest.raises(UserError, match="a class without rows"):
        plans.check(config(), bare, captioned[0].classes)
