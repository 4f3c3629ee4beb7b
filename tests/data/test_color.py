"""color.py against colorsys and NumPy."""

import colorsys

import jax.numpy as jnp
import numpy as np

from jax_cl_bd.data import color

RNG = np.random.default_rng(0)
X = RNG.random((3, 4, 6, 5)).astype(np.float32)
X[:, 0, 0] = [[0.0] * 5, [0.0] * 5, [0.0] * 5]  # black
X[:, 0, 1] = 0.5  # grey
X[:, 0, 2] = [[1.0], [0.0], [0.0]]  # red
FACTOR = np.array([0.0, 0.6, 1.0, 1.7], np.float32)


def _grey(x):
    return np.tensordot([0.299, 0.587, 0.114], x, 1)


def _blend(a, b, factor):
    factor = factor[:, None, None]
    return np.clip(factor * a + (1 - factor) * b, 0, 1)


def test_brightness_contrast_saturation():
    mean = _grey(X).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(color.brightness(X, FACTOR), _blend(X, 0 * X, FACTOR), atol=1e-6)
    np.testing.assert_allclose(color.contrast(X, FACTOR), _blend(X, mean, FACTOR), atol=1e-6)
    np.testing.assert_allclose(color.saturation(X, FACTOR), _blend(X, _grey(X), FACTOR), atol=1e-6)
    for change in (color.brightness, color.contrast, color.saturation):
        np.testing.assert_array_equal(change(jnp.asarray(X), FACTOR)[:, 2], X[:, 2])


def test_hue_equals_colorsys():
    shift = np.array([0.0, 0.1, -0.37, 0.5], np.float32)
    made = np.asarray(color.hue(jnp.asarray(X), shift))
    for n in range(4):
        for pixel, seen in zip(X[:, n].reshape(3, -1).T, made[:, n].reshape(3, -1).T):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            np.testing.assert_allclose(seen, colorsys.hsv_to_rgb((h + shift[n]) % 1, s, v),
                                       atol=2e-6)


def test_grayscale_and_solarize_only_where_chosen():
    chosen = np.array([True, False, True, False])
    grey = np.asarray(color.grayscale(jnp.asarray(X), chosen))
    solar = np.asarray(color.solarize(jnp.asarray(X), chosen))
    for n in range(4):
        if chosen[n]:
            np.testing.assert_allclose(grey[:, n], np.stack([_grey(X[:, n])] * 3), atol=1e-6)
            expected = np.where(X[:, n] < 0.5, X[:, n], 1 - X[:, n])
            np.testing.assert_allclose(solar[:, n], expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(grey[:, n], X[:, n])
            np.testing.assert_array_equal(solar[:, n], X[:, n])
