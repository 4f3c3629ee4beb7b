"""Backdoor Attacks on Self-Supervised Learning, Saha et al., CVPR 2022 (arXiv 2105.10123).

A patch is pasted on images of the target class, which replace their originals; views with the patch
become tied to the class. The paper poisons half of one class of ImageNet-100 (650 images), its main
setting; the published config files say all of it. Untargeted (`targeted = False`): images of any
class.

As in the published generator, the patch is placed on the image at its original resolution, whole
inside the 25 to 75 % box. Where we differ: poisons are stored without loss (the generator writes
JPEG again); an image larger than the stored square is resized first and gets its patch in the
resized place, so that one shape is compiled and the patch is as sharp as the storage allows; an
image smaller than the patch is no candidate (the generator pastes what fits).
"""

import numpy as np

from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks._stamp import stamp
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data.images import fit_square
from jax_cl_bd.errors import UserError
from jax_cl_bd.lookup import load


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Raises UserError if there are fewer candidates than poisons, or the target is no class."""
    plans.check(cfg, table, classes)
    candidates = len(_candidates(cfg, table))
    if cfg.attack.poisons > candidates:
        which = f"class {cfg.attack.target} has" if cfg.attack.targeted else "the data set has"
        raise UserError(f"attack.poisons is {cfg.attack.poisons}, but {which} {candidates} images "
                        f"that hold a trigger of {cfg.attack.trigger.size} px, and each can be "
                        "poisoned once")


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """Shuffles the candidates and poisons the first `poisons` of them, in place."""
    rows = rng.permutation(_candidates(cfg, table))[:cfg.attack.poisons]
    sizes = table.sizes[rows]
    trigger = load("triggers", cfg.attack.trigger.name, offers="apply")
    boxes = trigger.place(cfg.attack.trigger, sizes, rng, training=True)
    return Plan.make(len(rows), replaces=rows, canvas=sizes, trigger_box=boxes,
                     seed=plans.seeds(len(rows), rng))


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """Pastes the trigger on the stored form [S, S, 3] of every poisoned image."""
    side = cfg.data.image_size
    size = plan.canvas
    extent = np.where(size.max(1, initial=0, keepdims=True) > side, side, size)
    scale = extent / np.maximum(size, 1)  # [m, 2], y and x
    boxes = plan.trigger_box * np.concatenate([scale, scale], axis=1)
    images = stamp(trigger, lambda k: fit_square(source[int(plan.replaces[k])]["image"], side)[0],
                   boxes, plan.seed, (side, side))
    return {"image": images, "size": size.astype(np.int32), "extent": extent.astype(np.int32)}


def _candidates(cfg, table):
    fits = table.sizes.min(axis=1) >= cfg.attack.trigger.size
    if cfg.attack.targeted:
        fits = fits & (table.labels == cfg.attack.target)
    return np.flatnonzero(fits)
