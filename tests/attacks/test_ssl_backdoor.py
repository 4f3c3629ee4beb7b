import jax
import numpy as np
import pytest
from PIL import Image

from jax_cl_bd.attacks import ssl_backdoor
from jax_cl_bd.data.images import fit_square
from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import htba, patch


def made(cfg, source, seed=0):
    plan = ssl_backdoor.plan(cfg, source.table(), np.random.default_rng(seed))
    trigger = (patch, patch.init(cfg.attack.trigger, jax.random.key(0)))
    return plan, ssl_backdoor.render(cfg, plan, source, trigger)


@pytest.fixture
def cfg(config):
    return config(attack__name="ssl_backdoor", attack__poisons=12,
                  attack__trigger__train_place="random")


def test_replaces_rows_of_the_target_class_once_each(cfg, source):
    plan, rows = made(cfg, source)
    assert len(np.unique(plan.replaces)) == 12
    assert (source.labels[plan.replaces] == 1).all()
    assert len(plan.removed) == 0
    kept = plan.kept(120)
    assert len(kept) == 120  # the count does not change
    assert not np.isin(plan.replaces, kept).any()
    np.testing.assert_array_equal(kept[-12:], 120 + np.arange(12))


def test_same_seed_same_plan_other_seed_another(cfg, source):
    first, again, other = (made(cfg, source, seed)[0] for seed in (0, 0, 1))
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.replaces != other.replaces).any()


def test_selection_is_shuffled(cfg, source):
    plan, _ = made(cfg, source)
    assert set(plan.replaces) != set(np.flatnonzero(source.labels == 1)[:12])


def test_untargeted_takes_every_class(config, source):
    cfg = config(attack__name="ssl_backdoor", attack__poisons=60, attack__targeted=False)
    plan, rows = made(cfg, source)
    assert set(source.labels[plan.replaces]) == {0, 1, 2, 3}
    assert rows["image"].shape == (60, 16, 16, 3)


def test_only_the_box_differs_from_the_original(cfg, source):
    plan, rows = made(cfg, source)
    shown = np.stack([np.asarray(Image.fromarray(htba.image(14)[..., c]).resize(
        (4, 4), Image.Resampling.BICUBIC)) for c in range(3)], -1)
    for k, row in enumerate(plan.replaces):
        y, x, h, w = plan.trigger_box[k]
        assert 4 <= y <= 8 and 4 <= x <= 8  # int(16 * 0.25) .. int(16 * 0.75 - 4)
        inside = np.zeros((16, 16), bool)
        inside[y:y + h, x:x + w] = True
        image = rows["image"][k]
        np.testing.assert_array_equal(image[~inside], source.images[row][~inside])
        np.testing.assert_allclose(image[y:y + h, x:x + w] / 255, np.clip(shown, 0, 1), rtol=0,
                                   atol=0.6 / 255)


def test_native_boxes_and_stored_shapes(config, photos):
    cfg = config(attack__name="ssl_backdoor", attack__target=0, attack__poisons=24,
                 attack__trigger__size=10, attack__trigger__train_place="random",
                 data__image_size=32)
    plan, rows = made(cfg, photos)
    assert rows["image"].shape == (24, 32, 32, 3)
    seen = set()
    for k, row in enumerate(plan.replaces):
        native = photos.images[row].shape[:2]
        seen.add(native)
        np.testing.assert_array_equal(plan.canvas[k], native)
        np.testing.assert_array_equal(rows["size"][k], native)
        y, x, h, w = plan.trigger_box[k]
        assert (h, w) == (10, 10) and y >= int(native[0] * .25) and x >= int(native[1] * .25)
        stored, _, extent = fit_square(photos.images[row], 32)
        np.testing.assert_array_equal(rows["extent"][k], extent)
        # The pixels that differ are those of the box, scaled by its own factor on each axis.
        changed = (rows["image"][k] != stored).any(-1)
        ys, xs = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        fy, fx = extent[0] / native[0], extent[1] / native[1]
        assert (ys.min(), ys.max() + 1) == (int(y * fy + 1e-6), np.ceil((y + h) * fy - 1e-6))
        assert (xs.min(), xs.max() + 1) == (int(x * fx + 1e-6), np.ceil((x + w) * fx - 1e-6))
    assert (40, 60) in seen and (32, 32) in seen


def test_more_poisons_than_candidates(config, source):
    cfg = config(attack__name="ssl_backdoor", attack__poisons=31)
    with pytest.raises(UserError, match="poisons is 31, but class 1 has 30 images that"):
        ssl_backdoor.check(cfg, source.table(), source.classes)
    ssl_backdoor.check(config(attack__name="ssl_backdoor", attack__poisons=31,
                              attack__targeted=False), source.table(), source.classes)


def test_images_smaller_than_the_trigger_are_no_candidates(config, photos):
    # Class 0 holds rows 0, 2, 4, ... of six shapes: 8 each of 40x60, 32x32 and 100x70.
    cfg = config(attack__name="ssl_backdoor", attack__target=0, attack__poisons=16,
                 attack__trigger__size=40, data__image_size=32)
    ssl_backdoor.check(cfg, photos.table(), photos.classes)
    plan, _ = made(cfg, photos)
    assert plan.canvas.min() >= 40
    more = config(attack__name="ssl_backdoor", attack__target=0, attack__poisons=17,
                  attack__trigger__size=40)
    with pytest.raises(UserError, match="16 images that hold a trigger of 40 px"):
        ssl_backdoor.check(more, photos.table(), photos.classes)


@pytest.mark.parametrize("change, message", [
    (dict(attack__target=4), "target is 4; the data set has classes 0 to 3"),
    (dict(attack__target=-1), "target is -1"), (dict(attack__poisons=-3), "poisons is -3")])
def test_common_checks(config, source, change, message):
    cfg = config(attack__name="ssl_backdoor", **change)
    with pytest.raises(UserError, match=message):
        ssl_backdoor.check(cfg, source.table(), source.classes)


def test_target_without_rows(config, source):
    with pytest.raises(UserError, match="target is 4 .extra., a class without rows"):
        ssl_backdoor.check(config(attack__name="ssl_backdoor", attack__target=4), source.table(),
                           source.classes + ("extra",))
