"""What attacks with reference and shadow images share: drawing them, and bringing them to size."""

import numpy as np

from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.data.images import resize
from jax_cl_bd.errors import UserError


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates target, poisons, references and shadows.

    Raises:
        UserError: more references than the target class has images, or more shadow images than
            there are rows left.
    """
    plans.check(cfg, table, classes)
    attack = cfg.attack
    for name in ("references", "shadows"):
        if attack[name] < 0:
            raise UserError(f"attack.{name} is {attack[name]}; it is a count, or 0 for as many as "
                            "poisons")
    references = attack.references or attack.poisons
    available = len(plans.rows_of(table, attack.target))
    if references > available:
        seen = (f"attack.references is {references}" if attack.references else
                f"attack.references is 0, which means as many as poisons ({references})")
        raise UserError(f"{seen}, but class {attack.target} ({classes[attack.target]}) has "
                        f"{available} images; set --config.attack.references={available} or less")
    left = len(table.labels) - references
    if attack.shadows > left or not left:
        raise UserError(f"attack.shadows is {attack.shadows}, but {left} images are left beside "
                        f"the {references} references")


def draw(cfg, table, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws a reference and a shadow image for every poison.

    References come from a pool of `references` images of the target class, shadows from a pool of
    `shadows` images of any class outside that pool. Each image of a pool is used at most once if
    there are enough, else with repeats (ssl_backdoor/datasets/base.py of jsrdcht/SSL-Backdoor).

    Returns:
        reference [m], shadow [m], removed [r]: source rows. Removed are the references that were
        used, unless keep_references.
    """
    attack, m = cfg.attack, cfg.attack.poisons
    pool = rng.permutation(plans.rows_of(table, attack.target))[:attack.references or m]
    reference = plans.draw(pool, m, rng)
    others = np.setdiff1d(np.arange(len(table.labels)), pool)
    others = rng.permutation(others)[:attack.shadows or len(others)]
    shadow = plans.draw(others, m, rng)
    removed = np.array([], int) if attack.keep_references else np.unique(reference)
    return reference, shadow, removed


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fills height x width with the largest centred part of an image that has this aspect, resized
    (antialiased bicubic): nothing is squashed. An image of that size comes back as it is.

    Args:
        image: uint8 [H, W, 3].
    """
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    scale = min(h / height, w / width)
    crop_h, crop_w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    return resize(np.ascontiguousarray(image[top:top + crop_h, left:left + crop_w]), height, width)
