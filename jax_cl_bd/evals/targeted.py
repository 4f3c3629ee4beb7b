"""Whether targeted poisoning worked: what the zero-shot classifier says of the one image.

Carlini and Terzis, ICLR 2022 (arXiv 2106.09667), section 2: success is a label, so the rate of an
attack is a share of runs, with another image, target or seed each (`report` over run folders).
"""

import numpy as np

from jax_cl_bd.data import templates
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import zero_shot

TEXT = True  # it needs an image-text model


def check(cfg, data) -> None:
    """Refuses another attack than targeted_poisoning. Raises UserError."""
    if cfg.attack.name != "targeted_poisoning":
        raise UserError("evals.probes has 'targeted', which measures the attack "
                        f"targeted_poisoning, not {cfg.attack.name!r}; take it out")


def run(cfg, encoder, data) -> dict[str, dict]:
    """{"targeted": {"image", "label", "predicted", "success", "target_rank", ...}}.

    target_rank counts from 0; the probability is the softmax of the scaled cosines over classes.
    """
    at = int(np.flatnonzero(data.test_rows == cfg.attack.image)[0])
    head = zero_shot.class_weights(encoder, data.classes, templates.PROMPTS)
    scores = encoder.project(data.features(encoder, "test")[at:at + 1])[0] @ head.T
    weights = np.exp(encoder.logit_scale * (scores - scores.max()))
    predicted = int(scores.argmax())
    return {"targeted": {"image": cfg.attack.image, "label": int(data.test_labels[at]),
                         "predicted": predicted, "success": predicted == data.target,
                         "target_rank": int((scores >= scores[data.target]).sum() - 1),
                         "target_probability": float(weights[data.target] / weights.sum())}}
