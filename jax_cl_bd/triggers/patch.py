"""A square patch pasted onto an image: Saha et al., CVPR 2022 (arXiv 2105.10123), and most others.

`opacity` is the weight of the trigger: result = (1 - opacity) * image + opacity * patch, so 1
covers the image and 0 leaves it alone. The published codes state the opposite: SSL-Backdoor's alpha
is the weight of the IMAGE under the patch (its 0.00 is opacity 1); Noisy Alignment's
`add_watermark` in patch mode likewise (alpha 0.2 is opacity 0.8), while its blend mode, and the
newer framework of the same author, give the weight of the trigger.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.data import resample
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.triggers import htba

PLACES = ("random", "center")


def check(cfg) -> None:
    """Validates the config group `attack.trigger`.

    Raises:
        UserError: id, size, opacity, place or box out of range.
    """
    htba.check(cfg.id)
    if cfg.size < 1:
        raise UserError(f"attack.trigger.size is {cfg.size}; it is a side in pixels, at least 1")
    if not 0 < cfg.opacity <= 1:
        raise UserError(f"attack.trigger.opacity is {cfg.opacity}; it is the weight of the trigger,"
                        " above 0 and at most 1 (opaque)")
    for phase in ("train", "test"):
        where, box = cfg[f"{phase}_place"], tuple(cfg[f"{phase}_box"])
        if where not in PLACES:
            raise unknown(f"attack.trigger.{phase}_place", where, PLACES)
        if len(box) != 2 or not 0 <= box[0] < box[1] <= 1:
            raise UserError(f"attack.trigger.{phase}_box is {box}; it is (low, high) with "
                            "0 <= low < high <= 1, shares of the image's sides")


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Builds the patch {"image": float32 [80, 80, 3] in [0, 1], "opacity": float32 []}; the key is
    unused, since nothing about it is random."""
    check(cfg)
    return {"image": htba.image(cfg.id), "opacity": np.float32(cfg.opacity)}


def place(cfg, sizes: np.ndarray, rng: np.random.Generator, *, training: bool) -> np.ndarray:
    """Chooses where the patch goes on each image.

    "random" is the rule of SSL-Backdoor (its generate_poison.py): the corner x is uniform over the
    integers from int(W lo) to max(int(W lo), int(W hi - w)), both included, and y likewise, so the
    whole patch lies in the box; where the box is too small the corner is pinned to int(W lo) and
    the image's border may cut the patch. "center" is floor((W - w) / 2).

    Args:
        sizes: int [N, 2], (height, width) in pixels.
        rng: two numbers per image are drawn in row order, so the place of image i does not depend
            on how many follow it.
        training: use train_place and train_box, else test_place and test_box.
    Returns:
        int64 [N, 4]: y, x, height, width in pixels.
    Raises:
        UserError: the patch is larger than an image.
    """
    sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    draws = rng.random((len(sizes), 2))
    if len(sizes) and cfg.size > sizes.min():
        row = int(sizes.min(axis=1).argmin())
        raise UserError(f"a trigger of {cfg.size} px does not fit an image of {sizes[row, 0]} x "
                        f"{sizes[row, 1]} px (height x width); set --config.attack.trigger.size="
                        f"{sizes.min()} or less")
    phase = "train" if training else "test"
    if cfg[f"{phase}_place"] == "center":
        corner = (sizes - cfg.size) // 2
    else:
        low, high = cfg[f"{phase}_box"]
        first = np.floor(sizes * low).astype(np.int64)
        last = np.maximum(first, np.floor(sizes * high - cfg.size).astype(np.int64))
        corner = first + np.floor(draws * (last - first + 1)).astype(np.int64)
    return np.concatenate([corner, np.full_like(corner, cfg.size)], axis=1)


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array | None) -> jax.Array:
    """Pastes the patch, resized into each box by antialiased bicubic interpolation.

    Differentiable in params and images. An 80x80 box on whole pixels shows the patch unchanged. A
    box with fractional edges covers its border pixels in part; a box of zero size does nothing.

    Args:
        images: float [N, H, W, 3] in [0, 1].
        boxes: [N, 4] y, x, height, width in pixels; may be real and not square.
        key: unused, the patch is not random.
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    boxes = jnp.asarray(boxes, jnp.float32)
    rows, row_cover = _axis(boxes[:, 0], boxes[:, 2], images.shape[1])
    columns, column_cover = _axis(boxes[:, 1], boxes[:, 3], images.shape[2])
    # Full float32: accelerators would otherwise round pixels to bfloat16.
    patch = jnp.einsum("nhy,yxc,nwx->nhwc", rows, params["image"], columns,
                       precision=jax.lax.Precision.HIGHEST)
    patch = jnp.clip(patch, 0.0, 1.0)  # bicubic overshoots
    weight = params["opacity"] * (row_cover[:, :, None] * column_cover[:, None, :])[..., None]
    return images * (1 - weight) + patch * weight


def _axis(start, length, size):
    """Weights [N, size, 80] of the patch along one axis and the share [N, size] it covers."""
    pixel = jnp.arange(size)
    end = start + length
    cover = jnp.clip(jnp.minimum(pixel + 1, end[:, None]) - jnp.maximum(pixel, start[:, None]),
                     0.0, 1.0)
    factor = htba.SIDE / jnp.maximum(length, 1e-6)
    return resample.weights(-start * factor, size * factor, size, htba.SIDE, "bicubic"), cover
