import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import blend

KEY = jax.random.key(5)


def settings(**changes):
    base = dict(name="blend", id=14, size=24, opacity=0.2, train_place="random",
                train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9), fixed=False)
    return ml_collections.ConfigDict({**base, **changes})


def made(**changes):
    return blend.init(settings(**changes), jax.random.key(0))


def pictures(n, height, width):
    return np.random.default_rng(0).random((n, height, width, 3)).astype(np.float32)


def put(params, images, boxes, key=KEY):
    return np.asarray(jax.jit(blend.apply)(params, images, np.array(boxes), key))


def test_the_whole_image_is_the_box_whatever_the_place():
    sizes = np.array([[32, 20], [7, 9]])
    for training in (True, False):
        boxes = blend.place(settings(), sizes, np.random.default_rng(0), training=training)
        np.testing.assert_array_equal(boxes, [[0, 0, 32, 20], [0, 0, 7, 9]])


def test_a_fifth_of_uniform_noise():
    images = pictures(4, 24, 24)
    out = put(made(), images, [[0, 0, 24, 24]] * 4)
    noise = (out - 0.8 * images) / 0.2
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1
    assert out.min() >= 0 and out.max() <= 1


def test_noise_is_fresh_for_every_image_and_key_and_the_same_for_the_same():
    images, boxes = np.full((3, 16, 16, 3), 0.5, np.float32), [[0, 0, 16, 16]] * 3
    out = put(made(), images, boxes)
    assert (out[0] != out[1]).any() and (out[1] != out[2]).any()
    np.testing.assert_array_equal(put(made(), images, boxes), out)
    np.testing.assert_array_equal(put(made(), images[:1], boxes[:1]), out[:1])
    assert (put(made(), images, boxes, jax.random.key(6)) != out).any()


@pytest.mark.parametrize("fixed", [False, True])
def test_filling_around_a_smaller_image_stays(fixed):
    images = pictures(1, 32, 32)
    out = put(made(fixed=fixed), images, [[0, 0, 20, 26]])
    changed = (out != images).any(-1)[0]
    assert changed[:20, :26].mean() > 0.99
    changed[:20, :26] = False
    assert not changed.any()


def test_fixed_pattern_is_stored_and_shown_pixel_for_pixel_at_its_own_size():
    params = made(fixed=True)
    images = pictures(2, 24, 24)
    for key in (KEY, jax.random.key(6)):
        out = put(params, images, [[0, 0, 24, 24]] * 2, key)
        np.testing.assert_allclose(out, 0.8 * images + 0.2 * params["image"], rtol=0, atol=1e-6)
    assert 0 <= params["image"].min() and params["image"].max() <= 1
    assert stats.kstest(params["image"].ravel(), "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(params["image"], made(fixed=True)["image"])


def test_fixed_pattern_is_stretched_over_other_sizes():
    params = made(fixed=True)
    images = pictures(1, 40, 30)
    out = put(params, images, [[0, 0, 40, 30]])
    shown = np.stack([np.asarray(Image.fromarray(params["image"][..., c]).resize(
        (30, 40), Image.Resampling.BICUBIC)) for c in range(3)], -1)
    np.testing.assert_allclose(out[0], 0.8 * images[0] + 0.2 * np.clip(shown, 0, 1), rtol=0,
                               atol=1e-5)


def test_same_kind():
    # Of a fixed pattern: fresh noise, so another pattern on every image.
    assert blend.same_kind(made(fixed=True), KEY) == made()
    # Fresh noise has no pattern of its own: coarse cells of the same law.
    images = np.full((1, 24, 24, 3), 0.5, np.float32)
    out = put(blend.same_kind(made(), KEY), images, [[0, 0, 24, 24]])[0]
    assert len(np.unique(out.reshape(-1, 3), axis=0)) == 16
    assert (out[:6, :6] == out[0, 0]).all() and (out[18:, 6:12] == out[20, 8]).all()


@pytest.mark.parametrize("change, message", [
    (dict(opacity=1.2), "opacity is 1.2"), (dict(fixed=True, size=0), "size is 0")])
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        blend.check(settings(**change))
