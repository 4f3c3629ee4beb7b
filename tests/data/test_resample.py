"""resample.py against PIL and SciPy."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from jax_cl_bd.data import resample
from jax_cl_bd.errors import UserError

PIL_KERNELS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(0, 0, 30, 40), (3, 5, 20, 12), (10, 1, 7, 39), (0, 0, 4, 4)])
@pytest.mark.parametrize("out", [8, 16, 64])
def test_a_crop_and_resize_equals_pil(kernel, box, out):
    y, x, h, w = box
    image = np.random.default_rng(0).random((30, 40)).astype(np.float32)
    reference = Image.fromarray(image[y:y + h, x:x + w]).resize((out, out), PIL_KERNELS[kernel])
    rows = np.asarray(resample.weights(float(y), float(h), out, 30, kernel))
    columns = np.asarray(resample.weights(float(x), float(w), out, 40, kernel))
    # float-mode PIL: no rounding to 1/255 between the two passes
    np.testing.assert_allclose(rows @ image @ columns.T, np.asarray(reference), atol=1e-4)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_rows_sum_to_one_and_stay_inside(kernel):
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 20, 50).astype(np.float32)
    length = rng.uniform(1, 30 - start).astype(np.float32)
    w = np.asarray(resample.weights(start, length, 9, 30, kernel))
    assert w.shape == (50, 9, 30)
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-5)
    pixel = np.arange(30)
    outside = (pixel < np.floor(start)[:, None]) | (pixel >= np.ceil(start + length)[:, None])
    assert outside.any()
    assert not w[np.broadcast_to(outside[:, None], w.shape)].any()


def test_placing_is_cropping_with_roles_swapped():
    # 5 pixels enlarged to the box [2, 12) of 20: outside the box nothing is in reach
    w = np.asarray(resample.weights(-2 * 5 / 10, 20 * 5 / 10, 20, 5))
    image = np.random.default_rng(2).random((5, 5)).astype(np.float32)
    reference = np.asarray(Image.fromarray(image).resize((10, 10), PIL_KERNELS["bilinear"]))
    np.testing.assert_allclose((w @ image @ w.T)[2:12, 2:12], reference, atol=1e-5)
    assert not w[:1].any() and not w[13:].any()


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_equals_scipy(sigma):
    image = np.random.default_rng(3).random((20, 20)).astype(np.float32)
    radius = resample.blur_radius(sigma, 20)
    w = np.asarray(resample.blur_weights(jnp.array([sigma]), 20, radius))[0]
    reference = scipy.ndimage.gaussian_filter(image.astype(float), sigma, mode="mirror",
                                              radius=radius)
    np.testing.assert_allclose(w @ image @ w.T, reference, atol=1e-5)


def test_blur_radius_fits_the_smallest_images():
    assert resample.blur_radius(2.0, 224) == 6
    assert resample.blur_radius(2.0, 4) == 3
    w = np.asarray(resample.blur_weights(jnp.array([2.0]), 4, 3))[0]
    np.testing.assert_allclose(w.sum(-1), 1, rtol=1e-5)


def test_an_unknown_kernel_is_named():
    with pytest.raises(UserError, match="did you mean 'bilinear'"):
        resample.check("bilinaer")
