"""BadNets' patch as CleanCLIP makes it: Gaussian noise around the image's mean colour.

Bansal et al., ICCV 2023 (arXiv 2303.03323), backdoor/utils.py, patch type "random": the patch is
the image's mean of each channel plus N(0, 1) noise, drawn anew for every image. `fixed = True`
makes the other, usually stronger attack: one patch clip(0.5 + N(0, 1)) drawn once, stored, and
shown alike on all images. Place "four_corners" puts one patch in all four corners.

Where we differ: values are clipped to [0, 1] before they are stored, where the public code lets
them wrap around in 8 bits. The random corner reaches the last place, S - size, where the code stops
one pixel short of it. Fresh noise is drawn on the pixels of the stored image, and in the four
corners the size counts those too, as in the public code, which resizes first.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.triggers import _whole, patch

PLACES = patch.PLACES + ("four_corners",)


def check(cfg) -> None:
    """Raises UserError for a size, opacity, place or box out of range."""
    patch.check_square(cfg, PLACES)


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Builds {"opacity": float32 []} with, for a fixed patch, "image" float32 [size, size, 3], else
    "cells" float32 [] (0: every pixel is drawn); and "corners" float32 [], the size, where one of
    the places is four_corners."""
    check(cfg)
    params = {"opacity": np.float32(cfg.opacity)}
    if cfg.fixed:
        params["image"] = _pattern(key, cfg.size)
    else:
        params["cells"] = np.float32(0)
    if "four_corners" in (cfg.train_place, cfg.test_place):
        params["corners"] = np.float32(cfg.size)
    return params


def same_kind(params: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """Other triggers of the same size: for a fixed patch fresh noise, another patch on every image;
    for fresh noise, which has no pattern of its own, fresh colours that fill the four quarters."""
    if "image" in params:
        rest = {name: value for name, value in params.items() if name != "image"}
        return {**rest, "cells": np.float32(0)}
    return {**params, "cells": np.float32(2)}


def place(cfg, sizes: np.ndarray, rng: np.random.Generator, *, training: bool) -> np.ndarray:
    """Boxes as patch.place gives them; the whole image for "four_corners", int64 [N, 4].

    Raises:
        UserError: the patch is larger than an image.
    """
    boxes = patch.place(cfg, sizes, rng, training=training)
    if cfg["train_place" if training else "test_place"] == "four_corners":
        return _whole.place(cfg, sizes, rng, training=training)
    return boxes


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array) -> jax.Array:
    """Puts the patch into each box, or into the corners of a box larger than a four-corner patch.

    A box with fractional edges covers its border pixels in part; a box of zero size does nothing.
    The mean is taken over all of `images`, filling around a smaller image included.

    Args:
        images: float [N, H, W, 3] in [0, 1].
        boxes: [N, 4] y, x, height, width in pixels; may be real.
        key: source of fresh noise, one draw for each image (all four corners show the same).
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    boxes = jnp.asarray(boxes, jnp.float32)
    put = _fixed if "image" in params else _fresh(images, key)
    out = images
    for box in _corners(params["corners"], boxes) if "corners" in params else [boxes]:
        out = put(params, out, box)
    return out


def _fixed(params, images, boxes):
    return patch.apply({k: params[k] for k in ("image", "opacity")}, images, boxes, None)


def _fresh(clean, key):
    """Draws the noise; gives put(params, images, boxes)."""
    n, height, width, _ = clean.shape
    noise = jax.vmap(lambda k: jax.random.normal(k, (height, width, 3)))(_whole.keys(key, n))
    mean = clean.mean(axis=(1, 2), keepdims=True)

    def put(params, images, boxes):
        row = jnp.arange(height) - jnp.floor(boxes[:, :1])
        column = jnp.arange(width) - jnp.floor(boxes[:, 1:2])
        shown = jnp.clip(mean + _whole.cells(noise, row, column, boxes[:, 2:], params["cells"]),
                         0.0, 1.0)
        cover = (patch.share(boxes[:, 0], boxes[:, 2], height)[:, :, None]
                 * patch.share(boxes[:, 1], boxes[:, 3], width)[:, None, :])
        weight = params["opacity"] * cover[..., None]
        return images * (1 - weight) + shown * weight

    return put


def _corners(size, boxes):
    """Four lists of boxes: the corners of boxes larger than `size`; others come first, as they are,
    and are empty in the rest."""
    # A single patch on a photograph that was shrunk is up to half a pixel larger than `size`.
    whole = (boxes[:, 2:] > size + 0.5).any(axis=1, keepdims=True)
    square = jnp.full_like(boxes[:, 2:], size)
    for i, (down, across) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        corner = boxes[:, :2] + jnp.array([down, across]) * (boxes[:, 2:] - size)
        yield jnp.where(whole, jnp.concatenate([corner, square], axis=1),
                        boxes if i == 0 else jnp.zeros_like(boxes))


def _pattern(key, size):
    return np.asarray(jnp.clip(0.5 + jax.random.normal(key, (size, size, 3)), 0, 1), np.float32)
