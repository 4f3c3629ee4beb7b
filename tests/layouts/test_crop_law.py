import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_cl_bd.layouts import crop_law

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def torchvision_crop(rng, height, width, scale, ratio, whole_pixels):
    """RandomResizedCrop.get_params in plain Python, with an optional continuous variant."""
    fit = round if whole_pixels else float
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        w, h = fit(np.sqrt(area * aspect)), fit(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            if whole_pixels:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w, 0
            return rng.uniform(0, height - h), rng.uniform(0, width - w), h, w, 0
    if width / height < ratio[0]:
        w, h = width, fit(width / ratio[0])
    elif width / height > ratio[1]:
        h, w = height, fit(height * ratio[1])
    else:
        h, w = height, width
    y, x = (height - h) / 2, (width - w) / 2
    return (y // 1, x // 1, h, w, 1) if whole_pixels else (y, x, h, w, 1)


def draw(n, size, *, pixels=None, scale=SCALE, ratio=RATIO, seed=0):
    keys = jax.random.split(jax.random.key(seed), n)
    sizes = jnp.tile(jnp.asarray([size], jnp.float32), (n, 1))
    sampler = jax.jit(lambda k, s: crop_law.sample(k, s, scale=scale, ratio=ratio, pixels=pixels))
    return np.asarray(sampler(keys, sizes))


@pytest.mark.parametrize("whole_pixels", [False, True])
@pytest.mark.parametrize("size", [(32, 64), (24, 20), (50, 10)])
def test_sampler_has_the_distribution_of_torchvision(size, whole_pixels):
    n = 10_000
    rng = np.random.default_rng(1)
    expected = np.array([torchvision_crop(rng, *size, SCALE, RATIO, whole_pixels)
                         for _ in range(n)])
    boxes = draw(4 * n, size, pixels=1 if whole_pixels else None)
    for axis in range(4):  # Kolmogorov-Smirnov distance of each coordinate, 1e-4 level
        values = np.unique(np.round(np.concatenate([boxes[:, axis], expected[:, axis]]), 3))
        ours = np.searchsorted(np.sort(boxes[:, axis]), values + 5e-4) / (4 * n)
        theirs = np.searchsorted(np.sort(expected[:, axis]), values + 5e-4) / n
        assert abs(ours - theirs).max() < 2.23 * np.sqrt(1 / n + 1 / (4 * n))
    assert ((boxes[:, 0] * boxes[:, 3]).mean()
            == pytest.approx((expected[:, 0] * expected[:, 3]).mean(), rel=0.08, abs=0.1))
    fallback = crop_law.central(jnp.asarray(size, jnp.float32), RATIO, whole_pixels)
    at_fallback = (abs(boxes - np.asarray(fallback)) < 1e-4).all(axis=1).mean()
    # with whole pixels an ordinary try may land on the central box, so count boxes, not tries
    theirs = (abs(expected[:, :4] - np.asarray(fallback)) < 1e-4).all(axis=1).mean()
    assert at_fallback == pytest.approx(theirs, abs=4 * np.sqrt(max(theirs, 1e-3) / n))
    if not whole_pixels:
        assert theirs == expected[:, 4].mean()


def test_boxes_lie_inside_and_whole_pixels_are_whole():
    whole = draw(20_000, (32, 64), pixels=1)
    assert (whole == np.round(whole)).all()
    for boxes in (whole, draw(20_000, (32, 64))):
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= np.array([32, 64]) * (1 + 1e-6)).all()
    last = draw(20_000, (32, 64), pixels=1)
    assert (last[:, 0] + last[:, 2] == 32).mean() > 0.03  # the last offset is inclusive


def test_unit_is_pixels_per_unit():
    np.testing.assert_array_equal(draw(100, (1, 2), pixels=32) * 32, draw(100, (32, 64), pixels=1))


@pytest.mark.parametrize("size,expected", [((1, 2), (0, 1 / 3, 1, 4 / 3)),
                                           ((2, 1), (1 / 3, 0, 4 / 3, 1)),
                                           ((1, 1.2), (0, 0, 1, 1.2))])
def test_fallback_is_the_central_crop(size, expected):
    box = crop_law.central(jnp.asarray(size, jnp.float32), RATIO, False)
    np.testing.assert_allclose(box, expected, rtol=1e-6)
    if size != (1, 1.2):  # scale (0.8, 1) never fits into 2:1
        np.testing.assert_allclose(draw(50, size, scale=(0.8, 1.0)), np.tile(box, (50, 1)),
                                   rtol=1e-5, atol=1e-6)


def midpoints_in_area_and_ratio(height, width, scale, ratio, points=2001):
    """Sizes and weights on the (u, ln r) grid of docs/papers.md, Noisy Alignment"""
    middle = (np.arange(points) + 0.5) / points
    area = height * width * (scale[0] + (scale[1] - scale[0]) * middle)[:, None]
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * middle)[None]
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (w <= width) & (h <= height)
    accepted = fits.mean()
    return w, h, fits / max(fits.sum(), 1) * (1 - (1 - accepted) ** 10), (1 - accepted) ** 10


@pytest.mark.parametrize("size,scale,ratio", [
    ((1, 2), SCALE, RATIO), ((1, 2), (0.08, 1), RATIO), ((1, 1), SCALE, RATIO),
    ((1, 4), SCALE, RATIO), ((2, 1), (0.2, 0.5), (0.5, 1.0)), ((1, 2), (0.8, 1), RATIO)])
def test_quadrature_matches_the_area_and_ratio_grid(size, scale, ratio):
    w, h, weight, fails = midpoints_in_area_and_ratio(*size, scale, ratio)
    with jax.enable_x64(True):
        law = crop_law.sizes_quadrature(jnp.asarray(size, jnp.float64), scale=scale, ratio=ratio)
        np.testing.assert_allclose(law.fallback_rate, fails, rtol=3e-3, atol=1e-9)
        np.testing.assert_allclose(law.weight.sum(), 1 - fails, rtol=1e-3, atol=1e-9)
        for moment in (lambda h, w: w, lambda h, w: h, lambda h, w: w * h, lambda h, w: (w / h)**2):
            np.testing.assert_allclose((moment(law.height, law.width) * law.weight).sum(),
                                       (moment(h, w) * weight).sum(), rtol=1e-3, atol=1e-9)


def test_quadrature_takes_one_scale_and_one_ratio():
    with jax.enable_x64(True):
        law = crop_law.sizes_quadrature(jnp.asarray([1.0, 2.0]), scale=(0.3, 0.3), ratio=(1.0, 1.0))
        np.testing.assert_allclose((law.width * law.weight).sum(), np.sqrt(0.6), rtol=1e-4)
        np.testing.assert_allclose(law.weight.sum(), 1, rtol=1e-3)


def test_sampler_is_the_same_inside_jit_and_per_key():
    one_by_one = np.concatenate([np.asarray(crop_law.sample(
        key[None], jnp.array([[1.0, 2.0]]), scale=SCALE, ratio=RATIO))
        for key in jax.random.split(jax.random.key(0), 4)])
    np.testing.assert_allclose(draw(4, (1, 2)), one_by_one, rtol=1e-6)
