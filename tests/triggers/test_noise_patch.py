import jax
import ml_collections
import numpy as np
import pytest
from scipy import stats

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import noise_patch

KEY = jax.random.key(5)


def settings(**changes):
    base = dict(name="noise_patch", id=14, size=16, opacity=1.0, train_place="random",
                train_box=(0.0, 1.0), test_place="random", test_box=(0.0, 1.0), fixed=False)
    return ml_collections.ConfigDict({**base, **changes})


def made(**changes):
    return noise_patch.init(settings(**changes), jax.random.key(0))


def flat(n, side, colour):
    return np.broadcast_to(np.float32(colour), (n, side, side, 3)).copy()


def put(params, images, boxes, key=KEY):
    return np.asarray(jax.jit(noise_patch.apply)(params, images, np.array(boxes), key))


def test_patch_is_the_mean_of_each_channel_plus_standard_normal_noise_clipped():
    colour = np.array([0.2, 0.5, 0.8])
    out = put(made(), flat(20, 40, colour), [[4, 6, 32, 32]] * 20)[:, 4:36, 6:38]
    n = out[..., 0].size
    for c, mean in enumerate(colour):
        # What is cut off at either end, and the law of what lies between.
        for share, expected in [((out[..., c] == 0).mean(), stats.norm.cdf(-mean)),
                                ((out[..., c] == 1).mean(), stats.norm.sf(1 - mean))]:
            assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
        middle = out[..., c][(out[..., c] > 0) & (out[..., c] < 1)][:2000]
        law = stats.truncnorm(-mean, 1 - mean, loc=mean)
        assert stats.kstest(middle, law.cdf).pvalue > 1e-3
    assert out.min() == 0 and out.max() == 1


def test_the_mean_is_the_images_own():
    dark, light = (put(made(), flat(1, 32, grey), [[0, 0, 16, 16]]) for grey in (0.4, 0.5))
    dark, light = dark[0, :16, :16], light[0, :16, :16]
    free = (dark > 0) & (dark < 1) & (light > 0) & (light < 1)
    assert free.mean() > 0.2
    np.testing.assert_allclose(light[free] - dark[free], 0.1, rtol=0, atol=1e-5)


def test_noise_is_fresh_for_every_image_and_key_and_the_same_for_the_same():
    images, boxes = flat(3, 24, 0.5), [[2, 3, 16, 16]] * 3
    out = put(made(), images, boxes)
    assert (out[0] != out[1]).any() and (out[1] != out[2]).any()
    np.testing.assert_array_equal(put(made(), images, boxes), out)
    assert (put(made(), images, boxes, jax.random.key(6)) != out).any()
    np.testing.assert_array_equal(put(made(), images[:2], boxes[:2]), out[:2])


def test_noise_moves_with_the_box():
    one, other = (put(made(), flat(1, 40, 0.5), [box]) for box in ((0, 0, 9, 9), (20, 13, 9, 9)))
    np.testing.assert_array_equal(one[0, :9, :9], other[0, 20:29, 13:22])


def test_only_the_box_changes():
    images = np.random.default_rng(0).random((2, 30, 30, 3)).astype(np.float32)
    out = put(made(), images, [[3, 5, 8, 8], [22, 22, 8, 8]])
    changed = (out != images).any(-1)
    assert changed[0, 3:11, 5:13].all() and changed[1, 22:, 22:].all()
    assert changed.sum() == 2 * 64
    np.testing.assert_array_equal(put(made(), images, [[3, 5, 0, 0]] * 2), images)


@pytest.mark.parametrize("fixed", [False, True])
def test_opacity_and_fractional_edges(fixed):
    images = flat(1, 30, 0.5)
    box = [[4, 6, 16, 16]]
    full, half = put(made(fixed=fixed), images, box), put(made(fixed=fixed, opacity=0.5), images,
                                                          box)
    np.testing.assert_allclose(half, (images + full) / 2, rtol=0, atol=1e-6)
    edge = put(made(fixed=fixed), images, np.array([[4.25, 6.0, 8.0, 8.0]], np.float32))
    changed = np.abs(edge - images).max(-1)[0] > 1e-6
    assert changed[4, 6:14].any() and changed[12, 6:14].any() and not changed[13].any()
    assert np.abs(edge - images)[0, 12].max() <= 0.25 * 0.5 + 1e-6  # a quarter of a pixel


def test_fixed_pattern_is_drawn_once_stored_and_the_same_everywhere():
    params = made(fixed=True)
    images = np.random.default_rng(0).random((2, 24, 24, 3)).astype(np.float32)
    for key in (KEY, jax.random.key(6)):
        out = put(params, images, [[1, 2, 16, 16], [8, 8, 16, 16]], key)
        np.testing.assert_array_equal(out[0, 1:17, 2:18], params["image"])
        np.testing.assert_array_equal(out[1, 8:, 8:], params["image"])
    again, other = made(fixed=True), noise_patch.init(settings(fixed=True), jax.random.key(1))
    np.testing.assert_array_equal(params["image"], again["image"])
    assert (params["image"] != other["image"]).any()
    assert abs((params["image"] == 0).mean() - stats.norm.cdf(-0.5)) < 0.06  # clipped N(0.5, 1)


@pytest.mark.parametrize("fixed", [False, True])
def test_four_corners_show_one_patch(fixed):
    params = made(fixed=fixed, train_place="four_corners")
    box = noise_patch.place(settings(train_place="four_corners"), np.array([[40, 50]]),
                            np.random.default_rng(0), training=True)
    np.testing.assert_array_equal(box, [[0, 0, 40, 50]])
    images = np.full((1, 60, 60, 3), 0.5, np.float32)  # the image fills 40 x 50 of the square
    out = put(params, images, box)[0]
    for y in (0, 24):
        for x in (0, 34):
            np.testing.assert_allclose(out[y:y + 16, x:x + 16], out[:16, :16], rtol=0, atol=1e-6)
    assert (out[:16, :16] != 0.5).mean() > 0.9
    assert (out != 0.5).any(-1).sum() == pytest.approx(4 * 16 * 16, abs=2)
    # In a place of its own size the same trigger is one patch.
    one = put(params, images, [[5, 6, 16, 16]])[0]
    np.testing.assert_allclose(one[5:21, 6:22], out[:16, :16], rtol=0, atol=1e-6)
    assert (one != 0.5).any(-1).sum() <= 16 * 16
    # Once, not four times over.
    faint = made(fixed=fixed, train_place="four_corners", opacity=0.5)
    np.testing.assert_allclose(put(faint, images, [[5, 6, 16, 16]])[0], (one + 0.5) / 2, rtol=0,
                               atol=1e-6)


def test_a_patch_of_a_shrunk_photograph_is_still_one_patch():
    """Its box was rounded on the photograph, so it may be a little larger than the size."""
    images, box = np.full((1, 40, 40, 3), 0.5, np.float32), [[5.3, 6.1, 16.4, 16.4]]
    several = made(fixed=True, test_place="four_corners")
    single = {name: value for name, value in several.items() if name != "corners"}
    np.testing.assert_array_equal(put(several, images, box), put(single, images, box))


def test_corner_is_uniform_and_both_ends_are_included():
    boxes = noise_patch.place(settings(), np.full((20000, 2), 40), np.random.default_rng(0),
                              training=True)
    for axis in (0, 1):
        counts = np.bincount(boxes[:, axis])
        assert len(counts) == 40 - 16 + 1
        assert counts.min() > 0.8 * 20000 / 25 and counts.max() < 1.2 * 20000 / 25


def test_center_and_per_phase_places():
    cfg = settings(train_place="center", test_place="four_corners", size=7)
    args = cfg, np.array([[32, 33]]), np.random.default_rng(0)
    np.testing.assert_array_equal(noise_patch.place(*args, training=True), [[12, 13, 7, 7]])
    np.testing.assert_array_equal(noise_patch.place(*args, training=False), [[0, 0, 32, 33]])


def test_same_kind_of_a_fixed_pattern_is_fresh_noise():
    assert noise_patch.same_kind(made(fixed=True), KEY) == made()


def test_same_kind_of_fresh_noise_fills_quarters():
    out = put(noise_patch.same_kind(made(), KEY), flat(1, 20, 0.5), [[2, 3, 16, 16]])
    patch = out[0, 2:18, 3:19].reshape(2, 8, 2, 8, 3).transpose(0, 2, 1, 3, 4).reshape(4, 64, 3)
    assert (patch == patch[:, :1]).all() and len(np.unique(patch[:, 0], axis=0)) == 4


def test_trigger_larger_than_an_image():
    for where in ("random", "four_corners"):
        with pytest.raises(UserError, match="16 px does not fit an image of 12 x 20"):
            noise_patch.place(settings(train_place=where), np.array([[12, 20]]),
                              np.random.default_rng(0), training=True)


@pytest.mark.parametrize("change, message", [
    (dict(size=0), "size is 0"), (dict(opacity=0.0), "opacity is 0"),
    (dict(train_place="four_corner"), "did you mean 'four_corners'"),
    (dict(test_box=(0.9, 0.1)), "test_box is")])
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        noise_patch.check(settings(**change))
