"""Zero-shot classification by an image-text model, with prompt ensembling.

CLIP (Radford et al. 2021, section 3.1.4): a class is the mean, over templates filled with its name,
of the unit text embeddings, brought to unit length again; an image goes to the class of largest
cosine. CleanCLIP (Bansal et al., ICCV 2023) reports top-1, 3, 5 and 10 with the 80 published
templates, which also caption its poisons; so templates that caption nothing are a row of their own.
"""

import copy
import weakref
from collections.abc import Callable

import numpy as np

from jax_cl_bd.data import templates
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import attack_metrics

TEXT = True  # it needs an image-text model
TOP = (3, 5, 10)
_heads = {}  # id of an encoder that is in use -> {(classes, prompts): class embeddings}


def run(cfg, encoder, data) -> dict[str, dict]:
    """Figures by zero-shot classification, one row per placement, and "zero_shot:held_out".

    Where another split is measured too (evals.other_test_split), it has the row "zero_shot:SPLIT",
    under the protocol's placement.

    Beside the figures of every probe a row has "top" and "attack_success_rate_at": {k: rate}, the
    share of clean test images whose class, and of triggered images of other classes that have the
    target, among the k best; of equal scores the one asked for comes last.
    """
    head = class_weights(encoder, data.classes, templates.PROMPTS)
    rows = attack_metrics.rows("zero_shot", _predict(encoder, head), data, encoder,
                               templates=len(templates.PROMPTS))
    for row in rows.values():
        row |= _top(encoder, head, data, row["protocol"]["placement"])
    held_out = class_weights(encoder, data.classes, templates.HELD_OUT)
    protocol = copy.copy(data)  # which shares the features
    protocol.placements = data.placements[:1]
    row = attack_metrics.rows("held_out", _predict(encoder, held_out), protocol, encoder,
                              templates=len(templates.HELD_OUT))["held_out"]
    rows["zero_shot:held_out"] = row | _top(encoder, held_out, data,
                                            row["protocol"]["placement"])
    if data.other is not None:
        split = cfg.evals.other_test_split
        row = attack_metrics.rows("other", _predict(encoder, head), data.other, encoder,
                                  templates=len(templates.PROMPTS), split=split)["other"]
        rows[f"zero_shot:{split}"] = row | _top(encoder, head, data.other,
                                                row["protocol"]["placement"])
    return rows


def check(cfg, data) -> None:
    """Refuses a model of images alone. Raises UserError."""
    if cfg.text.name == "none":
        raise UserError("evals.probes has 'zero_shot', which needs an image-text model, and "
                        "text.name is 'none'; take it out")


def classifier(encoder, data) -> Callable[[np.ndarray], np.ndarray]:
    """Image features [N, D] -> class [N], with the 80 templates."""
    return _predict(encoder, class_weights(encoder, data.classes, templates.PROMPTS))


def class_weights(encoder, classes, prompts) -> np.ndarray:
    """Unit class embeddings, float32 [C, E]; made once for as long as the encoder is in use."""
    if id(encoder) not in _heads:
        _heads[id(encoder)] = {}
        weakref.finalize(encoder, _heads.pop, id(encoder))
    kept, names = _heads[id(encoder)], tuple(str(name) for name in classes)
    if (names, prompts) not in kept:
        texts = [templates.fill(prompt, name) for name in names for prompt in prompts]
        z = encoder.text(texts).reshape(len(names), len(prompts), -1).mean(1)
        kept[names, prompts] = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
    return kept[names, prompts]


def _predict(encoder, head):
    return lambda features: (encoder.project(features) @ head.T).argmax(1)


def _top(encoder, head, data, placement):
    """Rates at k beyond the first, for k below the number of classes."""
    ks = [k for k in TOP if k < len(head)]

    def hit(name, wanted):
        scores = encoder.project(data.features(encoder, name)) @ head.T
        own = np.take_along_axis(scores, np.broadcast_to(wanted, len(scores))[:, None], 1)
        return (scores >= own).sum(1) - 1  # how many classes come before the wanted one

    found = {"top": _share(hit("test", data.test_labels), ks)}
    if data.placements:
        others = data.test_labels != data.target
        before = hit(f"{placement}/triggered", data.target)[others]
        found["attack_success_rate_at"] = _share(before, ks)
    return found


def _share(before, ks):
    return {str(k): float(np.mean(before < k)) if len(before) else None for k in ks}
