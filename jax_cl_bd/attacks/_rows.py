"""The stored form of poisons that show one image, with or without a trigger on it."""

from collections.abc import Callable

import numpy as np

from jax_cl_bd.attacks._stamp import stamp
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data.images import fit_square


def plain(plan: Plan, read: Callable[[int], np.ndarray], side: int) -> dict[str, np.ndarray]:
    """Stores images as clean rows are stored (data.images.fit_square).

    Args:
        read: k -> uint8 [H, W, 3], the image of poison k, of the size plan.canvas[k].
    Returns:
        rows {"image": uint8 [m, side, side, 3], "size", "extent": int32 [m, 2]}.
    """
    size, extent = _sizes(plan, side)
    images = np.zeros((len(plan), side, side, 3), np.uint8)
    for k in range(len(plan)):
        images[k] = fit_square(read(k), side)[0]
    return {"image": images, "size": size, "extent": extent}


def stamped(plan: Plan, trigger: tuple, read: Callable[[int], np.ndarray],
            side: int) -> dict[str, np.ndarray]:
    """The same with the trigger on: in the image's own geometry, by the way of a clean row.

    The box of an image larger than the square shrinks with it, each axis by its own factor. While
    the trigger is applied, the square around a smaller image holds the image's mean colour, for
    triggers that look at the whole; afterwards zeros, as around a clean row.

    Args:
        trigger: (module, params).
    """
    size, extent = _sizes(plan, side)
    scale = extent / np.maximum(size, 1)  # [m, 2], y and x
    boxes = plan.trigger_box * np.concatenate([scale, scale], axis=1)

    def filled(k):
        square, (height, width) = fit_square(read(k), side)[0], extent[k]
        if (height, width) == (side, side):
            return square
        image = square[:height, :width]
        out = np.empty_like(square)
        out[:] = np.round(image.mean(axis=(0, 1)))
        out[:height, :width] = image
        return out

    images = stamp(trigger, filled, boxes, plan.seed, (side, side))
    for k, (height, width) in enumerate(extent):
        images[k, height:] = 0
        images[k, :, width:] = 0
    return {"image": images, "size": size, "extent": extent}


def _sizes(plan, side):
    size = plan.canvas.astype(np.int32)
    return size, np.where(size.max(1, initial=0, keepdims=True) > side, side, size).astype(np.int32)
