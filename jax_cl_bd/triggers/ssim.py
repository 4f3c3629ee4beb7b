"""Structural similarity of images (Wang et al. 2004), differentiable."""

import jax
import jax.numpy as jnp
import numpy as np

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def ssim(a: jax.Array, b: jax.Array, data_range: float = 1.0) -> jax.Array:
    """The mean SSIM of [N, H, W, C] and [N, H, W, C]: a Gaussian window of 11 pixels and deviation
    1.5 where it lies wholly in the image, each channel by itself, biased variances."""
    assert min(a.shape[1:3]) >= _WINDOW, a.shape
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-offsets**2 / (2 * _SIGMA**2))
    height, width = (_band(weights / weights.sum(), side) for side in a.shape[1:3])

    def blur(x):
        return jnp.einsum("ih,nhwc,jw->nijc", height, x, width,
                          precision=jax.lax.Precision.HIGHEST)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * data_range)**2, (_K2 * data_range)**2
    return ((2 * mean_a * mean_b + c1) * (2 * both + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def _band(weights, side):
    """The matrix [side - 10, side] that slides the window along an axis."""
    rows = side - _WINDOW + 1
    out = np.zeros((rows, side), np.float32)
    for i in range(rows):
        out[i, i:i + _WINDOW] = weights
    return out
