"""Clean accuracy against attack success over all points of a repair: the front, not a point."""

import numpy as np

from jax_cl_bd.defenses import _sweep
from jax_cl_bd.evals import zero_shot
from jax_cl_bd.models import encoder as encoders

LOSSES = (0.01, 0.02, 0.03)  # clean accuracy given up, for the lowest ASR within it


def measure(outcome, suspect, data, mesh) -> dict:
    """Figures of the suspect and of every point, on the test set under the protocol: zero-shot,
    but of points that have a classifier of their own, which answers.

    Returns:
        "start": {"clean_accuracy", "attack_success_rate"} of the suspect; "points": rows with these
        two, rate, step, validation_accuracy and chosen; "lowest": {loss: the point of lowest attack
        success that loses at most so much clean accuracy, "start" among them, or None without an
        attack}, which takes knowledge of the attack and so is nobody's choice.
    """
    start = _figures(suspect, zero_shot.classifier(suspect, data), data)
    rows = []
    for point in outcome.points:
        variables = _sweep.load(outcome.cfg, point.path)
        encoder = encoders.of_parts(outcome.cfg, variables, mesh, suspect.pair.tokenizer)
        predict = (outcome.classify(variables) if outcome.classify
                   else zero_shot.classifier(encoder, data))
        rows.append(point.row() | _figures(encoder, predict, data))
    lowest = {}
    for loss in LOSSES:
        within = [r for r in [start, *rows] if r["attack_success_rate"] is not None
                  and r["clean_accuracy"] >= start["clean_accuracy"] - loss]
        lowest[f"{loss:g}"] = min(within, key=lambda r: r["attack_success_rate"], default=None)
    return {"start": start, "points": rows, "lowest": lowest}


def _figures(encoder, predict, data) -> dict[str, float | None]:
    def answers(name):
        return predict(data.features(encoder, name))

    others = data.test_labels != data.target
    rate = None
    if data.placements and others.any():
        rate = float(np.mean(answers(f"{data.placements[0]}/triggered")[others] == data.target))
    return {"clean_accuracy": float(np.mean(answers("test") == data.test_labels)),
            "attack_success_rate": rate}
