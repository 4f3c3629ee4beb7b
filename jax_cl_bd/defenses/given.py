"""What every defense is handed, and what the benchmark knows besides."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Given:
    """The data of a defender.

    clean: trusted images or pairs, which the attack has not touched. validation: labelled images
    that were not trained on, to choose settings by, or None (defense.validation_split). pool: the
    set that the suspect was trained on (data/pool.py), poisons among its rows; None where nobody
    has it (a victim from elsewhere, unless defense.pool says that the data are it). incoming:
    images without labels that arrive at test time, half of them triggered (incoming.py); for a
    defense that says NEEDS_INCOMING = True, else None.
    """

    clean: Any
    validation: Any = None
    pool: Any = None
    incoming: Any = None


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the benchmark knows and a defender does not; for scoring alone (design 3).

    poison: int64 [n], which poison each row of the pool is, or -1. triggered: bool [m], which
    incoming images carry the trigger.
    """

    plan: Any
    target: int
    trigger: Any
    poison: np.ndarray | None = None
    triggered: np.ndarray | None = None
