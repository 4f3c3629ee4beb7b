"""What triggers that change the whole image share: its box, and coordinates inside it.

Images lie in the top-left corner of the stored square, zeros around them, so "the whole image" is a
box too: everything is computed relative to it, and nothing outside is touched.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError


def place(cfg, sizes: np.ndarray, rng: np.random.Generator, *, training: bool) -> np.ndarray:
    """The whole of each image, int64 [N, 4] (0, 0, height, width), whatever the place and box."""
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def check(cfg) -> None:
    """Raises UserError for an opacity outside (0, 1]."""
    if not 0 < cfg.opacity <= 1:
        raise UserError(f"attack.trigger.opacity is {cfg.opacity}; it is the weight of the trigger,"
                        " above 0 and at most 1")


def inside(boxes: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Coordinates relative to boxes that are rounded to whole pixels.

    Returns:
        box float32 [N, 4]; row [N, H] and column [N, W] of every pixel in its box (negative or too
        large outside); mask bool [N, H, W, 1].
    """
    box = jnp.round(jnp.asarray(boxes, jnp.float32))
    row = jnp.arange(height) - box[:, :1]
    column = jnp.arange(width) - box[:, 1:2]
    rows, columns = (row >= 0) & (row < box[:, 2:3]), (column >= 0) & (column < box[:, 3:])
    return box, row, column, (rows[:, :, None] & columns[:, None, :])[..., None]


def keys(key: jax.Array, count: int) -> jax.Array:
    """One key per image; image i's does not depend on how many follow it."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def cells(noise: jax.Array, row: jax.Array, column: jax.Array, length: jax.Array,
          count: jax.Array) -> jax.Array:
    """Lays noise [N, H, W, 3] over boxes, its first pixel on the box's first.

    Args:
        row, column: float [N, H] and [N, W], as `inside` gives them.
        length: float [N, 2], height and width of the boxes.
        count: float []: 0 draws every pixel of its own; k makes k x k cells of one colour each.
    Returns:
        float [N, H, W, 3]; pixels outside the boxes hold noise too.
    """
    def index(at, length, size):
        coarse = at * count / jnp.maximum(length[:, None], 1.0)
        at = jnp.floor(jnp.where(count > 0, coarse, at))
        return jnp.clip(at, 0, size - 1).astype(jnp.int32)

    rows = index(row, length[:, 0], noise.shape[1])
    columns = index(column, length[:, 1], noise.shape[2])
    return jax.vmap(lambda one, y, x: one[y][:, x])(noise, rows, columns)
