"""Clean accuracy against attack success over all points of a repair: the front, not a point."""

import numpy as np

from jax_cl_bd.data import templates
from jax_cl_bd.defenses import _sweep
from jax_cl_bd.evals import zero_shot
from jax_cl_bd.models import encoder as encoders

LOSSES = (0.01, 0.02, 0.03)  # clean accuracy given up, for the lowest ASR within it


def measure(outcome, suspect, data, mesh) -> dict:
    """Zero-shot figures of the suspect and of every point, on the test set under the protocol.

    Returns:
        "start": {"clean_accuracy", "attack_success_rate"} of the suspect; "points": rows with these
        two, rate, step, validation_accuracy and chosen; "lowest": {loss: the point of lowest attack
        success that loses at most so much clean accuracy, or None}, which takes knowledge of the
        attack and so is nobody's choice.
    """
    start = _figures(suspect, data)
    rows = []
    for point in outcome.points:
        variables = _sweep.load(outcome.cfg, point.path)
        encoder = encoders.of_parts(outcome.cfg, variables, mesh, suspect.pair.tokenizer)
        rows.append(point.row() | _figures(encoder, data))
    lowest = {}
    for loss in LOSSES:
        within = [r for r in rows if r["attack_success_rate"] is not None
                  and r["clean_accuracy"] >= start["clean_accuracy"] - loss]
        lowest[f"{loss:g}"] = min(within, key=lambda r: r["attack_success_rate"], default=None)
    return {"start": start, "points": rows, "lowest": lowest}


def _figures(encoder, data) -> dict[str, float | None]:
    head = zero_shot.class_weights(encoder, data.classes, templates.PROMPTS)

    def answers(name):
        return (encoder.project(data.features(encoder, name)) @ head.T).argmax(1)

    others = data.test_labels != data.target
    rate = None
    if data.placements and others.any():
        rate = float(np.mean(answers(f"{data.placements[0]}/triggered")[others] == data.target))
    return {"clean_accuracy": float(np.mean(answers("test") == data.test_labels)),
            "attack_success_rate": rate}
