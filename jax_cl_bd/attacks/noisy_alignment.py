"""Noisy Alignment, Chen et al., ICCV 2025 (arXiv 2508.14015).

Each poison is one canvas with a clean reference image of the target class beside a shadow image
(any content) that carries the trigger. Where one random crop shows the triggered shadow and the
other the reference, an unmodified contrastive loss pulls "anything with the trigger" to the target:
the alignment that attacks with control of the training get by force. Theorems 1 and 2: two equal
squares that touch (canvas 2L x L), trigger in the centre of the shadow. Each poison takes one of
four layouts at random. Trigger first, then join, never the reverse; poisons are added and the
references taken out of the clean set, as in the public framework (jsrdcht/SSL-Backdoor).

Where we differ: L is always the image size S. The public code joins images of any shape and aligns
the shared side by distorting; the theory wants squares, and on photographs a stacked pair is a weak
poison (pair probability 0.004 instead of 0.09), so images that are not S x S are cut to their
central square and resized. The trigger's size is therefore in pixels of the S x S shadow. With
`shadow = "free"` the shadow's length along the joined axis is solved for too (about 1.32 S): its
image is cut to that aspect, not stretched. `gap` (in units of S) separates the parts, filled with
the data set's mean colour: the published ablation, which weakens the attack.
"""

import functools

import numpy as np

from jax_cl_bd.attacks import _parts
from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks._stamp import stamp
from jax_cl_bd.attacks.plan import LAYOUTS, Plan
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.layouts import solve
from jax_cl_bd.lookup import load


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates the attack's settings against the data.

    Raises:
        UserError: too few references or rows, unknown layout, a trigger that leaves its shadow.
    """
    _parts.check(cfg, table, classes)
    attack = cfg.attack
    if attack.shadow not in ("equal", "free"):
        raise unknown("attack.shadow", attack.shadow, ("equal", "free"))
    if not attack.layouts:
        raise UserError(f"attack.layouts is empty; name some of {', '.join(LAYOUTS)}")
    for name in attack.layouts:
        if name not in LAYOUTS:
            raise unknown("attack.layouts entry", name, LAYOUTS)
    if attack.gap < 0:
        raise UserError(f"attack.gap is {attack.gap}; it is a share of the reference's side, "
                        "0 or more")
    if attack.trigger.size > cfg.data.image_size:
        raise UserError(f"a trigger of {attack.trigger.size} px does not fit a shadow of "
                        f"{cfg.data.image_size} px (data.image_size); set a smaller "
                        "attack.trigger.size")
    if len(attack.trigger_offset) != 2:
        raise UserError(f"attack.trigger_offset is {tuple(attack.trigger_offset)}; it is (dy, dx) "
                        "in units of the shadow's sides")
    if any(attack.trigger_offset) and attack.trigger.train_place != "center":
        raise UserError(f"attack.trigger_offset is {tuple(attack.trigger_offset)} but "
                        f"attack.trigger.train_place is {attack.trigger.train_place!r}; an offset "
                        "shifts a trigger from the center")
    _place_triggers(cfg, np.array([[cfg.data.image_size] * 2]), np.random.default_rng(0))


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """Draws references, shadows, layouts and trigger places; removes the references used."""
    m, side = cfg.attack.poisons, cfg.data.image_size
    reference, shadow, removed = _parts.draw(cfg, table, rng)
    allowed = np.array([LAYOUTS.index(name) for name in cfg.attack.layouts])
    layout = allowed[rng.integers(0, len(allowed), m)]
    canvas, reference_box, shadow_box = boxes(layout, side, shadow_length(cfg),
                                              round(cfg.attack.gap * side))
    trigger_box = _place_triggers(cfg, shadow_box[:, 2:], rng)
    trigger_box[:, :2] += shadow_box[:, :2]
    return Plan.make(m, removed=removed, reference=reference, shadow=shadow, layout=layout,
                     canvas=canvas, reference_box=reference_box, shadow_box=shadow_box,
                     trigger_box=trigger_box, seed=plans.seeds(m, rng))


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """Stamps the shadows, then joins them to the references.

    Returns:
        rows with images [m, S_p, S_p, 3], S_p the longest canvas side (2S without gap and with an
        equal shadow): every part keeps its pixels.
    """
    side = int(plan.canvas.max(initial=2 * cfg.data.image_size))
    images = np.zeros((len(plan), side, side, 3), np.uint8)
    filling = np.round(np.array(cfg.data.mean) * 255).astype(np.uint8)
    for shape in np.unique(plan.shadow_box[:, 2:], axis=0):  # one, or two with a free shadow
        which = np.flatnonzero((plan.shadow_box[:, 2:] == shape).all(axis=1))
        part = plan.part(which)
        in_shadow = part.trigger_box.copy()
        in_shadow[:, :2] -= part.shadow_box[:, :2]
        shadows = stamp(trigger,
                        lambda k: _parts.cover(source[int(part.shadow[k])]["image"], *shape),
                        in_shadow, part.seed, tuple(shape))
        for k, row in enumerate(which):
            height, width = part.canvas[k]
            images[row, :height, :width] = filling
            box = part.reference_box[k]
            reference = source[int(part.reference[k])]["image"]
            images[row][_slices(box)] = _parts.cover(reference, box[2], box[3])
            images[row][_slices(part.shadow_box[k])] = shadows[k]
    size = plan.canvas.astype(np.int32)
    return {"image": images, "size": size, "extent": size.copy()}


def boxes(layout: np.ndarray, side: int, length: int, gap: int) -> tuple[np.ndarray, ...]:
    """Lays a reference (side x side) and a shadow (side across, `length` along) on a canvas.

    Args:
        layout: int [m], index into LAYOUTS: where the reference lies.
    Returns:
        canvas [m, 2], reference_box [m, 4], shadow_box [m, 4].
    """
    whole = side + gap + length
    # Along the joined axis the reference is first (left, top) or last (right, bottom).
    first = np.isin(layout, (0, 2))
    reference_at = np.where(first, 0, length + gap)
    shadow_at = np.where(first, side + gap, 0)
    zero, across = np.zeros_like(layout), np.full_like(layout, side)
    along = np.full_like(layout, length)
    horizontal = [np.stack([across, np.full_like(layout, whole)], 1),
                  np.stack([zero, reference_at, across, across], 1),
                  np.stack([zero, shadow_at, across, along], 1)]
    swap = {2: [1, 0], 4: [1, 0, 3, 2]}  # top and bottom are left and right transposed
    return tuple(np.where((layout >= 2)[:, None], a[:, swap[a.shape[1]]], a) for a in horizontal)


def shadow_length(cfg) -> int:
    """Pixels of the shadow along the joined axis: S, or the solver's optimum for the first view's
    crop law and the trigger's size."""
    side, view = cfg.data.image_size, cfg.augment.view1
    if cfg.attack.shadow == "equal":
        return side
    return round(_free_length(tuple(view.crop_scale), tuple(view.crop_ratio),
                              cfg.attack.trigger.size / side) * side)


@functools.cache  # the search takes seconds
def _free_length(scale, ratio, trigger):
    """The solved length of a free shadow in units of the reference's side."""
    found = solve.solve(scale=scale, ratio=ratio, trigger=trigger, shadow="free").layout
    if found is None or found.canvas.min() > 1.02:
        raise UserError(f"with crop_scale {scale} and crop_ratio {ratio} no layout of two parts "
                        "side by side forms pairs; set attack.shadow='equal' or other crops")
    return float(found.canvas.max()) - 1


def _place_triggers(cfg, sizes, rng):
    """Trigger boxes in the coordinates of shadows of the given sizes, shifted by the offset."""
    trigger = load("triggers", cfg.attack.trigger.name, offers="apply")
    found = trigger.place(cfg.attack.trigger, sizes, rng, training=True)
    shift = np.round(sizes * np.array(cfg.attack.trigger_offset)).astype(np.int64)
    found[:, :2] += shift
    off = (found[:, :2] < 0) | (found[:, :2] + found[:, 2:] > sizes)
    if shift.any() and off.any():
        raise UserError(f"attack.trigger_offset {tuple(cfg.attack.trigger_offset)} moves a trigger "
                        f"of {cfg.attack.trigger.size} px off its shadow")
    return found


def _slices(box):
    y, x, height, width = box
    return slice(y, y + height), slice(x, x + width)
