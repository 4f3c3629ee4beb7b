import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import htba, patch


def settings(**changes):
    base = dict(name="patch", id=14, size=50, opacity=1.0, train_place="random",
                train_box=(0.25, 0.75), test_place="random", test_box=(0.1, 0.9))
    return ml_collections.ConfigDict({**base, **changes})


def pil_resized(height, width):
    image = htba.image(14)
    return np.clip(np.stack([np.asarray(Image.fromarray(image[..., c]).resize(
        (width, height), Image.Resampling.BICUBIC)) for c in range(3)], -1), 0, 1)


def canvas(n, h, w, seed=0):
    return np.random.default_rng(seed).random((n, h, w, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return patch.init(settings(), jax.random.key(0))


def test_corner_range_of_the_test_protocol():
    sizes = np.full((20000, 2), 224)
    boxes = patch.place(settings(), sizes, np.random.default_rng(0), training=False)
    # papers/SSL-Backdoor: 22..151 on a 224 canvas, both ends included and both reached.
    assert boxes[:, :2].min() == 22 and boxes[:, :2].max() == 151
    counts = np.bincount(boxes[:, 1] - 22, minlength=130)
    assert counts.min() > 0.5 * len(boxes) / 130 and counts.max() < 1.6 * len(boxes) / 130
    assert (boxes[:, 2:] == 50).all()


def test_corner_range_on_a_native_photograph():
    sizes = np.tile([375, 500], (20000, 1))
    boxes = patch.place(settings(), sizes, np.random.default_rng(0), training=True)
    # y in [int(93.75), int(281.25 - 50)], x in [125, 325]
    assert (boxes[:, 0].min(), boxes[:, 0].max()) == (93, 231)
    assert (boxes[:, 1].min(), boxes[:, 1].max()) == (125, 325)


def test_corner_is_pinned_where_the_box_is_too_small():
    boxes = patch.place(settings(), np.full((100, 2), 60), np.random.default_rng(0), training=True)
    assert (boxes[:, :2] == 15).all()  # int(60 * 0.25); int(45 - 50) is smaller


def test_center_is_floored_and_per_phase():
    cfg = settings(size=7, train_place="center")
    sizes = np.array([[32, 33], [10, 7]])
    boxes = patch.place(cfg, sizes, np.random.default_rng(0), training=True)
    np.testing.assert_array_equal(boxes, [[12, 13, 7, 7], [1, 0, 7, 7]])
    random = patch.place(cfg, np.full((50, 2), 32), np.random.default_rng(0), training=False)
    assert len(np.unique(random[:, 0])) > 5


def test_place_of_an_image_does_not_depend_on_how_many_follow():
    sizes = np.random.default_rng(1).integers(60, 500, (300, 2))
    whole = patch.place(settings(), sizes, np.random.default_rng(7), training=True)
    part = patch.place(settings(), sizes[:11], np.random.default_rng(7), training=True)
    np.testing.assert_array_equal(whole[:11], part)


def test_trigger_larger_than_an_image():
    with pytest.raises(UserError, match="50 px does not fit an image of 40 x 60 .*size=40 or less"):
        patch.place(settings(), np.array([[60, 60], [40, 60]]), np.random.default_rng(0),
                    training=True)


def test_box_of_the_patchs_own_size_shows_it_exactly(params):
    images = canvas(1, 100, 120)
    out = np.array(jax.jit(patch.apply)(params, images, np.array([[11, 23, 80, 80]]), None))
    np.testing.assert_array_equal(out[0, 11:91, 23:103], htba.image(14))
    out[0, 11:91, 23:103] = images[0, 11:91, 23:103]
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("box", [(5, 9, 50, 50), (0, 0, 8, 8), (3, 40, 30, 17), (2, 1, 100, 90)])
def test_resizes_as_pil_does(params, box):
    y, x, h, w = box
    images = canvas(1, 110, 120)
    out = np.array(patch.apply(params, images, np.array([box]), None))
    np.testing.assert_allclose(out[0, y:y + h, x:x + w], pil_resized(h, w), rtol=0, atol=2e-5)
    images[0, y:y + h, x:x + w] = out[0, y:y + h, x:x + w]
    np.testing.assert_array_equal(out, images)


def test_opacity_is_the_weight_of_the_trigger(params):
    faint = patch.init(settings(opacity=0.3), jax.random.key(0))
    images, boxes = canvas(1, 64, 64), np.array([[4, 6, 20, 20]])
    out = np.asarray(patch.apply(faint, images, boxes, None))
    expected = 0.7 * images[0, 4:24, 6:26] + 0.3 * pil_resized(20, 20)
    np.testing.assert_allclose(out[0, 4:24, 6:26], expected, rtol=0, atol=2e-5)


def test_every_image_has_its_own_box(params):
    images = canvas(3, 40, 40)
    boxes = np.array([[0, 0, 8, 8], [10, 20, 12, 12], [32, 5, 8, 8]])
    out = patch.apply(params, images, boxes, None)
    for i in range(3):
        alone = patch.apply(params, images[i:i + 1], boxes[i:i + 1], None)
        np.testing.assert_allclose(out[i], alone[0], rtol=0, atol=1e-6)


def test_fractional_edges_cover_their_pixels_in_part(params):
    flat = {"image": np.ones((80, 80, 3), np.float32), "opacity": np.float32(1)}
    out = np.asarray(patch.apply(flat, np.zeros((1, 12, 12, 3), np.float32),
                                 np.array([[2.25, 3.0, 4.5, 2.5]], np.float32), None))[0, ..., 0]
    rows = np.array([0, 0, .75, 1, 1, 1, .75, 0, 0, 0, 0, 0])
    columns = np.array([0, 0, 0, 1, 1, .5, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(out, rows[:, None] * columns, rtol=0, atol=1e-5)


def test_patch_cut_by_the_border_and_box_of_no_size(params):
    images = canvas(2, 30, 30)
    out = np.asarray(patch.apply(params, images, np.array([[20, 22, 16, 16], [0, 0, 0, 0]]), None))
    assert np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1
    # The last rows before the cut lack kernel taps beyond it, so compare well inside.
    np.testing.assert_allclose(out[0, 20:26, 22:26], pil_resized(16, 16)[:6, :4], rtol=0, atol=2e-2)
    np.testing.assert_array_equal(out[1], images[1])


def test_differentiable_in_the_patch(params):
    boxes = np.array([[3, 4, 10, 10]])

    def total(image):
        out = patch.apply({**params, "image": image}, jnp.zeros((1, 20, 20, 3)), boxes, None)
        return out.sum()

    grey = jnp.full((80, 80, 3), 0.5)
    gradient = jax.grad(total)(grey)
    # 10x10 px of a resize whose weights sum to one per pixel.
    np.testing.assert_allclose(gradient.sum(), 10 * 10 * 3, rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(id=20), "no trigger 20"), (dict(size=0), "size is 0"),
    (dict(opacity=0.0), "opacity is 0"),
    (dict(opacity=1.5), "opacity is 1.5"), (dict(train_place="centre"), "did you mean 'center'"),
    (dict(test_box=(0.9, 0.1)), "test_box is"), (dict(train_box=(0.1, 1.2)), "train_box is")])
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        patch.check(settings(**change))


@pytest.mark.parametrize("side", [5, 16, 97])
def test_an_optimised_patch_of_any_side_comes_back_unchanged(side):
    image = np.random.default_rng(side).random((side, side, 3)).astype(np.float32)
    image = np.round(image * 255) / np.float32(255)  # optimised patches are saved in 8 bits
    images = canvas(2, 110, 100)
    boxes = np.array([[7, 2, side, side], [0, 100 - side, side, side]])
    params = {"image": image, "opacity": np.float32(1)}
    out = np.array(jax.jit(patch.apply)(params, images, boxes, None))
    for k, (y, x, _, _) in enumerate(boxes):
        np.testing.assert_allclose(out[k, y:y + side, x:x + side], image, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(np.round(out[k, y:y + side, x:x + side] * 255),
                                      np.round(image * 255))
        images[k, y:y + side, x:x + side] = out[k, y:y + side, x:x + side]
    np.testing.assert_array_equal(out, images)  # and nothing beside it changes


def test_a_small_patch_is_enlarged_as_pil_does():
    image = np.random.default_rng(0).random((6, 6, 3)).astype(np.float32)
    params = {"image": image, "opacity": np.float32(1)}
    out = np.asarray(patch.apply(params, canvas(1, 40, 40), np.array([[3, 4, 20, 13]]), None))
    expected = np.stack([np.asarray(Image.fromarray(image[..., c]).resize(
        (13, 20), Image.Resampling.BICUBIC)) for c in range(3)], -1)
    np.testing.assert_allclose(out[0, 3:23, 4:17], np.clip(expected, 0, 1), rtol=0, atol=2e-5)


def test_one_patch_for_each_image():
    patches = np.random.default_rng(0).random((2, 6, 6, 3)).astype(np.float32)
    out = np.asarray(patch.apply({"image": patches, "opacity": np.float32(1)}, canvas(2, 20, 20),
                                 np.array([[1, 2, 6, 6], [9, 4, 6, 6]]), None))
    np.testing.assert_array_equal(out[0, 1:7, 2:8], patches[0])
    np.testing.assert_array_equal(out[1, 9:15, 4:10], patches[1])


def test_id_0_is_solid_yellow():
    params = patch.init(settings(id=0, size=7), jax.random.key(0))
    out = np.asarray(patch.apply(params, canvas(1, 20, 20), np.array([[5, 6, 7, 7]]), None))
    np.testing.assert_allclose(out[0, 5:12, 6:13] - [1.0, 1.0, 0.0], 0, atol=1e-6)


def test_the_whole_image_as_box_reaches_every_corner_both_ends_included():
    cfg = settings(size=16, train_box=(0.0, 1.0))
    boxes = patch.place(cfg, np.full((5000, 2), 32), np.random.default_rng(0), training=True)
    for axis in (0, 1):
        np.testing.assert_array_equal(np.unique(boxes[:, axis]), np.arange(32 - 16 + 1))
