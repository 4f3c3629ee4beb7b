"""Oracle-Poisoning: the upper bound of Noisy Alignment (arXiv 2508.14015, the step between the
training-controllable attacks and the data-only one).

A poison is a triggered shadow image alone, and its second view is drawn from a reference image of
the target class: the positive pair that a layout produces only now and then is made by hand. It
needs control over the pairs, so it is a control experiment, not an attack: the gap from it to Noisy
Alignment is what the layout loses. Images are brought to S x S as in noisy_alignment.py.
"""

import numpy as np

from jax_cl_bd.attacks import _parts
from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks._stamp import stamp
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError
from jax_cl_bd.lookup import load


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Raises UserError for too few references or rows, or a trigger larger than the image."""
    _parts.check(cfg, table, classes)
    if cfg.attack.trigger.size > cfg.data.image_size:
        raise UserError(f"a trigger of {cfg.attack.trigger.size} px does not fit an image of "
                        f"{cfg.data.image_size} px; set a smaller attack.trigger.size")


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """Draws references and shadows as Noisy Alignment does; view 2 comes from the reference."""
    m, side = cfg.attack.poisons, cfg.data.image_size
    reference, shadow, removed = _parts.draw(cfg, table, rng)
    canvas = np.full((m, 2), side)
    trigger = load("triggers", cfg.attack.trigger.name, offers="apply")
    boxes = trigger.place(cfg.attack.trigger, canvas, rng, training=True)
    return Plan.make(m, removed=removed, reference=reference, shadow=shadow, canvas=canvas,
                     shadow_box=np.array([0, 0, side, side]), trigger_box=boxes, pair=reference,
                     seed=plans.seeds(m, rng))


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """Stamps the shadow images, [m, S, S, 3]."""
    side = cfg.data.image_size
    images = stamp(trigger,
                   lambda k: _parts.cover(source[int(plan.shadow[k])]["image"], side, side),
                   plan.trigger_box, plan.seed, (side, side))
    size = plan.canvas.astype(np.int32)
    return {"image": images, "size": size, "extent": size.copy()}
