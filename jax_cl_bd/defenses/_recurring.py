"""The picture that the suspected images of one label have in common, to the pixel.

Algorithm 1 frames a region, not a patch: mostly the trigger with some of its surroundings and,
where a backdoor is weak, often an object. A pasted trigger is the same in every image and an object
is not, so the window is looked for that many of the images show and clean ones do not (edges and
plain ground are everywhere), and it is grown as long as what lies beside it is the same in them
too. Ours, no step of EftCLIP's (docs/papers.md).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.defenses._find_trigger import Candidate
from jax_cl_bd.defenses._pinpoint import FEWEST

SHARE = 1 / 3  # of the other images in which a window must recur
_COMMON = 0.05  # of the clean images, in which it must not
_CLEAN = 128  # that are looked at
_ALIKE = 0.8  # of a window's variance that another must share
_FLAT = 12.0  # deviation, of 255, of a window or line that tells nothing
_SMALLEST = 4  # side of the windows that are tried; a sixteenth of larger images
_GROWN = 12.0  # mean deviation, of 255, up to which a line belongs to the picture
_BLOCK = 64  # windows compared at once


@dataclasses.dataclass(frozen=True)
class Recurring:
    """`pixels` uint8 [h, w, 3], and the candidates that show them, framed anew."""

    pixels: np.ndarray
    where: list[Candidate]


def find(candidates: list[Candidate], shown: np.ndarray, clean: np.ndarray) -> Recurring | None:
    """The picture that recurs in the most images, None where none does in SHARE of them.

    Args:
        candidates: of one label. shown: their images, uint8 [N, S, S, 3].
        clean: images without a trigger, uint8 [M, S, S, 3].
    """
    side = max(_SMALLEST, shown.shape[1] // 16)
    at = _windows(candidates, shown, side)
    if not len(at):
        return None
    pictures = np.stack([shown[i, y:y + side, x:x + side] for i, y, x in at])
    like, places = _everywhere(shown, pictures)
    there = like >= _ALIKE
    likely = np.flatnonzero(_recurs(there))
    if not len(likely):
        return None
    some = clean[np.linspace(0, len(clean) - 1, min(len(clean), _CLEAN)).astype(int)]
    usual = (_everywhere(some, pictures[likely])[0] >= _ALIKE).mean(1) > _COMMON
    there[np.delete(np.arange(len(there)), likely[~usual])] = False
    if not there.any():
        return None
    # The most images, and among equals the most alike.
    best = np.lexsort((np.where(there, like, 0).sum(1), there.sum(1)))[-1]
    rows = np.flatnonzero(there[best])
    corners = np.stack(np.divmod(places[best, rows], shown.shape[2] - side + 1), axis=1)
    (top, left, bottom, right), middle = _grown(shown[rows], corners, side)
    where = []
    for row, (y, x) in zip(rows, corners):
        y0, x0 = max(0, y + top), max(0, x + left)
        y1, x1 = min(shown.shape[1], y + bottom), min(shown.shape[2], x + right)
        where.append(dataclasses.replace(
            candidates[row], box=(int(y0), int(x0), int(y1 - y0), int(x1 - x0)),
            pixels=shown[row, y0:y1, x0:x1].copy()))
    return Recurring(middle, where)


def _recurs(there):
    """Which windows are in enough of the images: bool [W] of bool [W, N]."""
    count = there.sum(1)
    return (count >= FEWEST) & (count - 1 >= SHARE * (there.shape[1] - 1))


def _windows(candidates, shown, side):
    """Places (image, y, x) of all windows in the boxes that are not flat: int [W, 3]."""
    found, step, size = [], max(1, side // 4), shown.shape[1]
    for i, candidate in enumerate(candidates):
        y, x, height, width = candidate.box
        for a in range(max(0, y - 1), min(size - side, y + height + 1 - side) + 1, step):
            for b in range(max(0, x - 1), min(size - side, x + width + 1 - side) + 1, step):
                if _deviation(shown[i, a:a + side, b:b + side]) >= _FLAT:
                    found.append((i, a, b))
    return np.array(found, int).reshape(-1, 3)


def _deviation(part):
    """From the mean colour: a plain blue ground has none."""
    return np.sqrt(part.reshape(-1, 3).astype(float).var(0).mean())


def _everywhere(shown, pictures):
    """How like each image is to each picture where it is most, [W, N], and that place, flat."""
    padded = np.zeros((-(-len(pictures) // _BLOCK) * _BLOCK, *pictures.shape[1:]), np.uint8)
    padded[:len(pictures)] = pictures
    found = [_likeness(shown, padded[start:start + _BLOCK])
             for start in range(0, len(padded), _BLOCK)]
    return tuple(np.concatenate([np.asarray(part[i]) for part in found])[:len(pictures)]
                 for i in range(2))


@jax.jit
def _likeness(x, t):
    """1 - |window - picture|^2 / |picture - its mean colour|^2, the highest over places, and where.
    """
    # x: [N, S, S, 3], t: [W, h, w, 3]
    x, t = x.astype(jnp.float32) / 255 - 0.5, t.astype(jnp.float32) / 255 - 0.5

    def windows(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", precision="highest",
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    squares = windows((x * x).sum(-1, keepdims=True), jnp.ones((*t.shape[1:3], 1, 1)))
    apart = squares - 2 * windows(x, t.transpose(1, 2, 3, 0)) + (t * t).sum((1, 2, 3))
    spread = ((t - t.mean((1, 2), keepdims=True))**2).sum((1, 2, 3))
    like = 1 - apart / jnp.maximum(spread, 1e-6)
    like = like.reshape(len(x), -1, len(t)).transpose(2, 0, 1)
    return like.max(-1), like.argmax(-1)


def _grown(shown, corners, side):
    """The window of the images [M, S, S, 3] at their corners, with what else they have in common
    but plain ground: (top, left, bottom, right) from the corner on, and the picture uint8."""
    reach, size = shown.shape[1] // 4, shown.shape[1]
    across = side + 2 * reach
    stack = np.full((len(shown), across, across, 3), np.nan)
    for own, image, (y, x) in zip(stack, shown, corners):
        y0, x0 = max(0, y - reach), max(0, x - reach)
        part = image[y0:min(size, y + side + reach), x0:min(size, x + side + reach)]
        a, b = y0 - (y - reach), x0 - (x - reach)
        own[a:a + part.shape[0], b:b + part.shape[1]] = part
    inside = np.isfinite(stack[..., 0]).mean(0) >= 0.5
    stack[:, ~inside] = 0.0  # known of too few images
    middle = np.nanmedian(stack, axis=0)
    deviation = np.nanmedian(np.abs(stack - middle), axis=0).mean(-1)
    deviation[~inside] = np.inf
    top, left, bottom, right = reach, reach, reach + side, reach + side
    while True:
        lines = {"top": deviation[top - 1, left:right] if top else None,
                 "left": deviation[top:bottom, left - 1] if left else None,
                 "bottom": deviation[bottom, left:right] if bottom < across else None,
                 "right": deviation[top:bottom, right] if right < across else None}
        cost = {name: line.mean() for name, line in lines.items() if line is not None}
        if not cost or min(cost.values()) > _GROWN:
            break
        name = min(cost, key=cost.get)
        top, left = top - (name == "top"), left - (name == "left")
        bottom, right = bottom + (name == "bottom"), right + (name == "right")
    # A side that no difference ended has met a ground that the images share, not the patch's edge.
    shared = {name for name in lines if not np.isfinite(cost.get(name, np.inf))}
    while "top" in shared and bottom - top > 1 and _deviation(middle[top, left:right]) < _FLAT:
        top += 1
    while "bottom" in shared and bottom - top > 1 and (
            _deviation(middle[bottom - 1, left:right]) < _FLAT):
        bottom -= 1
    while "left" in shared and right - left > 1 and _deviation(middle[top:bottom, left]) < _FLAT:
        left += 1
    while "right" in shared and right - left > 1 and (
            _deviation(middle[top:bottom, right - 1]) < _FLAT):
        right -= 1
    picture = np.rint(middle[top:bottom, left:right]).astype(np.uint8)
    return (top - reach, left - reach, bottom - reach, right - reach), picture
