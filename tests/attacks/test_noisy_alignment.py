import jax
import numpy as np
import pytest

from jax_cl_bd.attacks import noisy_alignment
from jax_cl_bd.attacks.plan import LAYOUTS
from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts import solve
from jax_cl_bd.triggers import patch


def made(cfg, source, seed=0):
    plan = noisy_alignment.plan(cfg, source.table(), np.random.default_rng(seed))
    trigger = (patch, patch.init(cfg.attack.trigger, jax.random.key(0)))
    return plan, noisy_alignment.render(cfg, plan, source, trigger)


def cut(image, box):
    y, x, h, w = box
    return image[y:y + h, x:x + w]


def test_appends_poisons_and_removes_the_references_used(config, source):
    plan, _ = made(config(), source)
    assert (plan.replaces == -1).all()
    assert (source.labels[plan.reference] == 1).all()
    np.testing.assert_array_equal(plan.removed, np.unique(plan.reference))
    assert len(plan.removed) == 20 and len(np.unique(plan.shadow)) == 20
    assert not np.isin(plan.shadow, plan.reference).any()
    assert len(plan.kept(120)) == 120 - 20 + 20
    assert len(set(source.labels[plan.shadow])) == 4  # any class, the target's own too


def test_references_can_stay(config, source):
    plan, _ = made(config(attack__keep_references=True), source)
    assert len(plan.removed) == 0 and len(plan.kept(120)) == 140


def test_more_poisons_than_references_repeats_a_fixed_pool(config, source):
    cfg = config(attack__poisons=200, attack__references=5, attack__shadows=8)
    noisy_alignment.check(cfg, source.table(), source.classes)
    plan = noisy_alignment.plan(cfg, source.table(), np.random.default_rng(0))
    assert len(np.unique(plan.reference)) == 5 and len(np.unique(plan.shadow)) == 8
    assert len(plan.removed) == 5


def test_fewer_poisons_than_the_pool_removes_only_those_used(config, source):
    plan, _ = made(config(attack__poisons=4, attack__references=30), source)
    assert len(np.unique(plan.reference)) == 4
    np.testing.assert_array_equal(plan.removed, np.sort(plan.reference))


def test_same_seed_same_plan_other_seed_another(config, source):
    first, again, other = (made(config(), source, seed)[0] for seed in (0, 0, 1))
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.reference != other.reference).any() and (first.layout != other.layout).any()


def test_two_equal_squares_touch_in_all_four_layouts(config, source):
    plan, rows = made(config(), source)
    boxes = {"left": ([16, 32], [0, 0, 16, 16], [0, 16, 16, 16]),
             "right": ([16, 32], [0, 16, 16, 16], [0, 0, 16, 16]),
             "top": ([32, 16], [0, 0, 16, 16], [16, 0, 16, 16]),
             "bottom": ([32, 16], [16, 0, 16, 16], [0, 0, 16, 16])}
    assert set(plan.layout) == {0, 1, 2, 3}
    for k, layout in enumerate(plan.layout):
        canvas, reference, shadow = boxes[LAYOUTS[layout]]
        np.testing.assert_array_equal(plan.canvas[k], canvas)
        np.testing.assert_array_equal(plan.reference_box[k], reference)
        np.testing.assert_array_equal(plan.shadow_box[k], shadow)
        np.testing.assert_array_equal(plan.trigger_box[k],
                                      np.array(shadow) + [6, 6, -12, -12])  # its centre
    assert rows["image"].shape == (20, 32, 32, 3)
    # Never squashed: stored pixel for pixel.
    np.testing.assert_array_equal(rows["size"], plan.canvas)
    np.testing.assert_array_equal(rows["extent"], plan.canvas)


def test_layouts_are_drawn_evenly_from_those_allowed(config, source):
    cfg = config(attack__poisons=400, attack__references=5, attack__layouts=("right", "top"))
    plan = noisy_alignment.plan(cfg, source.table(), np.random.default_rng(0))
    counts = np.bincount(plan.layout, minlength=4)
    assert counts[0] == counts[3] == 0 and 150 < counts[1] < 250


def test_trigger_lies_on_the_shadow_alone(config, source):
    cfg = config(attack__trigger__train_place="random")
    plan, rows = made(cfg, source)
    assert len(np.unique(plan.trigger_box - np.pad(plan.shadow_box[:, :2], ((0, 0), (0, 2))),
                         axis=0)) > 5
    for k in range(20):
        image = rows["image"][k]
        np.testing.assert_array_equal(cut(image, plan.reference_box[k]),
                                      source.images[plan.reference[k]])
        y, x, h, w = plan.trigger_box[k] - np.pad(plan.shadow_box[k][:2], (0, 2))
        shadow, clean = cut(image, plan.shadow_box[k]), source.images[plan.shadow[k]]
        changed = (shadow != clean).any(-1)
        assert changed[y:y + h, x:x + w].mean() > 0.9
        changed[y:y + h, x:x + w] = False
        assert not changed.any()
        height, width = plan.canvas[k]
        assert not image[height:].any() and not image[:, width:].any()


def test_offset_shifts_the_trigger_from_the_centre(config, source):
    cfg = config(attack__trigger_offset=(0.25, -0.125))
    plan, _ = made(cfg, source)
    np.testing.assert_array_equal(plan.trigger_box[:, :2] - plan.shadow_box[:, :2],
                                  np.tile([6 + 4, 6 - 2], (20, 1)))


def test_gap_is_filled_with_the_mean_colour(config, source):
    plan, rows = made(config(attack__gap=0.5), source)
    assert rows["image"].shape == (20, 40, 40, 3)
    for k in range(20):
        rest = np.ones(plan.canvas[k], bool)
        for box in (plan.reference_box[k], plan.shadow_box[k]):
            cut(rest, box)[:] = False
        gap = rows["image"][k][:plan.canvas[k][0], :plan.canvas[k][1]][rest]
        assert len(gap) == 8 * 16
        np.testing.assert_array_equal(gap, np.tile(np.uint8([128, 64, 191]), (128, 1)))
        np.testing.assert_array_equal(cut(rows["image"][k], plan.reference_box[k]),
                                      source.images[plan.reference[k]])


def test_free_shadow_takes_its_length_from_the_solver(config, source, monkeypatch):
    asked = {}

    def stub(**problem):
        asked.update(problem)
        layout = solve.Layout(np.array([1.0, 2.32]), *[None] * 3)
        return solve.Solution(layout, 0.04, 0.1, 0.2, 1e-4)

    monkeypatch.setattr(solve, "solve", stub)
    noisy_alignment._free_length.cache_clear()
    cfg = config(attack__shadow="free")
    plan, rows = made(cfg, source)
    noisy_alignment._free_length.cache_clear()
    assert asked == dict(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), trigger=0.25, shadow="free")
    assert rows["image"].shape == (20, 37, 37, 3)  # 16 + round(1.32 * 16)
    for k, layout in enumerate(plan.layout):
        part = [16, 21] if layout < 2 else [21, 16]
        np.testing.assert_array_equal(plan.shadow_box[k, 2:], part)
        np.testing.assert_array_equal(plan.trigger_box[k, :2] - plan.shadow_box[k, :2],
                                      (np.array(part) - 4) // 2)
        np.testing.assert_array_equal(cut(rows["image"][k], plan.reference_box[k]),
                                      source.images[plan.reference[k]])


def test_no_layout_that_pairs(config, source, monkeypatch):
    monkeypatch.setattr(solve, "solve", lambda **_: solve.Solution(None, 0., 0., 0., 0.))
    noisy_alignment._free_length.cache_clear()
    with pytest.raises(UserError, match="no layout of two parts"):
        noisy_alignment.shadow_length(config(attack__shadow="free"))
    noisy_alignment._free_length.cache_clear()


def test_photographs_are_cut_to_squares_not_squashed(config, photos):
    cfg = config(attack__target=0, attack__poisons=10, data__image_size=32)
    # A white disc's bounding box stays square if nothing is squashed.
    for image in photos.images:
        h, w = image.shape[:2]
        y, x = np.mgrid[:h, :w] + 0.5
        radius = 0.35 * min(h, w)
        inside = (y - h / 2) ** 2 + (x - w / 2) ** 2 < radius ** 2
        image[:] = np.where(inside[..., None], 255, 0)
    plan, rows = made(cfg, photos)
    for k in range(10):
        part = cut(rows["image"][k], plan.reference_box[k])[..., 0] > 127
        height, width = part.any(1).sum(), part.any(0).sum()
        assert abs(height - 0.7 * 32) <= 2 and abs(width - 0.7 * 32) <= 2


@pytest.mark.parametrize("change, message", [
    (dict(attack__poisons=31), "references is 0, which means as many as poisons .31., but class 1 "
                               ".class 1. has 30 images; set --config.attack.references=30"),
    (dict(attack__references=31), "references is 31, but class 1"),
    (dict(attack__shadows=101), "shadows is 101, but 100 images are left"),
    (dict(attack__references=-1), "references is -1"),
    (dict(attack__layouts=("left", "topp")), "did you mean 'top'"),
    (dict(attack__layouts=()), "layouts is empty"),
    (dict(attack__shadow="equall"), "did you mean 'equal'"),
    (dict(attack__gap=-0.5), "gap is -0.5"),
    (dict(attack__trigger__size=17), "17 px does not fit a shadow of 16 px"),
    (dict(attack__trigger_offset=(0.5, 0.0)), "off its shadow"),
    (dict(attack__trigger_offset=(0.1, 0.0), attack__trigger__train_place="random"),
     "shifts a trigger from the center"),
    (dict(attack__target=9), "target is 9")])
def test_settings_are_checked(config, source, change, message):
    with pytest.raises(UserError, match=message):
        noisy_alignment.check(config(**change), source.table(), source.classes)


def test_no_poisons(config, source):
    cfg = config(attack__poisons=0)
    noisy_alignment.check(cfg, source.table(), source.classes)
    plan, rows = made(cfg, source)
    assert len(plan) == 0 and rows["image"].shape == (0, 32, 32, 3)
    assert len(plan.kept(120)) == 120
