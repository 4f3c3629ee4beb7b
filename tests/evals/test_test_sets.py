"""The test protocol: same boxes for all variants and seeds, the right pixels, features once."""

import types

import jax
import ml_collections
import numpy as np
import pytest

from jax_cl_bd.data import digits
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import attack_metrics, knn, knn_1, linear_probe, test_sets
from jax_cl_bd.triggers import blend, noise_patch, none, patch, several_patches

SIDE, SIZE = 16, 4
GREY = (76, 77)  # what 0.3, between two levels of 8 bits, may be rounded to


def _cfg(seed=0, **evals):
    return ml_collections.ConfigDict(dict(
        seed=seed,
        data=dict(name="digits", image_size=SIDE, train_split="train", test_split="test",
                  workers=0, mean=(0.3, 0.3, 0.3)),
        attack=dict(target=4, trigger=dict(
            name="patch", id=14, size=SIZE, opacity=1.0, train_place="random",
            train_box=(0.25, 0.75), test_place="random", test_box=(0.1, 0.9))),
        evals=dict(dict(fraction=0.1, label_list="", placements=("random", "center"),
                        wrong_trigger=10, knn_k=200, knn_temperature=0.1), **evals)))


class Pixels:
    """An encoder that returns coarse pixels and counts its calls."""
    calls = 0

    def image(self, images):
        self.calls += 1
        return np.asarray(images, np.float32)[:, ::4, ::4, 0].reshape(len(images), -1) / 255


def _data(cfg):
    params = patch.init(cfg.attack.trigger, jax.random.key(cfg.seed))
    return test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                          (patch, params))


@pytest.fixture(scope="module")
def data():
    return _data(_cfg())


def test_triggers_that_know_others_of_their_kind_are_measured_with_them():
    cfg = _cfg()
    cfg.attack.trigger = ml_collections.ConfigDict(dict(
        name="noise_patch", size=SIZE, opacity=1.0, fixed=True, train_place="random",
        train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9)))
    params = noise_patch.init(cfg.attack.trigger, jax.random.key(0))
    data = test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                          (noise_patch, params))
    assert data.variant_names == ("triggered", "wrong", "occluded", "same_kind")
    shown = {name: data.variants["random"][name] for name in data.variant_names}
    boxes = data.boxes["random"]
    patches = {name: np.stack([x[y:y + h, z:z + w] for x, (y, z, h, w) in zip(images, boxes)])
               for name, images in shown.items()}
    assert (patches["triggered"] == patches["triggered"][0]).all()
    assert len(np.unique(patches["same_kind"].reshape(len(patches["same_kind"]), -1),
                         axis=0)) == digits.N_TEST  # noise of its own on every image
    outside = shown["same_kind"] == data.test_images
    assert (~outside.all(-1)).reshape(digits.N_TEST, -1).sum(1).max() <= SIZE * SIZE


@pytest.mark.parametrize("fixed", [True, False])
def test_a_four_corner_victim_is_measured_on_its_trigger(fixed):
    cfg = _cfg(placements=("four_corners", "random"))
    cfg.attack.trigger = ml_collections.ConfigDict(dict(
        name="noise_patch", size=SIZE, opacity=1.0, fixed=fixed, train_place="four_corners",
        train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9)))
    params = noise_patch.init(cfg.attack.trigger, jax.random.key(0))
    data = test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                          (noise_patch, params))
    assert data.placements == ("four_corners", "random")
    corners = np.zeros((SIDE, SIDE), bool)
    for y in (slice(SIZE), slice(-SIZE, None)):
        for x in (slice(SIZE), slice(-SIZE, None)):
            corners[y, x] = True
    clean = data.test_images
    assert set(data.variant_names) == {"triggered", "wrong", "occluded", "same_kind"}
    for name in data.variant_names:  # as on its poisons, and so for what it is compared with
        shown = data.images(f"four_corners/{name}")
        np.testing.assert_array_equal(shown[:, ~corners], clean[:, ~corners])
        assert (shown[:, corners] != clean[:, corners]).any(-1).mean() > 0.9
        np.testing.assert_array_equal(shown[:, :SIZE, :SIZE], shown[:, -SIZE:, -SIZE:])
        changed = (data.images(f"random/{name}") != clean).any(-1).reshape(len(clean), -1)
        assert changed.sum(1).max() <= SIZE * SIZE  # one patch, elsewhere
    assert np.isin(data.images("four_corners/occluded")[:, corners], GREY).all()
    poison = noise_patch.apply(params, clean[:2] / 255, noise_patch.place(
        cfg.attack.trigger, np.full((2, 2), SIDE), np.random.default_rng(0), training=True),
        jax.random.key(1))
    differs = np.abs(np.asarray(poison) - clean[:2] / 255).max(-1) > 1e-3
    assert not differs[:, ~corners].any() and differs[:, corners].mean() > 0.9
    if fixed:
        np.testing.assert_allclose(np.asarray(poison)[:, corners] * 255,
                                   data.images("four_corners/triggered")[:2][:, corners],
                                   atol=0.51)


def test_several_patches_are_measured_at_places_of_their_own():
    cfg = _cfg()
    cfg.attack.trigger = ml_collections.ConfigDict(dict(
        name="several_patches", patches=3, size=2, opacity=1.0, train_place="random",
        train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9)))
    params = several_patches.init(cfg.attack.trigger, jax.random.key(0))
    data = test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                          (several_patches, params))
    assert data.variant_names == ("triggered", "wrong", "occluded", "same_kind")
    clean, boxes = data.test_images, data.boxes["random"]
    low, high = 1, 14  # 10 to 90 % of 16 px
    assert boxes[:, :2].min() >= low and (boxes[:, :2] + boxes[:, 2:]).max() <= high
    covered = np.zeros(clean.shape[:3], bool)
    for place, (y, x, h, w) in zip(covered, boxes):
        for down, across in ((y, x), (y + h - 2, x + w - 2), (y, x + w - 2)):
            place[down:down + 2, across:across + 2] = True
    for name in data.variant_names:
        shown = data.images(f"random/{name}")
        np.testing.assert_array_equal(shown[~covered], clean[~covered])
        assert (shown[covered] != clean[covered]).any(-1).mean() > 0.9
    assert np.isin(data.images("random/occluded")[covered], GREY).all()


def test_a_place_that_the_trigger_was_not_made_for_is_refused():
    cfg = _cfg(placements=("four_corners",))
    with pytest.raises(UserError, match="evals.placements, 'four_corners' .allowed: center"):
        _data(cfg)
    cfg.attack.trigger.name, cfg.attack.trigger.fixed = "noise_patch", True
    params = noise_patch.init(cfg.attack.trigger, jax.random.key(0))
    with pytest.raises(UserError, match="neither training nor test has.*test_place=four_corners"):
        test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                       (noise_patch, params))


def test_a_whole_image_trigger_has_one_placement():
    cfg = _cfg()
    cfg.attack.trigger.name = "blend"
    cfg.attack.trigger.update(fixed=False, opacity=0.2)
    params = blend.init(cfg.attack.trigger, jax.random.key(0))
    data = test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                          (blend, params))
    assert data.placements == ("random",)
    assert (data.boxes["random"] == [0, 0, SIDE, SIDE]).all()
    clean, veiled = data.test_images.astype(float), data.variants["random"]["occluded"]
    np.testing.assert_allclose(veiled, 0.8 * clean + 0.2 * 0.3 * 255, atol=0.51)


def test_no_trigger_no_placements():
    cfg = _cfg()
    cfg.attack.trigger.name = "none"
    data = test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                          (none, {}))
    assert data.placements == data.variant_names == () and data.variants == {}


def test_shapes_and_names(data):
    n = len(data.test_labels)
    assert n == digits.N_TEST
    assert data.test_images.shape == (n, SIDE, SIDE, 3) and data.test_images.dtype == np.uint8
    assert len(data.train_images) == len(data.train_labels) == len(data.train_rows)
    assert 140 <= len(data.train_labels) <= 154  # 10 % of 1,470
    assert set(data.variants) == {"random", "center"}
    for variants in data.variants.values():
        assert {v: x.shape for v, x in variants.items()} == dict.fromkeys(
            ("triggered", "wrong", "occluded"), (n, SIDE, SIDE, 3))


def test_variants_differ_from_clean_inside_their_boxes_alone(data):
    for placement, variants in data.variants.items():
        boxes = data.boxes[placement]
        inside = np.zeros((len(boxes), SIDE, SIDE), bool)
        for mask, (y, x, h, w) in zip(inside, boxes):
            mask[y:y + h, x:x + w] = True
        assert (inside.sum((1, 2)) == SIZE * SIZE).all()
        for images in variants.values():
            np.testing.assert_array_equal(images[~inside], data.test_images[~inside])
        # opaque: every image has the same patch, and the three patches differ
        patches = {v: x[inside].reshape(len(boxes), -1) for v, x in variants.items()}
        for p in patches.values():
            assert (p == p[0]).all()
        assert np.isin(patches["occluded"], GREY).all()
        assert not np.array_equal(patches["triggered"], patches["wrong"])


def test_boxes_follow_the_protocol_whatever_the_seed(data):
    boxes = data.boxes["random"]
    assert boxes[:, :2].min() >= int(0.1 * SIDE) and boxes[:, :2].max() + SIZE <= 0.9 * SIDE
    assert len(np.unique(boxes[:, :2], axis=0)) > 20
    assert (data.boxes["center"] == [6, 6, SIZE, SIZE]).all()
    other = _data(_cfg(seed=5))
    for name in ("random", "center"):
        np.testing.assert_array_equal(boxes, other.boxes["random"])
        np.testing.assert_array_equal(data.images(f"{name}/triggered"),
                                      other.images(f"{name}/triggered"))
    # keyed by the row, not by its position
    some = test_sets.test_boxes(_cfg().attack.trigger, patch, np.array([9, 3]), SIDE, "random")
    np.testing.assert_array_equal(some, boxes[[9, 3]])


def test_opacity_holds_for_all_variants():
    cfg = _cfg()
    cfg.attack.trigger.opacity = 0.5
    half = _data(cfg)
    y, x, h, w = half.boxes["center"][0]
    clean = half.test_images[:, y:y + h, x:x + w].astype(float)
    mixed = half.images("center/occluded")[:, y:y + h, x:x + w]
    np.testing.assert_allclose(mixed, clean / 2 + 0.5 * 0.3 * 255, atol=0.51)


def test_features_are_computed_once_per_encoder(data):
    encoder = Pixels()
    first = data.features(encoder, "random/triggered")
    calls = encoder.calls
    assert data.features(encoder, "random/triggered") is first and encoder.calls == calls
    np.testing.assert_array_equal(first, Pixels().image(data.images("random/triggered")))
    again = Pixels()
    data.features(again, "random/triggered")
    assert again.calls == calls


def test_features_that_are_not_finite_stop_the_evaluation(data):
    broken = types.SimpleNamespace(image=lambda x: np.full((len(x), 2), np.nan))
    with pytest.raises(FloatingPointError, match="diverged"):
        data.features(broken, "test")


def test_blocks_and_threads_and_no_memory_give_the_same_images(data, monkeypatch):
    monkeypatch.setattr(test_sets, "_BLOCK", 50)
    monkeypatch.setattr(test_sets, "_KEPT_BYTES", 0)
    cfg = _cfg()
    cfg.data.workers = 3
    other = _data(cfg)
    for name in ("train", "test", "random/triggered", "center/wrong"):
        np.testing.assert_array_equal(other.images(name), data.images(name))
    assert not other._kept


@pytest.mark.parametrize("probe", [knn, knn_1, linear_probe])
def test_probes_on_an_encoder_blind_to_the_attack(data, probe):
    # Coarse pixels read digits and know no trigger: accuracy above chance, no excess to speak of.
    rows = probe.run(_cfg(), Pixels(), data)
    assert rows == probe.run(_cfg(), Pixels(), data)  # the same bits
    name = probe.__name__.split(".")[-1]
    assert set(rows) == {name, f"{name}:center"}
    assert rows[name]["clean_accuracy"] > 0.6
    assert rows[name]["protocol"]["placement"] == "random"
    if probe is knn:
        assert rows[name]["protocol"]["k"] == np.bincount(data.train_labels).min()
    assert rows[name]["n"]["attack_success_rate"] == np.sum(data.test_labels != 4)
    assert attack_metrics.add_excess(rows[name], dict(rows[name]))["excess"] <= 0


def test_without_a_trigger_there_are_only_clean_figures():
    cfg = _cfg()
    clean = test_sets.make(cfg, digits.load(cfg.data, "train"), digits.load(cfg.data, "test"),
                           None)
    assert clean.variants == {}
    rows = knn.run(cfg, Pixels(), clean)
    assert set(rows) == {"knn"} and "attack_success_rate" not in rows["knn"]


@pytest.mark.parametrize("change,message", [
    (lambda c: c.attack.update(target=10), "0..9"),
    (lambda c: c.evals.update(placements=("corner",)), "corner"),
    (lambda c: c.evals.update(wrong_trigger=14), "itself"),
    (lambda c: c.evals.update(fraction=0.0), "fraction"),
    (lambda c: c.attack.trigger.update(size=17), "size"),
])
def test_user_errors(change, message):
    cfg = _cfg()
    change(cfg)
    with pytest.raises(UserError, match=message):
        _data(cfg)


def test_different_classes_are_refused():
    cfg = _cfg()
    train = digits.load(cfg.data, "train")
    test = types.SimpleNamespace(classes=("a", "b"))
    with pytest.raises(UserError, match="classes differ"):
        test_sets.make(cfg, train, test, None)
