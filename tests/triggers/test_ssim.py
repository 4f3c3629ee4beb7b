"""SSIM against scikit-image's."""

import jax
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from jax_cl_bd.triggers.ssim import ssim


def reference(a, b, data_range):
    return np.mean([structural_similarity(
        x, y, win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=data_range, channel_axis=-1) for x, y in zip(a, b)])


@pytest.mark.parametrize("shape, data_range", [((3, 32, 32, 3), 1.0), ((2, 16, 21, 3), 4.0)])
def test_equals_scikit_image(shape, data_range):
    rng = np.random.default_rng(0)
    a = rng.normal(size=shape)
    b = 0.7 * a + 0.3 * rng.normal(size=shape)
    got = jax.jit(ssim, static_argnums=2)(np.float32(a), np.float32(b), data_range)
    np.testing.assert_allclose(got, reference(a, b, data_range), rtol=1e-4)


def test_an_image_is_like_itself_and_only_so():
    rng = np.random.default_rng(1)
    a, b = np.float32(rng.random((2, 1, 12, 12, 3)))
    assert float(ssim(a, a)) == pytest.approx(1, abs=1e-5)
    assert float(ssim(a, b)) < 0.5 and float(ssim(a, b)) == pytest.approx(float(ssim(b, a)))
