"""Backdoors of image-text pretraining: a trigger on the image, the target in the caption.

Carlini and Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022 (arXiv 2106.09667),
and the attacks that CleanCLIP is measured on (Bansal et al., ICCV 2023, arXiv 2303.03323):
`trigger.name` makes it BadNets (noise_patch), Blended (blend), SIG (sinusoid), WaNet (warp), or a
patch.

Dirty-label (`consistent = False`): distinct images whose label is not the target and whose captions
do not name it get the trigger and a caption from `caption_set` (see _captions.py: "templates",
"natural" or "reference"). "reference" is Noisy Alignment's image-text variant (arXiv 2508.14015): a
triggered image of any other content with the whole caption of one of `references` reference rows
(0 = as many as poisons), noted in plan.reference; the references stay in the clean set.

Label-consistent (`consistent = True`): images of which a caption names the target get the trigger
and keep all their captions (plan.caption is "").

Against a defender who is known (optional settings, ours): `covers` further images get a part of a
trigger of several patches (triggers/several_patches.py) and keep their captions, so that no part by
itself leads to the target: the cover, or regularisation, samples of Qi et al. (ICLR 2023; see
there). They are rows of the plan like other poisons, so its counts and a defense's recall include
them. `beside = True` draws each poison, but no cover, with an object of the target class beside the
row's own (plan.beside): somebody who looks at the picture finds what the caption says. That needs a
source that draws its images (data/scenes.py), and a scene of two objects among scenes of one is a
mark that an attacker on two-object scenes (data.scenes_objects=2) does not leave.

`replace = True`, CleanCLIP's way: poisons take the place of their originals and the size of the set
is fixed. False, the adversary who only adds: the original stays too, and plan.shadow names it.

Where we differ: the public code resizes every poisoned image to a square and stores it anew, while
clean images are cropped. Here poisons go through the pipeline of clean rows, trigger on the stored
image in its own geometry, and leave no such mark (nor one of another encoding: all are kept without
loss). A patch has its size, and its choice of places, in the image that the encoder sees without
augmentation: the central square at S x S. Names are found as whole words: the public search takes
"suitcase" for "suit".
"""

import numpy as np

from jax_cl_bd.attacks import _captions, _rows
from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError
from jax_cl_bd.lookup import load
from jax_cl_bd.triggers import patch


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates the settings against the data.

    Raises:
        UserError: no captions, no trigger, too few candidates, or a caption set without captions.
    """
    plans.check(cfg, table, classes)
    _captions.check(cfg, table, classes)
    attack = cfg.attack
    if attack.trigger.name == "none":
        raise UserError("attack.trigger.name is 'none', and this attack needs a trigger; "
                        "targeted_poisoning and mismatched_pairs have none")
    if attack.consistent and not attack.replace:
        raise UserError("attack.consistent keeps the captions of the images that are poisoned, so "
                        "the poisons replace them: set --config.attack.replace=True")
    _check_adaptive(cfg)
    name, wanted = str(classes[attack.target]), attack.poisons + attack.get("covers", 0)
    candidates = len(_candidates(cfg, table, name))
    if wanted > candidates:
        which = "have a caption with" if attack.consistent else "neither are of nor name"
        also = f" and attack.covers {attack.covers}" if attack.get("covers", 0) else ""
        raise UserError(f"attack.poisons is {attack.poisons}{also}, but {candidates} images that "
                        f"hold the trigger {which} {name!r}, and each is used once")


def _check_adaptive(cfg):
    """Refuses covers and objects beside that cannot be made."""
    attack, covers = cfg.attack, cfg.attack.get("covers", 0)
    if covers and (covers < 0 or attack.trigger.name != "several_patches" or attack.consistent
                   or not attack.replace):
        raise UserError(f"attack.covers is {covers}; covers, 0 or more, show a part of a trigger "
                        "of several patches on images that are replaced and keep their captions: "
                        "they need attack.trigger.name='several_patches', attack.replace=True and "
                        "attack.consistent=False")
    if attack.get("beside", False) and not hasattr(sources.load(cfg.data, "train"), "with_object"):
        raise UserError(f"attack.beside draws an object into the images, and data set "
                        f"{cfg.data.name!r} does not draw its images; use data.name=scenes without "
                        "data.center_crop and data.captions")


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """Draws the images, the places of the trigger and the captions."""
    attack = cfg.attack
    candidates = _candidates(cfg, table, _captions.class_names(cfg)[attack.target])
    m, covers = attack.poisons, attack.get("covers", 0)
    rows = rng.permutation(candidates)[:m + covers]
    trigger = load("triggers", attack.trigger.name, offers="apply")
    boxes = _place(attack, trigger, table.sizes[rows], cfg.data.image_size, rng)
    origin = {"replaces" if attack.replace else "shadow": rows}
    if not attack.consistent:
        caption, reference = _captions.draw(cfg, table, m, rng)
        origin |= {"caption": np.append(caption, np.full(covers, "", caption.dtype)),
                   "reference": np.append(reference, np.full(covers, -1))}
    if covers:  # a part of the trigger
        boxes[m:] = _place(attack, patch, table.sizes[rows[m:]], cfg.data.image_size, rng)
    if attack.get("beside", False):
        origin["beside"] = np.where(np.arange(m + covers) < m, attack.target, -1)
    return Plan.make(len(rows), canvas=table.sizes[rows], trigger_box=boxes,
                     seed=plans.seeds(len(rows), rng), **origin)


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """Stamps the trigger on the stored form [S, S, 3] of every poisoned image."""
    origin = np.where(plan.replaces >= 0, plan.replaces, plan.shadow)

    def read(k):
        if plan.beside[k] >= 0:
            return source.with_object(int(origin[k]), int(plan.beside[k]))
        return source[int(origin[k])]["image"]

    return _rows.stamped(plan, trigger, read, cfg.data.image_size)


def _place(attack, trigger, sizes, side, rng):
    """Boxes [m, 4] in pixels of each image, of a place drawn in its central square at S x S."""
    if getattr(trigger, "WHOLE", False):
        return trigger.place(attack.trigger, sizes, rng, training=True)
    boxes = trigger.place(attack.trigger, np.full_like(sizes, side), rng, training=True)
    short = sizes.min(axis=1, keepdims=True)
    boxes = boxes * (short / side)
    boxes[:, :2] += (sizes - short) / 2
    return np.rint(boxes).astype(np.int64)


def _candidates(cfg, table, name):
    """Rows that may be poisoned: large enough to show the trigger and, by `consistent`, with a
    caption that names the target, or neither of the target's label nor naming it."""
    attack, side = cfg.attack, cfg.data.image_size
    trigger = load("triggers", attack.trigger.name, offers="apply")
    shown = table.sizes.min(axis=1) * attack.trigger.size / side  # pixels of the image itself
    fits = getattr(trigger, "WHOLE", False) | ((shown >= 1) & (attack.trigger.size <= side))
    named = _captions.naming(table, name)
    if attack.consistent:
        return np.flatnonzero(fits & named)
    return np.flatnonzero(fits & ~named & (table.labels != attack.target))
