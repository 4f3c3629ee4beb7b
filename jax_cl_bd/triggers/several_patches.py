"""One trigger of several small patches, at places that differ from image to image.

For an attacker who knows that defenders look for one compact region: each patch is a piece with
pixels of its own, drawn once and the same on all images, and the trigger is all of them together.
After the split triggers of DBA (Xie et al., "Distributed Backdoor Attacks against Federated
Learning", ICLR 2020) and the patches of Adap-Patch (Qi et al., "Revisiting the Assumption of Latent
Separability for Backdoor Defenses", ICLR 2023), whose code was not consulted; size, number and
places are ours.

A box is the rectangle in whose corners the pieces lie: piece 0 top left, 1 bottom right, 2 top
right, 3 bottom left. So a box says all about an image's places, in a plan as under the test
protocol. A box too small for two pieces in a line is one piece's own, which one is drawn by the
key: a part of the trigger, as on the cover images of attacks/image_text_backdoor.py. Pieces have
`size` pixels of the image that they are applied to.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import _whole, patch

CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))  # down, across


def check(cfg) -> None:
    """Raises UserError for a number of patches, size, opacity, place or box out of range."""
    patch.check_square(cfg, patch.PLACES)
    if not 2 <= cfg.patches <= len(CORNERS):
        raise UserError(f"attack.trigger.patches is {cfg.patches}; several patches are 2 to "
                        f"{len(CORNERS)}")


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Draws the pieces clip(0.5 + N(0, 1)), as a fixed noise_patch is drawn: {"image": float32
    [patches, size, size, 3], "opacity", "side": float32 [], the size}."""
    check(cfg)
    return {"image": _pieces(key, (cfg.patches, cfg.size, cfg.size, 3)),
            "opacity": np.float32(cfg.opacity), "side": np.float32(cfg.size)}


def same_kind(params: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """Other pieces of the same number and size."""
    return {**params, "image": _pieces(key, np.shape(params["image"]))}


def showing(params: dict[str, np.ndarray], image: np.ndarray) -> dict[str, np.ndarray]:
    """The same pieces at the same places, each of them the picture `image` [p, p, 3]."""
    return {**params, "image": np.broadcast_to(image, (len(params["image"]), *image.shape)).copy()}


def place(cfg, sizes: np.ndarray, rng: np.random.Generator, *, training: bool) -> np.ndarray:
    """Chooses the rectangles.

    "random": height and width uniform from two pieces' to all of train_box or test_box, then the
    corner uniform with the whole in it. "center": half of the image's sides, in its middle.

    Args:
        sizes: int [N, 2], (height, width) in pixels.
        rng: four numbers per image are drawn in row order.
    Returns:
        int64 [N, 4]: y, x, height, width in pixels.
    Raises:
        UserError: no room for two pieces in a line.
    """
    sizes, phase = np.asarray(sizes, np.int64).reshape(-1, 2), "train" if training else "test"
    draws, least = rng.random((len(sizes), 4)), 2 * cfg.size
    if cfg[f"{phase}_place"] == "center":
        first, span = np.zeros_like(sizes), sizes
        extent = np.maximum(sizes // 2, least)
        corner = (sizes - extent) // 2
    else:
        low, high = cfg[f"{phase}_box"]
        first = np.floor(sizes * low).astype(np.int64)
        span = np.floor(sizes * high).astype(np.int64) - first
        extent = least + np.floor(draws[:, :2] * (span - least + 1)).astype(np.int64)
        corner = first + np.floor(draws[:, 2:] * (span - extent + 1)).astype(np.int64)
    if len(sizes) and (span < least).any():
        row = int(span.min(axis=1).argmin())
        raise UserError(f"two patches of {cfg.size} px do not fit side by side into the "
                        f"{phase}_box of an image of {sizes[row, 0]} x {sizes[row, 1]} px (height "
                        f"x width); set --config.attack.trigger.size={span.min() // 2} or less")
    return np.concatenate([corner, extent], axis=1)


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array) -> jax.Array:
    """Puts the pieces into the corners of each box, or one piece into a box of its size.

    Args:
        images: float [N, H, W, 3] in [0, 1]. boxes: [N, 4] y, x, height, width in pixels; one of
            zero size does nothing.
        key: says which piece a small box shows.
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    boxes, size, pieces = jnp.asarray(boxes, jnp.float32), params["side"], params["image"]
    single = (boxes[:, 2:] < 2 * size - 0.5).any(axis=1, keepdims=True)
    drawn = jax.vmap(lambda k: jax.random.randint(k, (1,), 0, len(pieces)))(
        _whole.keys(key, len(images)))
    square = jnp.full_like(boxes[:, 2:], size)
    out = images
    for i, corner in enumerate(CORNERS[:len(pieces)]):
        place = boxes[:, :2] + jnp.array(corner) * (boxes[:, 2:] - size)
        alone = jnp.where(drawn == i, boxes, 0.0)
        box = jnp.where(single, alone, jnp.concatenate([place, square], axis=1))
        out = patch.apply({"image": pieces[i], "opacity": params["opacity"]}, out, box, None)
    return out


def _pieces(key, shape):
    return np.asarray(jnp.clip(0.5 + jax.random.normal(key, shape), 0, 1), np.float32)
