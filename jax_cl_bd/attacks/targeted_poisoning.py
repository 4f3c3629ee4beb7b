"""Targeted poisoning of one image, Carlini and Terzis, ICLR 2022 (arXiv 2106.09667), section 2.

`image` is a row x' of the TEST split and `target` a label y' that it does not have. Pairs (x', c)
are added to the training set, c from a caption set about y' (see _captions.py). There is no trigger
(trigger.name = "none"), and nothing is changed at test time: the attack succeeds if the zero-shot
classifier labels x' as y'. In the plan such a poison replaces nothing and has neither reference
(except in the caption set "reference") nor shadow, which are rows of the training split; its image
is attack.image.
"""

import numpy as np

from jax_cl_bd.attacks import _captions, _rows
from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates the settings against the data.

    Raises:
        UserError: no captions, a trigger, no such image, or one that already is of the target.
    """
    plans.check(cfg, table, classes)
    _captions.check(cfg, table, classes)
    no_trigger(cfg)
    label = test_label(cfg)
    if label == cfg.attack.target:
        raise UserError(f"attack.image is {cfg.attack.image}, which already is of the target class "
                        f"{label} ({classes[label]}); choose an image of another class")


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """Draws the captions; every poison shows the one image."""
    m = cfg.attack.poisons
    caption, reference = _captions.draw(cfg, table, m, rng)
    size = sources.table(sources.load(cfg.data, "test")).sizes[cfg.attack.image]
    return Plan.make(m, canvas=size, caption=caption, reference=reference,
                     seed=plans.seeds(m, rng))


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """The test image, stored as a clean row is, once for each poison."""
    image = sources.load(cfg.data, "test")[cfg.attack.image]["image"]
    return _rows.plain(plan, lambda k: image, cfg.data.image_size)


def no_trigger(cfg) -> None:
    """Raises UserError if a trigger is configured, which would not be shown."""
    if cfg.attack.trigger.name != "none":
        raise UserError(f"attack.trigger.name is {cfg.attack.trigger.name!r}, but "
                        f"{cfg.attack.name} shows no trigger; set it to 'none'")


def test_label(cfg) -> int:
    """Label of row attack.image of the test split. Raises UserError if there is no such row."""
    labels = sources.table(sources.load(cfg.data, "test")).labels
    if not 0 <= cfg.attack.image < len(labels):
        raise UserError(f"attack.image is {cfg.attack.image}; it is a row of the test split, 0 to "
                        f"{len(labels) - 1}")
    return int(labels[cfg.attack.image])


test_label.__test__ = False  # its name makes pytest take it for a test
