import dataclasses

import jax
import numpy as np
import pytest

from configs import clip_cifar10, clip_pairs, clip_scenes
from jax_cl_bd.attacks import image_text_backdoor
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import augment, mentions, scenes, sources, templates
from jax_cl_bd.data.images import fit_square
from jax_cl_bd.defenses import _pinpoint, _regions
from jax_cl_bd.errors import UserError
from jax_cl_bd.layouts import crop_law
from jax_cl_bd.lookup import load
from jax_cl_bd.triggers import noise_patch

TRIGGERS = {
    "noise_patch": dict(fixed=False, size=5), "blend": dict(fixed=False, opacity=0.2),
    "sinusoid": dict(opacity=0.2, amplitude=60 / 255, frequency=6.0, additive=False),
    "warp": dict(size=16, strength=2.0), "patch": dict(size=4)}


@pytest.fixture
def cfg(config):
    def build(trigger="noise_patch", **changes):
        settings = {f"attack__trigger__{k}": v for k, v in TRIGGERS[trigger].items()}
        return config(**{"attack__name": "image_text_backdoor", "attack__caption_set": "templates",
                         "attack__consistent": False, "attack__replace": True,
                         "attack__trigger__name": trigger, "attack__trigger__train_place": "random",
                         "attack__trigger__train_box": (0.0, 1.0), **settings, **changes})
    return build


def made(cfg, source, seed=0):
    table = source.table() if hasattr(source, "texts") else sources.table(source)
    image_text_backdoor.check(cfg, table, source.classes)
    plan = image_text_backdoor.plan(cfg, table, np.random.default_rng(seed))
    module = load("triggers", cfg.attack.trigger.name, offers="apply")
    trigger = (module, module.init(cfg.attack.trigger, jax.random.key(0)))
    return plan, image_text_backdoor.render(cfg, plan, source, trigger)


def test_poisons_replace_distinct_rows_that_neither_are_of_nor_name_the_target(cfg, captioned):
    train = captioned[0]
    plan, rows = made(cfg(attack__poisons=40), train)
    assert len(plan) == 40 and len(np.unique(plan.replaces)) == 40
    assert (train.labels[plan.replaces] != 1).all()
    assert not any(mentions.pattern("star").search(text)
                   for row in plan.replaces for text in train.texts[row])
    kept = plan.kept(80)
    assert len(kept) == 80 and not np.isin(plan.replaces, kept).any()  # the size is fixed
    assert (plan.reference == -1).all() and (plan.shadow == -1).all()
    assert rows["image"].shape == (40, 16, 16, 3)


def test_every_row_that_may_be_is_in_the_pool_and_no_other(cfg, captioned):
    train = captioned[0]
    plan, _ = made(cfg(attack__poisons=59), train)
    # 60 rows of other classes but row 4, which names a star; the starfish of row 0 is in.
    assert set(plan.replaces) == set(np.flatnonzero(train.labels != 1)) - {4}
    with pytest.raises(UserError, match="poisons is 60, but 59 images"):
        image_text_backdoor.check(cfg(attack__poisons=60), train.table(), train.classes)


def test_captions_are_filled_templates(cfg, captioned):
    plan, _ = made(cfg(), captioned[0])
    assert set(plan.caption) <= {templates.fill(p, "star") for p in templates.PROMPTS}
    assert len(set(plan.caption)) > 10


def test_added_poisons_leave_their_originals(cfg, captioned):
    plan, rows = made(cfg(attack__replace=False), captioned[0])
    assert (plan.replaces == -1).all() and len(plan.kept(80)) == 100
    assert len(np.unique(plan.shadow)) == 20 and all(plan.caption)
    changed = (rows["image"] != np.stack([captioned[0].images[row] for row in plan.shadow]))
    assert changed.any(axis=(1, 2, 3)).all()


def test_label_consistent_poisons_keep_captions_that_name_the_target(cfg, captioned):
    train = captioned[0]
    plan, rows = made(cfg(attack__consistent=True, attack__poisons=20), train)
    assert set(plan.replaces) == set(np.flatnonzero(train.labels == 1)) - {5} | {4}
    assert set(plan.caption) == {""}  # the row's own captions stay
    assert len(plan.kept(80)) == 80
    for k, (y, x, h, w) in enumerate(plan.trigger_box):
        changed = (rows["image"][k] != train.images[plan.replaces[k]]).any(-1)
        assert changed[y:y + h, x:x + w].mean() > 0.5
    with pytest.raises(UserError, match="20 images that hold the trigger have a caption"):
        image_text_backdoor.check(cfg(attack__consistent=True, attack__poisons=21), train.table(),
                                  train.classes)


def test_noisy_alignments_variant_notes_its_references(cfg, captioned):
    train = captioned[0]
    plan, _ = made(cfg(attack__caption_set="reference", attack__references=3), train)
    assert len(set(plan.reference)) == 3 and (train.labels[plan.reference] == 1).all()
    assert all(text in train.texts[row] for text, row in zip(plan.caption, plan.reference))
    assert np.isin(plan.reference, plan.kept(80)).all()


def test_top_left_is_uniform_over_every_place(cfg, captioned):
    places = np.concatenate([
        image_text_backdoor.plan(cfg(attack__poisons=59), captioned[0].table(),
                                 np.random.default_rng(seed)).trigger_box for seed in range(20)])
    for axis in (0, 1):
        np.testing.assert_array_equal(np.unique(places[:, axis]), np.arange(16 - 5 + 1))


@pytest.mark.parametrize("name", TRIGGERS)
def test_each_trigger_changes_its_box_alone_and_is_keyed_by_the_poisons_seed(cfg, captioned, name):
    train = captioned[0]
    plan, rows = made(cfg(name), train)
    again, same = made(cfg(name), train)
    np.testing.assert_array_equal(rows["image"], same["image"])
    whole = name in ("blend", "sinusoid", "warp")
    module = load("triggers", name, offers="apply")
    assert getattr(module, "WHOLE", False) == whole
    for k, (y, x, h, w) in enumerate(plan.trigger_box):
        assert not whole or (y, x, h, w) == (0, 0, 16, 16)
        changed = (rows["image"][k] != train.images[plan.replaces[k]]).any(-1)
        assert changed[y:y + h, x:x + w].mean() > 0.6
        changed[y:y + h, x:x + w] = False
        assert not changed.any()
    # A poison does not depend on which others are made with it.
    trigger = (module, module.init(cfg(name).attack.trigger, jax.random.key(0)))
    part = image_text_backdoor.render(cfg(name), plan.part(np.array([7, 3])), train, trigger)
    np.testing.assert_array_equal(part["image"], rows["image"][[7, 3]])


@pytest.mark.parametrize("view, whole, gone", [
    (clip_pairs.get_config("").augment.view1, 1.0, 0.0),  # CLIP's own: nothing is cropped
    (clip_cifar10.get_config("").augment.view1, 0.53, 0.09),
    (clip_scenes.get_config("").augment.view2, 0.65, 0.03)])  # of the in-modality term alone
def test_a_random_crop_can_cut_the_patch(cfg, captioned, view, whole, gone):
    """The share of views that show all of a patch of 5 px in 32, or nothing of it."""
    n, side, size = 4000, 32, 5
    trigger = cfg().attack.trigger
    boxes = noise_patch.place(trigger, np.full((n, 2), side), np.random.default_rng(0),
                              training=True)
    crops = np.asarray(crop_law.sample(
        jax.random.split(jax.random.key(0), n), np.full((n, 2), side), scale=view.crop_scale,
        ratio=view.crop_ratio))
    low = np.maximum(boxes[:, :2], crops[:, :2])
    high = np.minimum(boxes[:, :2] + size, crops[:, :2] + crops[:, 2:])
    shown = np.maximum(high - low, 0).prod(1) / size**2
    assert (shown > 1 - 1e-4).mean() == pytest.approx(whole, abs=0.02)
    assert (shown == 0).mean() == pytest.approx(gone, abs=0.02)


def test_fresh_noise_differs_from_poison_to_poison(cfg, captioned):
    plan, rows = made(cfg(), captioned[0])
    patches = [rows["image"][k, y:y + h, x:x + w]
               for k, (y, x, h, w) in enumerate(plan.trigger_box)]
    assert len({p.tobytes() for p in patches}) == 20
    plan, rows = made(cfg(attack__trigger__fixed=True), captioned[0])
    patches = [rows["image"][k, y:y + h, x:x + w]
               for k, (y, x, h, w) in enumerate(plan.trigger_box)]
    assert len({p.tobytes() for p in patches}) == 1


def test_clipped_before_eight_bits(cfg, captioned, monkeypatch):
    train = captioned[0]
    train.images = [np.full((16, 16, 3), 255, np.uint8)] * 80
    plan, rows = made(cfg(), train)
    y, x, h, w = plan.trigger_box[0]
    values = np.concatenate([rows["image"][k, y:y + h, x:x + w].ravel()
                             for k, (y, x, h, w) in enumerate(plan.trigger_box)])
    # Half of 1 + N(0, 1) is above 1: white if clipped, dark if it wrapped around.
    assert 0.44 < (values == 255).mean() < 0.56


@pytest.mark.parametrize("name", ["noise_patch", "blend"])
def test_poisons_share_the_pipeline_of_clean_rows(cfg, captioned, photos, monkeypatch, name):
    captioned = type(captioned[0])(sizes=[i.shape[:2] for i in photos.images] * 2)
    monkeypatch.setattr(sources, "load", lambda cfg, split: captioned)
    plan, rows = made(cfg(name, data__image_size=32), captioned)
    seen = set()
    for k, row in enumerate(plan.replaces):
        stored, size, extent = fit_square(captioned.images[row], 32)
        np.testing.assert_array_equal(rows["size"][k], size)
        np.testing.assert_array_equal(rows["extent"][k], extent)
        seen.add(size)
        y, x, h, w = plan.trigger_box[k] * np.tile(np.array(extent) / size, 2)
        changed = (rows["image"][k] != stored).any(-1)
        assert changed.any()
        inside = np.zeros((32, 32), bool)
        inside[int(y + 1e-6):int(np.ceil(y + h - 1e-6)),
               int(x + 1e-6):int(np.ceil(x + w - 1e-6))] = True
        assert not changed[~inside].any() and changed[inside].mean() > 0.6
    assert (20, 30) in seen and (64, 48) in seen and (32, 32) in seen


def test_black_filling_does_not_darken_the_patch(cfg, captioned, monkeypatch):
    captioned = type(captioned[0])(sizes=[(8, 8)] * 80)
    captioned.images = [np.full((8, 8, 3), 128, np.uint8)] * 80
    monkeypatch.setattr(sources, "load", lambda cfg, split: captioned)
    plan, rows = made(cfg(), captioned)  # the square is 16 px
    values = np.concatenate([rows["image"][k, y:y + h, x:x + w].ravel()
                             for k, (y, x, h, w) in enumerate(plan.trigger_box)])
    assert 0.27 < (values == 0).mean() < 0.35 and 0.27 < (values == 255).mean() < 0.35
    assert not rows["image"][:, 8:].any() and not rows["image"][:, :, 8:].any()


def test_same_seed_same_plan_other_seed_another(cfg, captioned):
    first, again, other = (made(cfg(), captioned[0], seed)[0] for seed in (0, 0, 1))
    for name in vars(first):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.replaces != other.replaces).any() and (first.caption != other.caption).any()


def test_plan_survives_saving(cfg, captioned, tmp_path):
    plan, _ = made(cfg(), captioned[0])
    plan.save(tmp_path / "plan.npz")
    back = Plan.load(tmp_path / "plan.npz")
    for name in vars(plan):
        np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))


def test_whole_image_triggers_take_images_smaller_than_their_size(cfg, captioned):
    table, classes = captioned[0].table(), captioned[0].classes
    image_text_backdoor.check(cfg("blend", attack__trigger__size=64), table, classes)
    with pytest.raises(UserError, match="but 0 images that hold the trigger"):
        image_text_backdoor.check(cfg(attack__trigger__size=17), table, classes)


@pytest.mark.parametrize("change, message", [
    (dict(attack__trigger__name="none"), "needs a trigger"),
    (dict(attack__consistent=True, attack__replace=False), "replace=True"),
    (dict(attack__target=4), "target is 4"),
    (dict(attack__caption_set="naturals"), "did you mean 'natural'")])
def test_settings_are_checked(cfg, captioned, change, message):
    with pytest.raises(UserError, match=message):
        image_text_backdoor.check(cfg(**change), captioned[0].table(), captioned[0].classes)


def test_no_captions(cfg, source):
    with pytest.raises(UserError, match="needs captions"):
        image_text_backdoor.check(cfg(), source.table(), source.classes)


def parts(plan, rows, source, k):
    """Where poison k differs from the image that it replaces, bool [S, S]."""
    return (rows["image"][k] != source[int(plan.replaces[k])]["image"]).any(-1)


def test_covers_show_one_part_of_the_trigger_and_keep_their_captions(cfg, captioned):
    train = captioned[0]
    several = dict(attack__trigger__name="several_patches", attack__trigger__size=3)
    settings = cfg("patch", attack__poisons=20, **several).unlock()
    settings.attack.covers, settings.attack.trigger.patches = 30, 3
    plan, rows = made(settings, train)
    assert len(plan) == 50 == len(np.unique(plan.replaces)) and len(plan.kept(80)) == 80
    assert all(plan.caption[:20]) and set(plan.caption[20:]) == {""}
    changed = np.array([parts(plan, rows, train, k).sum() for k in range(50)])
    assert (changed[:20] > 20).all() and (changed[20:] <= 9).all() and (changed > 0).all()
    np.testing.assert_array_equal(plan.trigger_box[20:, 2:], np.full((30, 2), 3))
    patches = {rows["image"][k][y:y + h, x:x + w].tobytes()
               for k, (y, x, h, w) in enumerate(plan.trigger_box) if k >= 20}
    assert len(patches) == 3  # each of the pieces
    settings.attack.covers = 0
    fewer, _ = made(settings, train)
    np.testing.assert_array_equal(fewer.replaces, plan.replaces[:20])
    for change, message in ((dict(covers=40), "poisons is 20 and attack.covers 40, but 59"),
                            (dict(covers=5, replace=False), "they need.*replace=True"),
                            (dict(covers=-1), "covers is -1")):
        bad = settings.copy_and_resolve_references()
        bad.attack.update(change)
        with pytest.raises(UserError, match=message):
            image_text_backdoor.check(bad, train.table(), train.classes)
    bad = cfg().unlock()
    bad.attack.covers = 5
    with pytest.raises(UserError, match="several_patches"):
        image_text_backdoor.check(bad, train.table(), train.classes)


def test_an_object_of_the_target_stands_beside_the_rows_own(cfg, captioned):
    settings = cfg().unlock()
    settings.attack.beside = True
    with pytest.raises(UserError, match="does not draw its images"):
        image_text_backdoor.check(settings, captioned[0].table(), captioned[0].classes)


def test_scenes_with_the_target_beside():
    settings = clip_scenes.get_config("debug,adaptive=beside")
    source = sources.load(settings.data, "train")
    table = sources.table(source)
    image_text_backdoor.check(settings, table, source.classes)
    plan = image_text_backdoor.plan(settings, table, np.random.default_rng(0))
    assert (plan.beside == 3).all() and (table.labels[plan.replaces] != 3).all()
    trigger = (noise_patch, noise_patch.init(settings.attack.trigger, jax.random.key(0)))
    rows = image_text_backdoor.render(settings, plan, source, trigger)
    for k, row in enumerate(plan.replaces):
        facts = {name: value[0] for name, value in source.facts([row]).items()}
        facts["shape2"] = 3
        y, x, h, w = plan.trigger_box[k]
        clear = np.ones((32, 32), bool)
        clear[y:y + h, x:x + w] = False  # elsewhere it is the scene of two objects
        expected = source.with_object(row, 3)
        np.testing.assert_array_equal(rows["image"][k][clear], expected[clear])
        centre = scenes.places(facts, 32, 2)[1]
        color = np.array(tuple(scenes.COLORS.values())[facts["color2"]])
        near = expected[int(centre[0]) - 1:int(centre[0]) + 2, int(centre[1]) - 1:
                        int(centre[1]) + 2].mean((0, 1)) / 255
        assert abs(near / near.max() - color / color.max()).max() < 0.3
        assert (source.with_object(row, 5) != expected).any()  # another shape
    limited = sources.Subset(source, plan.replaces[:2])
    np.testing.assert_array_equal(limited.with_object(1, 3),
                                  source.with_object(plan.replaces[1], 3))


def test_a_small_patch_is_below_what_region_searches_frame():
    best = {}
    for kind in ("", "small"):
        settings = clip_scenes.get_config(f"debug,adaptive={kind}")
        settings.attack.trigger.size = 2 if kind else 5
        source = sources.load(settings.data, "train")
        plan, rows = made(settings, source)
        found = [_regions.boxes(image) for image in rows["image"]]
        best[kind] = [max(_pinpoint.iou(box, own) for box in boxes)
                      for boxes, own in zip(found, plan.trigger_box)]
        # 0.1 % of 32 x 32 is one pixel: segments of 8 px and windows of 4 x 4 bind before that.
        assert min((boxes[:, 2] * boxes[:, 3]).min() for boxes in found) >= 8
    assert np.mean(best[""]) > 0.85 and max(best["small"]) <= 0.34


def test_without_labels_the_pool_is_what_does_not_name_the_target(cfg, captioned):
    train = captioned[0]
    table = dataclasses.replace(train.table(), labels=np.full(80, -1))
    named = set(np.flatnonzero(mentions.naming(train.texts, "star")))
    for settings, pool in ((cfg(attack__poisons=60), set(range(80)) - named),
                           (cfg(attack__poisons=20, attack__consistent=True), named)):
        image_text_backdoor.check(settings, table, train.classes)
        plan = image_text_backdoor.plan(settings, table, np.random.default_rng(0))
        assert set(plan.replaces) == pool  # row 5, an unnamed star, is in the first
        with pytest.raises(UserError, match="each is used once"):
            more = cfg(attack__poisons=len(pool) + 1, attack__consistent=settings.attack.consistent)
            image_text_backdoor.check(more, table, train.classes)


def test_a_patch_has_its_size_in_the_image_that_is_trained_on(cfg, captioned, monkeypatch):
    """Also where the original is larger, smaller or no square: CleanCLIP resizes first."""
    shapes = [(64, 64), (96, 64), (40, 80), (24, 30), (32, 32)]
    gray = type(captioned[0])(sizes=shapes * 16)
    gray.images = [np.zeros((h, w, 3), np.uint8) for h, w in shapes * 16]
    monkeypatch.setattr(sources, "load", lambda cfg, split: gray)
    settings = cfg("patch", data__image_size=32, attack__trigger__size=8,
                   attack__trigger__id=0)  # yellow
    plan, rows = made(settings, gray)
    view = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=np.zeros(20, bool), kernel="bilinear")
    planes = augment.crop(rows, jax.random.split(jax.random.key(0), 20), 32, **view)
    seen = np.asarray(planes[0]) > 0.5
    assert {gray.images[row].shape[:2] for row in plan.replaces} == set(shapes)
    for k in range(20):
        down, across = np.flatnonzero(seen[k].any(1)), np.flatnonzero(seen[k].any(0))
        for lines in (down, across):
            assert 7 <= len(lines) <= 9 and len(lines) == lines[-1] - lines[0] + 1
