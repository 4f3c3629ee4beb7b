"""RandomResizedCrop as a distribution: a sampler and a quadrature of one law.

The law is torchvision's: up to ten tries of area u ~ U(scale) and log-uniform aspect ratio
r = w / h, the first that fits is placed uniformly, and if none fits the central crop is taken
(docs/papers.md, Noisy Alignment). The training augmentation draws from `sample`, the layout solver
integrates over `sizes_quadrature`: what is solved is what is trained.

Lengths are in any unit, boxes are (y, x, h, w). `pixels=None` is the continuous law; `pixels=p`
is torchvision's rounding on a grid of p pixels per unit, with inclusive integer offsets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TRIES = 10


class Crops(NamedTuple):
    """The law of the crop's size on given canvases (leading axes: any)."""

    height: jax.Array  # [..., n, n] sizes of accepted crops
    width: jax.Array  # [..., n, 1]
    weight: jax.Array  # [..., n, n] their probabilities; they sum to 1 - fallback_rate
    fallback_box: jax.Array  # [..., 4] the central crop
    fallback_rate: jax.Array  # [...] probability that ten tries fail


def sample(keys, sizes, *, scale, ratio, pixels=None) -> jax.Array:
    """Draws one crop box per key; jittable.

    Args:
        keys: [N] typed PRNG keys.
        sizes: [N, 2] (h, w) of the images, in any unit.
        scale: (lowest, highest) share of the image's area.
        ratio: (lowest, highest) aspect w / h.
        pixels: None for real-valued boxes, else pixels per unit (1 if `sizes` is in pixels).

    Returns:
        float32 [N, 4] (y, x, h, w) in the unit of `sizes`.
    """
    unit = 1.0 if pixels is None else 1.0 / pixels
    sizes = jnp.asarray(sizes, jnp.float32) / unit
    if pixels is not None:
        sizes = jnp.round(sizes)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (2 * TRIES + 2,)))(keys)
    area, shape, offset = draws[:, :TRIES], draws[:, TRIES:-2], draws[:, -2:]
    low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
    area = sizes.prod(axis=1, keepdims=True) * (scale[0] + (scale[1] - scale[0]) * area)
    shape = jnp.exp(low + (high - low) * shape)
    tries = jnp.stack([jnp.sqrt(area / shape), jnp.sqrt(area * shape)], axis=-1)  # [N, 10, 2]
    if pixels is not None:
        tries = jnp.round(tries)
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(axis=-1)
    first = jnp.take_along_axis(tries, fits.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    if pixels is None:
        corner = offset * (sizes - first)
    else:
        # float32 rounds offset * (n + 1) up to n + 1 now and then
        corner = jnp.minimum(jnp.floor(offset * (sizes - first + 1)), sizes - first)
    boxes = jnp.concatenate([corner, first], axis=-1)
    boxes = jnp.where(fits.any(axis=1)[:, None], boxes, central(sizes, ratio, pixels is not None))
    return boxes * unit


def central(sizes, ratio, whole_pixels: bool) -> jax.Array:
    """The crop taken after ten failures: the largest central one within `ratio`, [..., 4]."""
    height, width = sizes[..., 0], sizes[..., 1]
    h = jnp.minimum(height, width / ratio[0])
    w = jnp.minimum(width, height * ratio[1])
    if whole_pixels:
        h, w = jnp.round(h), jnp.round(w)
    y, x = (height - h) / 2, (width - w) / 2
    if whole_pixels:
        y, x = jnp.floor(y), jnp.floor(x)
    return jnp.stack([y, x, h, w], axis=-1)


def sizes_quadrature(canvas, *, scale, ratio, whole_pixels=False, points=256) -> Crops:
    """The law of the crop's size on a grid of `points` x `points` nodes, retries included.

    The map from (u, ln r) to (w, h) has a constant Jacobian, so a try's size is uniform over the
    region {scale, ratio} and an accepted one uniform over its part with w <= W and h <= H. The
    midpoint grid is laid over exactly that part: rejection costs no accuracy. Run it under
    `jax.enable_x64(True)` where more than about 1e-5 matters.

    Args:
        canvas: [..., 2] (h, w); whole pixels if `whole_pixels`, which rounds sizes as torchvision.
        scale, ratio: as in `sample`; an empty interval is widened by 1e-5.
        points: nodes per axis; the error falls with its square.
    """
    height, width = canvas[..., 0], canvas[..., 1]
    half = 0.5 if whole_pixels else 0.0  # w + 0.5 still rounds down to w
    low_scale, low = scale[0], ratio[0]
    high_scale = jnp.maximum(scale[1], low_scale * (1 + 1e-5))
    high = jnp.maximum(ratio[1], low * (1 + 1e-5))
    area, tall, wide = height * width, height + half, width + half
    w_from = jnp.maximum(jnp.sqrt(low_scale * area * low), low_scale * area / tall)
    w_from = jnp.maximum(w_from, half)
    w_to = jnp.minimum(jnp.minimum(jnp.sqrt(high_scale * area * high), tall * high), wide)
    step = jnp.maximum(w_to - w_from, 0) / points
    middle = (jnp.arange(points) + 0.5) / points
    w = w_from[..., None] + step[..., None] * middle * points  # [..., n]
    area, tall = area[..., None], tall[..., None]
    h_from = jnp.maximum(jnp.maximum(low_scale * area / w, w / high), half)
    h_to = jnp.minimum(jnp.minimum(high_scale * area / w, w / low), tall)
    span = jnp.maximum(h_to - h_from, 0) * step[..., None]
    h = h_from[..., None] + jnp.maximum(h_to - h_from, 0)[..., None] * middle  # [..., n, n]
    accepted = span.sum(axis=-1)
    region = height * width * (high_scale - low_scale) * jnp.log(high / low) / 2
    fails = jnp.clip(1 - accepted / region, 0, 1) ** TRIES
    weight = (1 - fails)[..., None] * span / jnp.where(accepted > 0, accepted, 1)[..., None]
    weight = jnp.broadcast_to(weight[..., None] / points, h.shape)
    w = w[..., None]
    if whole_pixels:
        h, w = jnp.round(h), jnp.round(w)
    return Crops(h, w, weight, central(canvas, ratio, whole_pixels), fails)
