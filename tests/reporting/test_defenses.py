"""The front of a repair in the report: every point, the choice, and what was lowest."""

import io

import numpy as np
import pytest
from PIL import Image

from jax_cl_bd.reporting import defenses, figures

POINTS = [{"rate": rate, "step": step, "clean_accuracy": accuracy, "attack_success_rate": success,
           "validation_accuracy": 0.9, "chosen": (rate, step) == (1e-3, 300)}
          for rate, step, accuracy, success in ((3e-4, 150, 0.94, 0.4), (3e-4, 300, 0.93, 0.2),
                                                (1e-3, 150, 0.90, 0.1), (1e-3, 300, 0.91, 0.05))]
FRONT = {"start": {"clean_accuracy": 0.943, "attack_success_rate": 0.932}, "points": POINTS,
         "lowest": {"0.01": POINTS[0], "0.02": POINTS[1], "0.03": None}}


def test_the_table_names_the_choice_and_the_lowest_points():
    text = defenses.lowest(FRONT)
    assert text.count("<tr>") == 5  # with the header
    choice, one, two, three = text.split("<tr>")[2:]
    assert "defender" in choice and "0.001" in choice and "5.0" in choice
    assert "at most 1 %" in one and "40.0" in one and "20.0" in two
    assert "–" in three


def test_the_picture_moves_with_the_choice():
    def pixels(front):
        return np.asarray(Image.open(io.BytesIO(figures.front(front))))

    other = {**FRONT, "points": [{**p, "chosen": i == 0} for i, p in enumerate(POINTS)]}
    assert pixels(FRONT).shape == pixels(other).shape
    assert (pixels(FRONT) != pixels(other)).any()
    with pytest.raises(StopIteration):  # a sweep always chooses
        figures.front({**FRONT, "points": [{**p, "chosen": False} for p in POINTS]})
