"""WaNet: the image is warped by a small random field, drawn once and stored.

Nguyen and Tran, ICLR 2021 (arXiv 2102.10369), as in CleanCLIP (Bansal et al., ICCV 2023, arXiv
2303.03323, backdoor/utils.py, "warped"): a field U[-1, 1] of size x size x 2, divided by its mean
absolute value; enlarged to the image (bicubic, corners aligned); sampling points = identity +
strength * field / side in coordinates where the image spans [-1, 1], clamped; bilinear sampling,
corners aligned. The size is CleanCLIP's own setting 224 = the image's side, where enlarging changes
nothing and every pixel moves by itself, half a pixel on average at strength 1; WaNet's paper has a
smooth field, size 4 and strength 0.5. The same field fits images of any other size by the same
interpolation; on images that are not square each axis is divided by its own side.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import _whole

WHOLE = True  # covers any image: `size` is the field's side alone
place = _whole.place


def check(cfg) -> None:
    """Raises UserError for a size or strength out of range."""
    if cfg.size < 2:
        raise UserError(f"attack.trigger.size is {cfg.size}; it is the side of the warping field, "
                        "at least 2")
    if cfg.strength <= 0:
        raise UserError(f"attack.trigger.strength is {cfg.strength}; it is above 0, and 1 moves "
                        "pixels by half a pixel on average")


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Builds {"field": float32 [size, size, 2] (x, y; mean absolute value 1), "strength"}."""
    check(cfg)
    return {"field": _field(key, cfg.size), "strength": np.float32(cfg.strength)}


def same_kind(params: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """Another field of the same size and strength."""
    return {**params, "field": _field(key, len(params["field"]))}


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array | None) -> jax.Array:
    """Warps each box, by its place the whole image; no pixel from outside the box comes in.

    Differentiable in params and images.

    Args:
        images: float [N, H, W, 3] in [0, 1].
        boxes: [N, 4] y, x, height, width, rounded to whole pixels.
        key: unused, the field is stored.
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    box, row, column, mask = _whole.inside(boxes, *images.shape[1:3])
    rows = _enlarge(row, box[:, 2:3], len(params["field"]))
    columns = _enlarge(column, box[:, 3:], len(params["field"]))
    field = jnp.einsum("nhy,yxc,nwx->nhwc", rows, params["field"], columns,
                       precision=jax.lax.Precision.HIGHEST)
    height, width = box[:, 2, None, None], box[:, 3, None, None]
    # From [-1, 1] to pixels: half of (side - 1); the clamp is at the first and last pixel.
    y = row[:, :, None] + params["strength"] * field[..., 1] * (height - 1) / 2 / height
    x = column[:, None, :] + params["strength"] * field[..., 0] * (width - 1) / 2 / width
    y = jnp.clip(y, 0, height - 1) + box[:, 0, None, None]
    x = jnp.clip(x, 0, width - 1) + box[:, 1, None, None]
    return jnp.where(mask, jax.vmap(_bilinear)(images, y, x), images)


def _field(key, size):
    field = jax.random.uniform(key, (size, size, 2), minval=-1.0, maxval=1.0)
    return np.asarray(field / jnp.abs(field).mean(), np.float32)


def _enlarge(at, length, side):
    """Weights [N, n, side] of bicubic interpolation, corners aligned, edges replicated.

    Keys' kernel with a = -0.75, the one of torch's bicubic. at: [N, n] pixels of an axis whose box
    has `length` [N, 1] of them.
    """
    centre = at * (side - 1) / jnp.maximum(length - 1, 1)
    first = jnp.floor(centre)
    weights = 0.0
    for tap in range(-1, 3):
        d = jnp.abs(centre - first - tap)
        near = (1.25 * d - 2.25) * d * d + 1
        far = ((-0.75 * d + 3.75) * d - 6) * d + 3
        index = jnp.clip(first + tap, 0, side - 1)[..., None]
        weights += jnp.where(d < 1, near, far)[..., None] * (index == jnp.arange(side))
    return weights


def _bilinear(image, y, x):
    """image [H, W, 3] read at pixel coordinates y, x [H, W] that lie in it."""
    top, left = jnp.floor(y), jnp.floor(x)
    dy, dx = (y - top)[..., None], (x - left)[..., None]
    rows = [jnp.clip(top + i, 0, image.shape[0] - 1).astype(jnp.int32) for i in (0, 1)]
    columns = [jnp.clip(left + i, 0, image.shape[1] - 1).astype(jnp.int32) for i in (0, 1)]
    upper = image[rows[0], columns[0]] * (1 - dx) + image[rows[0], columns[1]] * dx
    lower = image[rows[1], columns[0]] * (1 - dx) + image[rows[1], columns[1]] * dx
    return upper * (1 - dy) + lower * dy
