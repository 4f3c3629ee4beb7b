"""scenes.py and shapes.py: what is drawn is what is said, and nothing depends on the length."""

import hashlib
import pickle

import ml_collections
import numpy as np
import pytest

from jax_cl_bd.data import backgrounds, images, scenes, shapes, sources, templates
from jax_cl_bd.errors import UserError


def config(**changes):
    cfg = ml_collections.ConfigDict(dict(
        name="scenes", data_dir="", image_size=32, train_split="train", test_split="test", limit=0,
        skip_corrupt=False, classes_file="", captions="", captions_per_row=5, scenes_train=300,
        scenes_test=40, scenes_objects=1))
    cfg.update(changes)
    return cfg


def words(caption):
    return caption.rstrip(".").split()


def test_items():
    source = sources.load(config(), "train")
    assert len(source) == 300 and len(source.classes) >= 10 and len(scenes.COLORS) == 8
    assert len(backgrounds.PATTERNS) >= 6
    item = source[7]
    assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.uint8
    assert item["mask"].shape == (32, 32) and item["mask"].dtype == bool
    assert item["index"] == 7 and len(item["captions"]) == 5
    assert len(list(source)) == 300  # iteration ends


@pytest.mark.parametrize("objects", [1, 2])
def test_a_row_is_a_function_of_split_and_index(objects):
    long = sources.load(config(scenes_train=5000, scenes_objects=objects), "train")
    short = sources.load(config(scenes_train=9, scenes_objects=objects), "train")
    test = sources.load(config(scenes_objects=objects), "test")
    again = pickle.loads(pickle.dumps(long))
    for i in (0, 3, 8):
        for other in (short, again):
            for name in ("image", "mask"):
                np.testing.assert_array_equal(long[i][name], other[i][name])
            assert long[i]["captions"] == other[i]["captions"]
        assert (test[i]["image"] != long[i]["image"]).any()
    assert long[4000]["captions"] == long.captions(np.array([3, 4000]))[1]
    train = {long[i]["image"].tobytes() for i in range(300)}
    assert len(train) == 300 and not train & {test[i]["image"].tobytes() for i in range(40)}


def test_table_needs_no_pixels(monkeypatch):
    source = sources.load(config(), "train")
    labels = [source[i]["label"] for i in range(60)]
    monkeypatch.setattr(scenes, "draw", lambda *_: pytest.fail("drew an image"))
    table = sources.table(source)
    np.testing.assert_array_equal(table.labels[:60], labels)
    np.testing.assert_array_equal(table.sizes, [[32, 32]] * 300)
    assert len(table.captions) == 300
    subset = sources.Subset(source, np.array([5, 2]))
    assert sources.table(subset).captions == [table.captions[5], table.captions[2]]


def test_classes_are_balanced_and_prompts_all_used():
    source = sources.load(config(scenes_train=12000), "train")
    table = sources.table(source)
    counts = np.bincount(table.labels, minlength=len(source.classes))
    assert abs(counts - 1000).max() < 5 * 1000**0.5
    for captions in table.captions[:200]:
        assert len(set(captions)) == 5
    sizes = {s: np.array([s in words(c) for row in table.captions for c in row])
             for s in scenes.SIZES}
    assert not (sizes["small"] & sizes["large"]).any()


@pytest.mark.parametrize("objects", [1, 2])
def test_captions_say_what_is_drawn(objects):
    source = sources.load(config(scenes_objects=objects), "train")
    rows = np.arange(300)
    facts = source.facts(rows)
    named = {"color": 0, "texture": 0, "size": 0, "background": 0, "bare": 0}
    for i, captions in enumerate(source.captions(rows)):
        shape = source.classes[facts["shape"][i]]
        color, other = (tuple(scenes.COLORS)[facts[n][i]] for n in ("color", "color2"))
        texture = scenes.TEXTURES[facts["texture"][i]]
        background = (f"on a {tuple(backgrounds.COLORS)[facts['background_color'][i]]} "
                      f"{backgrounds.PATTERNS[facts['background'][i]]} background")
        size = scenes.SIZES[int(facts["size"][i] >= 0.5)]
        assert other != color
        for caption in captions:
            said = words(caption)
            here = [c for c in source.classes if c in said]
            second = source.classes[facts["shape2"][i]]
            assert sorted(here) == sorted([shape] + [second] * (objects == 2)), caption
            if objects == 2:
                assert said.index(shape) < said.index(second)
            before = caption.replace("black and white", "").split(shape)[0].split()
            colors = [c for c in scenes.COLORS if c in before]
            assert colors in ([], [color]), caption
            assert [t for t in scenes.TEXTURES if t in before] in ([], [texture]), caption
            assert [s for s in scenes.SIZES if s in said] in ([], [size]), caption
            assert "on a" not in caption or background in caption, caption
            assert said.count(size) <= 1
            named["color"] += bool(colors)
            named["texture"] += texture in before
            named["size"] += size in said
            named["background"] += background in caption
            named["bare"] += any(templates.fill(p, shape) == caption for p in templates.PROMPTS)
    for name, count in named.items():
        low = 0 if (name, objects) == ("bare", 2) else 100
        assert count >= low, named


@pytest.mark.parametrize("side, objects", [(32, 1), (32, 2), (50, 1), (64, 2)])
def test_the_mask_is_the_object(side, objects):
    """Inside the mask the object's hue, outside the background's, and both of the stated size."""
    source = sources.load(config(image_size=side, scenes_objects=objects), "train")
    facts = source.facts(np.arange(80))
    for i in range(80):
        item = source[i]
        fact = {name: value[i] for name, value in facts.items()}
        image, mask = item["image"].astype(int), item["mask"]
        (y, x, size), *rest = scenes.places(fact, side, objects)
        ys, xs = np.nonzero(mask)
        reach = size / 2 * 1.15 + 1
        assert abs(ys + 0.5 - y).max() <= reach and abs(xs + 0.5 - x).max() <= reach
        assert np.hypot(ys + 0.5 - y, xs + 0.5 - x).max() > 0.3 * size
        assert mask.sum() > 0.12 * size**2
        color = np.array(scenes.COLORS[tuple(scenes.COLORS)[fact["color"]]])
        background = np.array(backgrounds.COLORS[
            tuple(backgrounds.COLORS)[fact["background_color"]]])
        core = image[mask].mean(0) / 255
        assert abs(core / core.max() - color / color.max()).max() < 0.25
        around = ~mask
        for oy, ox, osize in rest:
            grid = np.mgrid[:side, :side] + 0.5
            around &= np.hypot(grid[0] - oy, grid[1] - ox) > osize * 0.6 + 1
            assert max(abs(oy - y), abs(ox - x)) > (osize + size) / 2  # a gap
            assert osize < size
        seen = image[around].mean(0) / 255
        assert abs(seen - background).max() < 0.17, (i, seen, background)


def test_shifted_scenes_share_no_background_and_no_size():
    test, shifted = (sources.load(config(test_split=split, scenes_test=600), "test")
                     for split in ("test", "shifted"))
    assert len(shifted) == 600 and shifted.classes == test.classes
    rows = np.arange(600)
    facts, plain = shifted.facts(rows), test.facts(rows)
    assert set(facts["shape"]) == set(plain["shape"]) and set(facts["color"]) == set(range(8))
    for one, other in ((backgrounds.COLORS, backgrounds.OTHER_COLORS),
                       (backgrounds.PATTERNS, backgrounds.OTHER_PATTERNS)):
        assert not set(one) & set(other)
    assert set(facts["background"]) == set(range(len(backgrounds.OTHER_PATTERNS)))
    assert set(facts["background_color"]) == set(range(len(backgrounds.OTHER_COLORS)))
    size = {}
    for name, found in (("test", plain), ("shifted", facts)):
        size[name] = np.array([scenes.places({k: v[i] for k, v in found.items()}, 32, 1)[0][2]
                               for i in rows])
    small = facts["size"] < 0.5
    assert size["shifted"][small].max() < size["test"].min()
    assert size["shifted"][~small].min() > size["test"].max()
    for i, captions in enumerate(shifted.captions(rows)):
        for caption in captions:
            assert "background" not in caption
            assert [c for c in shifted.classes if c in words(caption)] == [
                shifted.classes[facts["shape"][i]]]
            assert scenes.SIZES[int(small[i])] not in words(caption)
    for i in range(60):  # the mask is the object: the rest has the background's colour
        item = shifted[i]
        color = np.array(tuple(backgrounds.OTHER_COLORS.values())[facts["background_color"][i]])
        seen = item["image"][~item["mask"]].mean(0) / 255
        assert abs(seen - color).max() < 0.17, (i, seen, color)
        assert 0.12 < item["mask"].sum() / size["shifted"][i]**2 < 0.8
    again = sources.load(config(test_split="shifted", scenes_test=9), "test")
    np.testing.assert_array_equal(again[5]["image"], shifted[5]["image"])


def test_the_first_rows_are_what_they_were():
    """A digest made before there was a shifted split: victims trained then are still of this
    data."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        source = sources.load(config(captions_per_row=4), split)
        for i in range(40):
            digest.update(source[i]["image"].tobytes())
            digest.update(repr(source[i]["captions"]).encode())
            digest.update(source[i]["mask"].tobytes())
    assert digest.hexdigest().startswith("3039ada266dd4e81")


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_outlines_are_distances_in_the_unit_circle(name):
    """1-Lipschitz, of some area, and told apart from every other shape by a tenth of the union."""
    at = np.linspace(-1.5, 1.5, 181, dtype=np.float32)
    u, v = at[None, :], at[:, None]
    d = shapes.SHAPES[name](u, v)
    steps = np.abs(np.diff(d, axis=0)).max(), np.abs(np.diff(d, axis=1)).max()
    assert max(steps) <= (at[1] - at[0]) * 1.03
    inside = d < 0
    assert inside[np.hypot(u, v) > 1.2].sum() == 0
    assert np.hypot(*(np.where(inside, g, 0) for g in np.broadcast_arrays(u, v))).max() > 0.85
    for other, shape in shapes.SHAPES.items():
        if other != name:
            there = shape(u, v) < 0
            assert (inside ^ there).sum() > 0.1 * (inside | there).sum(), other


@pytest.mark.parametrize("changes, message", [
    (dict(image_size=16), "32 to 64"),
    (dict(image_size=224), "32 to 64"),
    (dict(scenes_objects=3), "must be 1 or 2"),
    (dict(scenes_train=0), "must be positive"),
    (dict(train_split="shifted", scenes_objects=2), "has scenes of one object"),
    (dict(captions_per_row=81), "0 .every prompt. to 80"),
    (dict(train_split="trian"), "did you mean 'train'"),
    (dict(captions="template"), "did you mean 'templates'"),
    (dict(name="scenes:x"), "should look like 'scenes'"),
])
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        sources.load(config(**changes), "train")


def test_defaults_where_a_config_says_nothing():
    cfg = config()
    for name in ("scenes_train", "scenes_test", "scenes_objects", "captions", "captions_per_row"):
        del cfg[name]
    assert [len(sources.load(cfg, s)) for s in ("train", "test")] == [8000, 1000]
    assert len(sources.load(cfg, "test")[0]["captions"]) == 5


def test_the_table_is_made_once(monkeypatch):
    source = scenes.Scenes("train", 20, 32)
    calls = []
    captions = scenes.Scenes.captions
    monkeypatch.setattr(scenes.Scenes, "captions",
                        lambda self, rows: calls.append(len(rows)) or captions(self, rows))
    assert sources.table(source) is sources.table(source) and calls == [20]
    assert sources.table(scenes.Scenes("train", 20, 32)) is not sources.table(source)


def test_squares_of_the_side_pass_every_transform_unchanged():
    """So 32 px data sets are the same bits with data.center_crop and without."""
    plain, cropped = (sources.load(config(center_crop=crop), "train") for crop in (False, True))
    assert isinstance(plain, scenes.Scenes) and isinstance(cropped, sources.CenterCropped)
    for row in (0, 7):
        image, item = plain[row]["image"], cropped[row]
        np.testing.assert_array_equal(item["image"], image)
        np.testing.assert_array_equal(item["mask"], plain[row]["mask"])
        assert images.fit_square(image, 32)[0] is image is images.test_image(image, 32)
    assert cropped.captions([5]) == plain.captions([5])
    for name in ("labels", "sizes"):
        np.testing.assert_array_equal(getattr(sources.table(cropped), name),
                                      getattr(sources.table(plain), name))


def test_only_pairs_of_any_shape_are_center_cropped():
    from configs import cifar10, clip_cifar10, clip_pairs, clip_scenes, imagenet100, quickstart

    assert clip_pairs.get_config().data.center_crop
    for file in (cifar10, clip_cifar10, clip_scenes, imagenet100, quickstart):
        assert "center_crop" not in file.get_config().data
