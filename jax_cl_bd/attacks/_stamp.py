"""Puts a trigger on stored images, in batches of one fixed shape: one compile per shape."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.metrics import Progress

BATCH = 64


def stamp(trigger: tuple, read: Callable[[int], np.ndarray], boxes: np.ndarray,
          seeds: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Stamps the trigger on m images.

    Args:
        trigger: (module, params).
        read: k -> uint8 [H, W, 3], image k.
        boxes: [m, 4] y, x, height, width in pixels of image k; may be real.
        seeds: int64 [m]; image k is stamped with the key of its own seed, so that it does not
            depend on the others of its batch.
        shape: (H, W).
    Returns:
        uint8 [m, H, W, 3]; pixels that the trigger leaves alone come back unchanged.
    """
    module, params = trigger
    m = len(boxes)
    out = np.zeros((m, *shape, 3), np.uint8)
    bar = Progress("render poisons", m) if m > BATCH else None  # a single batch is instant
    for start in range(0, m, BATCH):
        count = min(BATCH, m - start)
        part = slice(start, start + count)
        images = np.zeros((BATCH, *shape, 3), np.uint8)
        for j in range(count):
            images[j] = read(start + j)
        batch_boxes = _padded(boxes[part].astype(np.float32))
        batch_seeds = _padded(seeds[part].astype(np.uint32))
        out[part] = _stamp(module.apply, params, images, batch_boxes, batch_seeds)[:count]
        if bar:
            bar.update(count)
    if bar:
        bar.close()
    return out


@functools.partial(jax.jit, static_argnums=0)
def _stamp(apply, params, images, boxes, seeds):
    def one(image, box, seed):
        return apply(params, image[None], box[None], jax.random.key(seed))[0]

    images = jax.vmap(one)(images.astype(jnp.float32) / 255, boxes, seeds)
    return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def _padded(array):
    return np.concatenate([array, np.zeros((BATCH - len(array),) + array.shape[1:], array.dtype)])
