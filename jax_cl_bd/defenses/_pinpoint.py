"""Which labels a backdoor leads to, what its trigger looks like, and which training pairs carry it.

EftCLIP (arXiv 2511.13545) has a second algorithm for this, of which nothing but its purpose is
public; all steps are reconstructed here (docs/papers.md).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.data import images
from jax_cl_bd.defenses._find_trigger import Candidate, Suspect

FEWEST = 5  # candidates that a label needs to be flagged, images that a picture recurs in
_BANK = 5  # pictures of one trigger that are kept
_COMPARED = 8  # side to which candidates are resized to be compared
_BLOCK = 256  # images matched at once


@dataclasses.dataclass(frozen=True)
class Trigger:
    """A verified trigger: the label it leads to, its picture uint8 [h, w, 3], the rate of clean
    images of each class [C] that it takes there beyond those that went before, its bank (more
    pictures of it, the first among them), the mean rate over the other classes that there are, and
    the candidates it rests on."""

    label: int
    pixels: np.ndarray
    flips: np.ndarray
    bank: tuple[np.ndarray, ...]
    rate: float
    where: tuple[Candidate, ...] = ()

    def affected(self) -> list[int]:
        """The classes of which the trigger takes away at least half of what it takes on average."""
        if self.rate <= 0:
            return []
        return np.flatnonzero(self.flips >= self.rate / 2).tolist()


def flagged(seen: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Labels whose share of candidates stands out, int [F]: at least FEWEST, and more than the
    median over labels plus three times the median absolute deviation (scaled as a deviation). A
    label that no image was looked at for has none: a scan that ends early has seen few labels, and
    then any with FEWEST stands out, for `verify` to judge."""
    share = found / np.maximum(seen, 1)
    middle = np.median(share)
    spread = 1.4826 * np.median(np.abs(share - middle))
    if len(share) < 3:  # nothing to stand out from
        middle = spread = 0.0
    return np.flatnonzero((found >= FEWEST) & (share > middle + 3 * spread))


def bank_of(candidates: list[Candidate]) -> list[np.ndarray]:
    """The candidates of one label that are most like the others, the medoid first.

    Likeness is the correlation of pixels after resizing all to one size.
    """
    size = (_COMPARED, _COMPARED)
    flat = np.stack([images.resize(c.pixels, *size).reshape(-1) for c in candidates]).astype(float)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    like = flat @ flat.T
    np.fill_diagonal(like, np.nan)
    central = np.nan_to_num(np.nanmedian(like, axis=1)) if len(candidates) > 1 else np.zeros(1)
    order = np.argsort(-central, kind="stable")[:_BANK]
    return [candidates[i].pixels for i in order]


def verify(suspect: Suspect, label: int, bank: list[np.ndarray], clean: np.ndarray,
           labels: np.ndarray, classes: int, rng: np.random.Generator) -> Trigger:
    """Pastes the pictures of a bank on clean images of every class, at random places.

    Args:
        clean: uint8 [N, S, S, 3], of the classes `labels` [N].
    Returns:
        The picture that takes most of them to the label, with flips [C] (0 of the label itself and
        of classes without images).
    """
    before = suspect.probabilities(clean).argmax(1) == label
    others = [c for c in np.unique(labels) if c >= 0 and c != label]
    best = None
    for pixels in bank:
        after = suspect.probabilities(pasted(clean, pixels, rng)).argmax(1) == label
        flips = np.zeros(classes)
        for c in others:
            of = labels == c
            flips[c] = after[of].mean() - before[of].mean()
        rate = float(flips[others].mean()) if others else 0.0
        if best is None or rate > best.rate:
            best = Trigger(label, pixels, flips, tuple(bank), rate)
    return dataclasses.replace(best, bank=(best.pixels, *(p for p in bank if p is not best.pixels)))


def pasted(clean: np.ndarray, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Copies of images [N, S, S, 3] with a picture at a random place of each."""
    out, (height, width) = clean.copy(), pixels.shape[:2]
    for image in out:
        y = rng.integers(0, image.shape[0] - height + 1)
        x = rng.integers(0, image.shape[1] - width + 1)
        image[y:y + height, x:x + width] = pixels
    return out


def matches(trigger: Trigger, x: np.ndarray) -> np.ndarray:
    """The best normalised cross-correlation of any picture of the bank with any place of each
    image, over all three channels: float32 [N], in [-1, 1]."""
    best = np.full(len(x), -1.0, np.float32)
    for pixels in trigger.bank:
        for start in range(0, len(x), _BLOCK):
            part = x[start:start + _BLOCK]
            padded = np.zeros((_BLOCK, *x.shape[1:]), np.uint8)
            padded[:len(part)] = part
            found = np.asarray(_correlation(padded, pixels))[:len(part)]
            best[start:start + _BLOCK] = np.maximum(best[start:start + _BLOCK], found)
    return best


@jax.jit
def _correlation(x, template):
    """Normalised cross-correlation, its maximum over places: [N]."""
    x, t = x.astype(jnp.float32) / 255, template.astype(jnp.float32) / 255
    t = t - t.mean()
    count = t.size
    window = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID",
                               dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    ones = jnp.ones_like(t)[..., None]
    total, squares = window(x, ones), window(x * x, ones)
    spread = jnp.sqrt(jnp.maximum(squares - total**2 / count, 1e-6))
    r = window(x, t[..., None]) / (spread * jnp.maximum(jnp.linalg.norm(t), 1e-6))
    return r.max(axis=(1, 2, 3))


def iou(box, other) -> float:
    """Intersection over union of two boxes (y, x, height, width)."""
    top, left = max(box[0], other[0]), max(box[1], other[1])
    bottom = min(box[0] + box[2], other[0] + other[2])
    right = min(box[1] + box[3], other[1] + other[3])
    both = max(0, bottom - top) * max(0, right - left)
    return float(both / (box[2] * box[3] + other[2] * other[3] - both))
