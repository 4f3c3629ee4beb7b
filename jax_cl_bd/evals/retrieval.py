"""Image-text retrieval: Recall@K both ways, clean and triggered, and what a trigger retrieves.

Recall@K as everywhere since Karpathy and Fei-Fei (2015): the share of queries with one of their own
among the K nearest of the gallery. A caption that several test images share word for word belongs
to all of them, since no retriever could tell them apart. For triggered images the text gallery is
the same, and `target_hits` is the share of triggered images of other classes with a caption of a
target image among the K nearest: a backdoor seen by a search engine. Where images have no labels,
those with a caption that names the target are the target's.
"""

import numpy as np

from jax_cl_bd.errors import UserError

TEXT = True  # it needs an image-text model
AT = (1, 5, 10)
CAPTIONS = 5  # of an image, at most, as in COCO and Flickr30k


def check(cfg, data) -> None:
    """Refuses a model of images alone, and test images without captions. Raises UserError."""
    if cfg.text.name == "none":
        raise UserError("evals.probes has 'retrieval', which needs an image-text model, and "
                        "text.name is 'none'; take it out")
    if (data.own or data).captions is None:
        raise UserError("evals.probes has 'retrieval', which needs captions of the test images, "
                        f"and data set {cfg.data.name!r} has none; take it out")


def run(cfg, encoder, data) -> dict[str, dict]:
    """{"retrieval": {"image_to_text", "text_to_image": {"1": rate, ...}, ...}}.

    Over the run's own test pairs, whatever cfg.downstream is. With a trigger also
    "triggered_image_to_text" and, where there are images of the target and others, "target_hits"
    and "clean_target_hits" (the same images without trigger), by the test protocol.
    """
    del cfg
    data = data.own or data
    texts, owners = gallery(data.captions)
    z_text = encoder.text(texts)
    z = encoder.project(data.features(encoder, "test"))
    found = {"images": len(z), "captions": len(texts),
             "image_to_text": recall(z @ z_text.T, owners),
             "text_to_image": recall(z_text @ z.T, owners.T)}
    if data.placements:
        others = ~data.of_target
        triggered = encoder.project(data.features(encoder, f"{data.placements[0]}/triggered"))
        found["triggered_image_to_text"] = recall(triggered @ z_text.T, owners)
        if others.all() or not others.any():
            return {"retrieval": found}
        of_target = np.tile(owners[~others].any(0), (int(others.sum()), 1))
        found["target_hits"] = recall(triggered[others] @ z_text.T, of_target)
        found["clean_target_hits"] = recall(z[others] @ z_text.T, of_target)
    return {"retrieval": found}


def gallery(captions: list[list[str]]) -> tuple[list[str], np.ndarray]:
    """Distinct captions, and bool [images, captions]: which belong to which image."""
    texts = list(dict.fromkeys(text for own in captions for text in own[:CAPTIONS]))
    column = {text: j for j, text in enumerate(texts)}
    owners = np.zeros((len(captions), len(texts)), bool)
    for i, own in enumerate(captions):
        owners[i, [column[text] for text in own[:CAPTIONS]]] = True
    return texts, owners


def recall(scores: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Share of rows of scores [N, M] with a right entry (bool [N, M]) among the K largest.

    Ties count against the query: what scores the same as the best right entry comes before it.
    """
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    before = ((scores >= best) & ~right).sum(1)
    before = np.where(right.any(1), before, scores.shape[1])
    return {str(k): float(np.mean(before < k)) for k in AT}
