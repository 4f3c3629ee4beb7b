"""Differences of two encoders' rates within one run, each with a 95 % interval.

Source: Newcombe (Interval estimation for the difference between independent proportions, 1998,
method 10), built from the Wilson intervals of the two rates. Both encoders see the same test
images, which method 10 does not use, so the interval is on the wide side.
"""

import numpy as np

from jax_cl_bd.reporting.read import OF_CONTROL

FIGURES = (("clean_accuracy", "clean accuracy"), ("attack_success_rate", "attack success rate"))


def newcombe(one: dict, other: dict, figure: str) -> tuple[float, float, float] | None:
    """A figure of one row minus that of another, low and high; None where either is unknown."""
    p1, p2 = one.get(figure), other.get(figure)
    if p1 is None or p2 is None:
        return None
    (l1, u1), (l2, u2) = (row["intervals"][figure] for row in (one, other))
    return (p1 - p2, float(p1 - p2 - np.hypot(p1 - l1, u2 - p2)),
            float(p1 - p2 + np.hypot(u1 - p1, p2 - l2)))


def compared(rows: dict[str, dict]) -> list[tuple[str, str]]:
    """Which of these encoders are set against each other: each against its control."""
    pairs = [("victim", "control"), *((label, f"{label}{OF_CONTROL}") for label in rows)]
    return [pair for pair in pairs if all(label in rows for label in pair)]
