"""Colour augmentations on planar images [3, N, H, W] in [0, 1], one strength per image.

torchvision's formulas (transforms.v2, the PIL-free path), each clamped to [0, 1]. `factor`,
`shift` are [N]; 1 and 0 leave an image as it is, which is how an operation is skipped for a row.
Channels first: a CPU then works on long rows instead of triples.
"""

import jax
import jax.numpy as jnp


def luma(x: jax.Array) -> jax.Array:
    """ITU-R 601 grey value [N, H, W]."""
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def brightness(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales towards black."""
    return jnp.clip(x * _per_image(factor), 0.0, 1.0)


def contrast(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the mean grey value of the image."""
    return _blend(x, luma(x).mean((-2, -1), keepdims=True), factor)


def saturation(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Blends with the grey image."""
    return _blend(x, luma(x), factor)


def grayscale(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """Replaces all channels by the grey value where chosen [N]."""
    return jnp.where(_per_image(chosen), luma(x), x)


def hue(x: jax.Array, shift: jax.Array) -> jax.Array:
    """Turns the hue by `shift` of a full circle, through HSV.

    HSV to RGB without its six cases: channel c is value - chroma * clip(min(k, 4 - k), 0, 1) with
    k = (offset_c + 6 hue) mod 6 and offsets 5, 3, 1; equal to the case table. The largest channel
    is found by comparing channels, not by equality with their maximum: a compiler may compute a
    channel twice, rounded differently.
    """
    red, green, blue = x
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        (red >= green) & (red >= blue), (green - blue) * scale,
        jnp.where(green >= blue, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale))
    sextant = sextant + 6.0 * _per_image(shift)

    def channel(offset):
        k = offset + sextant
        k = k - 6.0 * jnp.floor(k * (1 / 6))
        return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return jnp.clip(jnp.stack([channel(5.0), channel(3.0), channel(1.0)]), 0.0, 1.0)


def solarize(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """Inverts values from 0.5 up where chosen [N]."""
    return jnp.where(_per_image(chosen) & (x >= 0.5), 1.0 - x, x)


def _per_image(factor):
    return factor[:, None, None]


def _blend(x, other, factor):
    factor = _per_image(factor)
    return jnp.clip(factor * x + (1.0 - factor) * other, 0.0, 1.0)
