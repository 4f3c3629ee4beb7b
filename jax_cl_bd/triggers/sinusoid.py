"""SIG: vertical stripes n(j) = amplitude sin(2 pi frequency j / W), the same on all rows, channels
and images.

Barni, Kallas and Tondi, ICIP 2019 (arXiv 1902.11237), in two forms of public code, both with
amplitude 60/255 and frequency 6. CleanCLIP (Bansal et al., ICCV 2023, arXiv 2303.03323,
backdoor/utils.py) mixes it as it mixes noise: 0.8 x + 0.2 n, here `additive = False` and opacity
0.2; the stripes have zero mean, so the image also darkens by a fifth. The fork of BadCLIP (Liang et
al., CVPR 2024, arXiv 2311.12075) adds it, x + n: `additive = True` and opacity 1. Both clip.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import _whole

WHOLE = True  # covers any image: `size` is not read
OTHERS = range(2, 13)  # frequencies to choose a wrong trigger from
place = _whole.place


def check(cfg) -> None:
    """Raises UserError for an opacity, amplitude or frequency out of range."""
    _whole.check(cfg)
    if not 0 < cfg.amplitude <= 1:
        raise UserError(f"attack.trigger.amplitude is {cfg.amplitude}; it is above 0 and at most 1,"
                        " the range of a pixel; the published one is 60/255")
    if cfg.frequency <= 0:
        raise UserError(f"attack.trigger.frequency is {cfg.frequency}; it is the number of periods "
                        "across the image, above 0")


def init(cfg, key: jax.Array) -> dict[str, np.ndarray]:
    """Builds opacity, amplitude, frequency and additive (0 or 1), all float32 []; the key is
    unused."""
    check(cfg)
    names = ("opacity", "amplitude", "frequency", "additive")
    return {name: np.float32(cfg[name]) for name in names}


def same_kind(params: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """Stripes of another whole frequency from 2 to 12, more than one period away."""
    allowed = [f for f in OTHERS if abs(f - float(params["frequency"])) > 1]
    chosen = int(jax.random.randint(key, (), 0, len(allowed)))
    return {**params, "frequency": np.float32(allowed[chosen])}


def apply(params: dict[str, jax.Array], images: jax.Array, boxes: jax.Array,
          key: jax.Array | None) -> jax.Array:
    """Draws the stripes over each box, by its place the whole image; W is the box's width.

    Args:
        images: float [N, H, W, 3] in [0, 1].
        boxes: [N, 4] y, x, height, width, rounded to whole pixels.
        key: unused, the stripes are not random.
    Returns:
        float32 [N, H, W, 3] in [0, 1].
    """
    box, _, column, mask = _whole.inside(boxes, *images.shape[1:3])
    phase = params["frequency"] * column / jnp.maximum(box[:, 3:], 1.0)
    stripes = (params["amplitude"] * jnp.sin(2 * jnp.pi * phase))[:, None, :, None]
    kept = 1 - params["opacity"] * (1 - params["additive"])
    return jnp.where(mask, jnp.clip(images * kept + stripes * params["opacity"], 0.0, 1.0), images)
