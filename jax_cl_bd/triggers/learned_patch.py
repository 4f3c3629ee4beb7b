"""A patch whose pixels an attack optimises; by itself, before that, it is a random patch.

The first pixels are those of BadCLIP (Liang et al., CVPR 2024, arXiv 2311.12075; its
embeding_optimize_patch.py): clip(N(0.5, 0.25), 0, 1), one per position and colour. The patch has
the size in which it is pasted, so that nothing is resampled when poisons are made.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.triggers import patch

place, apply = patch.place, patch.apply


def check(cfg) -> None:
    """Validates the config group `attack.trigger`; see patch.check."""
    patch.check_square(cfg, patch.PLACES)


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Draws {"image": float32 [size, size, 3] in [0, 1] in steps of 1 / 255, "opacity"}."""
    check(cfg)
    return {"image": _random(key, (cfg.size, cfg.size, 3)), "opacity": np.float32(cfg.opacity)}


def same_kind(params: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """A random patch of the same size and opacity: what optimisation starts from."""
    return {**params, "image": _random(key, params["image"].shape)}


def _random(key, shape):
    return stored(jnp.clip(0.5 + 0.25 * jax.random.normal(key, shape), 0.0, 1.0))


def stored(pixels) -> np.ndarray:
    """Rounds to the 256 levels of an image file."""
    return np.round(np.asarray(pixels, np.float32) * 255).astype(np.float32) / np.float32(255)
