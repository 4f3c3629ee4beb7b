"""augment.py: geometry, order of operations, and what the draws depend on."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs.common import MOCO_VIEW
from jax_cl_bd.data import augment, color, images, resample
from jax_cl_bd.errors import UserError

N, M, S = 12, 3, 16
RNG = np.random.default_rng(0)
OFF = dict(MOCO_VIEW, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0,
           grayscale=0.0, blur=0.0, solarize=0.0)
SIDES = np.full((N, 2), S, np.int32)


def config(view1=MOCO_VIEW, view2=MOCO_VIEW):
    return ml_collections.ConfigDict(dict(
        augment=dict(view1=dict(view1), view2=dict(view2), interpolation="bilinear"),
        data=dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))))


def make_data(m=M):
    clean = RNG.integers(0, 256, (N, S, S, 3), dtype=np.uint8)
    poison = np.zeros((m, 2 * S, 2 * S, 3), np.uint8)
    poison[:, :S] = RNG.integers(0, 256, (m, S, 2 * S, 3), dtype=np.uint8)
    wide = np.full((m, 2), (S, 2 * S), np.int32)
    pair = np.arange(N + m, dtype=np.int32)
    if m:
        pair[N + 1] = 4  # poison 1 is seen beside clean row 4
        pair[N + 2] = N  # poison 2 beside poison 0
    return {"clean": {"image": clean, "size": SIDES, "extent": SIDES},
            "poison": {"image": poison, "size": wide, "extent": wide}, "pair": pair}


def draw(cfg, data, batch, seed=0):
    run = _compiled(ml_collections.FrozenConfigDict(cfg))
    return jax.tree.map(np.asarray, run(data, batch, jax.random.key(seed)))


@functools.cache
def _compiled(cfg):
    return jax.jit(lambda d, b, k: augment.views(cfg, d, b, k))


def test_a_crop_of_the_reference_part_of_a_poison_is_the_clean_reference():
    reference, shadow = RNG.integers(0, 256, (2, S, S, 3), dtype=np.uint8)
    for canvas, corner in ((np.concatenate([reference, shadow], 1), (0, 0)),
                           (np.concatenate([shadow, reference], 1), (0, S)),
                           (np.concatenate([shadow, reference], 0), (S, 0))):
        stored, size, extent = images.fit_square(canvas, 2 * S)
        assert size == extent == canvas.shape[:2]
        box = jnp.array([[*corner, S, S]], jnp.float32)
        for kernel in resample.KERNELS:
            seen = augment.resample_box(jnp.asarray(stored[None]), box, S,
                                        flip=jnp.array([False]), kernel=kernel)
            np.testing.assert_allclose(np.moveaxis(np.asarray(seen[:, 0]), 0, -1),
                                       reference / 255, atol=1 / 255)


def test_whole_crops_give_the_images_back_and_a_flip_mirrors_them():
    data, batch = make_data(), {"index": np.array([3, 0, 7], np.int32)}
    made = draw(config(OFF, dict(OFF, flip=1.0)), data, batch)
    expected = data["clean"]["image"][batch["index"]] / 255
    np.testing.assert_allclose(made["view1"], expected, atol=1e-5)
    np.testing.assert_allclose(made["view2"], expected[:, :, ::-1], atol=1e-5)
    np.testing.assert_array_equal(made["index"], batch["index"])


def test_poisons_and_pairs_come_from_their_arrays():
    data = make_data()
    wide = dict(OFF, crop_ratio=(2.0, 2.0))  # the whole of a 2:1 canvas; 1:2 of a square
    index = np.array([2, N, N + 1, N + 2], np.int32)
    made = draw(config(wide, wide), data, {"index": index})

    def whole(poison):  # the canvas shrunk to S x S, by PIL
        return images.resize(data["poison"]["image"][poison, :S], S, S,
                             images.Image.Resampling.BILINEAR) / 255

    for k in range(3):
        np.testing.assert_allclose(made["view1"][1 + k], whole(k), atol=1.5 / 255)
    np.testing.assert_allclose(made["view2"][1], whole(0), atol=1.5 / 255)
    np.testing.assert_allclose(made["view2"][3], whole(0), atol=1.5 / 255)
    clean = draw(config(wide, wide), data, {"index": np.array([4], np.int32)})["view1"][0]
    np.testing.assert_allclose(made["view2"][2], clean, atol=1e-5)


def test_streamed_slots_give_the_same_views_as_resident_arrays():
    data = make_data()
    index = np.array([1, N, N + 1, N + 2, 9], np.int32)
    slots = np.array([1, 0, 4, 0, 9])  # of rows without a clean image: any
    batch = {"index": index, **{k: v[slots] for k, v in data["clean"].items()}}
    streamed = draw(config(), {k: data[k] for k in ("poison", "pair")}, batch)
    resident = draw(config(), data, {"index": index})
    for name in ("view1", "view2"):
        np.testing.assert_allclose(streamed[name], resident[name], atol=1e-6)


@pytest.mark.parametrize("m", [0, M])
def test_views_depend_on_key_and_index_alone(m):
    data = make_data(m)
    first = draw(config(), data, {"index": np.array([1, 5, 8, 2], np.int32)})
    again = draw(config(), data, {"index": np.array([1, 5, 8, 2], np.int32)})
    other = draw(config(), data, {"index": np.array([8, 11, 0, 5], np.int32)})
    for name in ("view1", "view2"):
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_allclose(first[name][2], other[name][0], atol=1e-6)
        np.testing.assert_allclose(first[name][1], other[name][3], atol=1e-6)
    assert np.abs(first["view1"] - first["view2"]).mean() > 0.02
    changed = draw(config(), data, {"index": np.array([1, 5, 8, 2], np.int32)}, seed=1)
    assert np.abs(first["view1"] - changed["view1"]).mean() > 0.02


def test_an_image_stored_out_of_shape_is_cropped_in_its_own_geometry():
    # A 16 x 64 picture kept as a full square: crops of ratio 1 cover a quarter of its width.
    row = {"image": jnp.zeros((200, S, S, 3), jnp.uint8).at[:, :, ::2].set(255),
           "size": jnp.tile(jnp.array([[16, 64]]), (200, 1)),
           "extent": jnp.tile(jnp.array([[S, S]]), (200, 1))}
    boxes = []
    spy = functools.partial(_remember, boxes, augment.resample_box)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "resample_box", spy)
        augment.crop(row, jax.random.split(jax.random.key(0), 200), S, scale=(0.05, 0.2),
                     ratio=(1.0, 1.0), flip=jnp.zeros(200, bool), kernel="bilinear")
    box = np.asarray(boxes[0])
    np.testing.assert_allclose(box[:, 2], 4 * box[:, 3], rtol=1e-4)
    assert (box[:, :2] + box[:, 2:] <= S + 1e-3).all() and box.min() >= 0


def _remember(boxes, function, image, box, side, **settings):
    boxes.append(box)
    return function(image, box, side, **settings)


def test_rates_and_ranges_of_the_colour_draws():
    cfg = dict(OFF, jitter=0.8, contrast=0.0, saturation=0.0, hue=0.0)
    n = 2000
    sizes = np.full((n, 2), 4, np.int32)
    data = {"clean": {"image": np.full((n, 4, 4, 3), 128, np.uint8), "size": sizes,
                      "extent": sizes}, "poison": make_data(0)["poison"],
            "pair": np.arange(n, dtype=np.int32)}
    made = draw(config(cfg, dict(OFF, flip=0.5)), data, {"index": data["pair"]})
    factor = made["view1"][:, 0, 0, 0] / (128 / 255)
    moved = np.abs(factor - 1) > 1e-4
    assert abs(moved.mean() - 0.8) < 4 * np.sqrt(0.16 / n)  # 4 standard deviations
    assert 0.6 <= factor.min() < 0.62 and 1.38 < factor.max() <= 1.4001


def test_the_pipeline_equals_its_parts_in_order():
    recipe = ml_collections.ConfigDict(dict(OFF, jitter=1.0, grayscale=0.5, blur=1.0,
                                            blur_sigma=(1.0, 1.0), solarize=1.0))
    data = make_data()
    index = np.arange(4, dtype=np.int32)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    seen = augment.one_view(recipe, "bilinear", mean, std, data, {"index": index},
                            jax.random.key(5))
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(5), i), 1) for i in index]
    u = np.stack([np.asarray(jax.random.uniform(k, (10,))) for k in keys]).T
    x = jnp.moveaxis(jnp.asarray(data["clean"]["image"][index] / 255, jnp.float32), -1, 0)
    for change, draws in zip((color.brightness, color.contrast, color.saturation), u[2:5]):
        x = change(x, 0.6 + 0.8 * draws)
    x = color.hue(x, 0.1 * (2 * u[5] - 1))
    x = color.grayscale(x, u[6] < 0.5)
    band = resample.blur_weights(jnp.ones(4), S, 3)
    x = jnp.clip(resample.apply(x, band, band), 0, 1)
    x = color.solarize(x, jnp.ones(4, bool))
    expected = (np.moveaxis(np.asarray(x), 0, -1) - mean) / np.array(std)
    np.testing.assert_allclose(seen, expected, atol=5e-5)


@pytest.mark.parametrize("change, message", [
    (dict(flip=1.5), "flip is 1.5"), (dict(hue=0.6), "hue is 0.6"),
    (dict(crop_scale=(0.5, 0.2)), "crop_scale"), (dict(crop_scale=(0.0, 1.0)), "crop_scale"),
    (dict(blur_sigma=(0.0, 1.0)), "blur_sigma"),
])
def test_mistakes_are_named(change, message):
    augment.check(MOCO_VIEW, "bicubic")
    with pytest.raises(UserError, match=message):
        augment.check(dict(MOCO_VIEW, **change), "bilinear")
    with pytest.raises(UserError, match="bicubic"):
        augment.check(MOCO_VIEW, "bicubik")
