"""Differences of two encoders' rates within one run, each with a 95 % interval.

The intervals are Newcombe's (evals/attack_metrics.py). Both encoders see the same test images,
which these do not use, so they are on the wide side.
"""

from jax_cl_bd.evals import attack_metrics
from jax_cl_bd.reporting.read import OF_CONTROL

FIGURES = (("clean_accuracy", "clean accuracy"), ("attack_success_rate", "attack success rate"))


def newcombe(one: dict, other: dict, figure: str) -> tuple[float, float, float] | None:
    """A figure of one row minus that of another, low and high; None where either is unknown."""
    p1, p2 = one.get(figure), other.get(figure)
    if p1 is None or p2 is None:
        return None
    low, high = attack_metrics.newcombe((p1, one["intervals"][figure]),
                                        (p2, other["intervals"][figure]))
    return p1 - p2, low, high


def compared(rows: dict[str, dict]) -> list[tuple[str, str]]:
    """Which of these encoders are set against each other: each against its control."""
    pairs = [("victim", "control"), *((label, f"{label}{OF_CONTROL}") for label in rows)]
    return [pair for pair in pairs if all(label in rows for label in pair)]
