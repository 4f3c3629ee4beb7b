"""No trigger, for attacks that show nothing on the image: targeted poisoning, mismatched pairs.

There is nothing to stamp on a test image: evaluations pass `trigger=None` where the config names
this one, and then report clean figures and the attack's own measure alone.
"""

import jax
import numpy as np

WHOLE = True  # no size of its own


def check(cfg) -> None:
    """Accepts any settings; none is read."""


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """No parameters."""
    return {}


def place(cfg, sizes: np.ndarray, rng: np.random.Generator, *, training: bool) -> np.ndarray:
    """Zero boxes, int64 [N, 4]."""
    return np.zeros((len(np.asarray(sizes).reshape(-1, 2)), 4), np.int64)


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array | None) -> jax.Array:
    """Gives the images back."""
    return images
