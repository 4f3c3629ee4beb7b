"""A square patch pasted onto an image: Saha et al., CVPR 2022 (arXiv 2105.10123), and most others.

`opacity` is the weight of the trigger: result = (1 - opacity) * image + opacity * patch, so 1
covers the image and 0 leaves it alone. The published codes state the opposite: SSL-Backdoor's alpha
is the weight of the IMAGE under the patch (its 0.00 is opacity 1); Noisy Alignment's
`add_watermark` in patch mode likewise (alpha 0.2 is opacity 0.8), while its blend mode, and the
newer framework of the same author, give the weight of the trigger.

Ids 10 to 19 are the ten HTBA triggers; id 0 is the solid yellow (1, 1, 0) of CleanCLIP (Bansal et
al., ICCV 2023, arXiv 2303.03323, backdoor/utils.py). An optimised patch takes the place of
params["image"] and may have any side: pasted at its own size it is shown pixel for pixel.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.data import resample
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.triggers import htba

PLACES = ("random", "center")
YELLOW = 0


def check(cfg) -> None:
    """Validates the config group `attack.trigger`.

    Raises:
        UserError: id, size, opacity, place or box out of range.
    """
    if cfg.id != YELLOW:
        htba.check(cfg.id)
    check_square(cfg, PLACES)


def check_square(cfg, places: tuple[str, ...]) -> None:
    """Validates size, opacity, places and boxes of any trigger that is a square on the image.

    Raises:
        UserError: the first of them out of range; `places` are the rules that the trigger knows.
    """
    if cfg.size < 1:
        raise UserError(f"attack.trigger.size is {cfg.size}; it is a side in pixels, at least 1")
    if not 0 < cfg.opacity <= 1:
        raise UserError(f"attack.trigger.opacity is {cfg.opacity}; it is the weight of the trigger,"
                        " above 0 and at most 1 (opaque)")
    for phase in ("train", "test"):
        where, box = cfg[f"{phase}_place"], tuple(cfg[f"{phase}_box"])
        if where not in places:
            raise unknown(f"attack.trigger.{phase}_place", where, places)
        if len(box) != 2 or not 0 <= box[0] < box[1] <= 1:
            raise UserError(f"attack.trigger.{phase}_box is {box}; it is (low, high) with "
                            "0 <= low < high <= 1, shares of the image's sides")


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Builds the patch {"image": float32 [80, 80, 3] in [0, 1], "opacity": float32 []}; the key is
    unused, since nothing about it is random."""
    check(cfg)
    if cfg.id == YELLOW:
        image = np.broadcast_to(np.float32([1, 1, 0]), (htba.SIDE, htba.SIDE, 3)).copy()
    else:
        image = htba.image(cfg.id)
    return {"image": image, "opacity": np.float32(cfg.opacity)}


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

    Differentiable in params and images. A box of the patch's own size on whole pixels shows it
    unchanged. A box with fractional edges covers its border pixels in part; a box of zero size does
    nothing.

    Args:
        params: "image" float [p, p, 3] of any side p, or one patch for each image [N, p, p, 3];
            "opacity" float [].
        images: float [N, H, W, 3] in [0, 1].
        boxes: [N, 4] y, x, height, width in pixels; may be real and not square.
        key: unused, the patch is not random.
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    boxes, image = jnp.asarray(boxes, jnp.float32), params["image"]
    rows, row_cover = _axis(boxes[:, 0], boxes[:, 2], images.shape[1], image.shape[-3])
    columns, column_cover = _axis(boxes[:, 1], boxes[:, 3], images.shape[2], image.shape[-2])
    # Full float32: accelerators would otherwise round pixels to bfloat16.
    letters = "yxc" if image.ndim == 3 else "nyxc"
    patch = jnp.einsum(f"nhy,{letters},nwx->nhwc", rows, image, columns,
                       precision=jax.lax.Precision.HIGHEST)
    patch = jnp.clip(patch, 0.0, 1.0)  # bicubic overshoots
    weight = params["opacity"] * (row_cover[:, :, None] * column_cover[:, None, :])[..., None]
    return images * (1 - weight) + patch * weight


def share(start: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """The share [N, size] of each pixel of an axis that the intervals [start, start + length) [N]
    cover."""
    pixel = jnp.arange(size)
    start, end = start[:, None], (start + length)[:, None]
    return jnp.clip(jnp.minimum(pixel + 1, end) - jnp.maximum(pixel, start), 0.0, 1.0)


def _axis(start, length, size, side):
    """Weights [N, size, side] of the patch along one axis and the share [N, size] it covers."""
    factor = side / jnp.maximum(length, 1e-6)
    return (resample.weights(-start * factor, size * factor, size, side, "bicubic"),
            share(start, length, size))
