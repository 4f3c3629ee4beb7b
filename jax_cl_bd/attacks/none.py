"""No attack: the data set as it is. The trigger is still made, so that its effect on a clean
encoder can be measured."""

import numpy as np

from jax_cl_bd.attacks import plan as plans
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Raises UserError if poisons are asked for, or if the target is not a class."""
    plans.check(cfg, table, classes)
    if cfg.attack.poisons:
        raise UserError(f"attack.poisons is {cfg.attack.poisons} but attack.name is 'none'; "
                        "set the one to 0 or the other to an attack")


def plan(cfg, table, rng: np.random.Generator) -> Plan:
    """An empty plan."""
    return Plan.empty()


def render(cfg, plan: Plan, source, trigger) -> dict[str, np.ndarray]:
    """No rows, of the shapes that rows have."""
    side = cfg.data.image_size
    return {"image": np.zeros((0, side, side, 3), np.uint8), "size": np.zeros((0, 2), np.int32),
            "extent": np.zeros((0, 2), np.int32)}
