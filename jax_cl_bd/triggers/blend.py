"""Blended: the whole image is mixed with uniform noise, (1 - opacity) x + opacity u, clipped.

Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017 (arXiv
1712.05526), as in CleanCLIP (Bansal et al., ICCV 2023, arXiv 2303.03323, backdoor/utils.py):
opacity 0.2, u ~ U[0, 1] for every pixel and channel, drawn anew for every image. `fixed = True`
draws one pattern of size x size pixels, stores it and stretches it over every image (bicubic):
another, usually stronger attack.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import _whole, patch

WHOLE = True  # covers any image: `size` is the stored pattern's side alone
place = _whole.place


def check(cfg) -> None:
    """Raises UserError for an opacity, or the size of a fixed pattern, out of range."""
    _whole.check(cfg)
    if cfg.fixed and cfg.size < 1:
        raise UserError(f"attack.trigger.size is {cfg.size}; it is the side of the fixed pattern, "
                        "at least 1; the image's side shows it pixel for pixel")


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Builds {"opacity": float32 []} with "image" float32 [size, size, 3] for a fixed pattern, else
    "cells" float32 [] (0: every pixel is drawn)."""
    check(cfg)
    params = {"opacity": np.float32(cfg.opacity)}
    if cfg.fixed:
        return {**params, "image": _pattern(key, cfg.size)}
    return {**params, "cells": np.float32(0)}


def same_kind(params: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """Other triggers of the same opacity: for a fixed pattern fresh noise, another on every image;
    for fresh noise, which has no pattern of its own, fresh colours in 4 x 4 large cells."""
    if "image" in params:
        return {"opacity": params["opacity"], "cells": np.float32(0)}
    return {**params, "cells": np.float32(4)}


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array) -> jax.Array:
    """Mixes noise into each box, by its place the whole image.

    Args:
        images: float [N, H, W, 3] in [0, 1].
        boxes: [N, 4] y, x, height, width, rounded to whole pixels.
        key: source of fresh noise, one draw for each image.
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    n, height, width, _ = images.shape
    box, row, column, mask = _whole.inside(boxes, height, width)
    if "image" in params:
        return patch.apply(params, images, box, None)
    noise = jax.vmap(lambda k: jax.random.uniform(k, (height, width, 3)))(_whole.keys(key, n))
    noise = _whole.cells(noise, row, column, box[:, 2:], params["cells"])
    weight = params["opacity"] * mask
    return jnp.clip(images * (1 - weight) + noise * weight, 0.0, 1.0)


def _pattern(key, size):
    return np.asarray(jax.random.uniform(key, (size, size, 3)), np.float32)
