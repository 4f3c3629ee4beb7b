"""Cosine filtering of image-caption pairs.

Yang, He, Li, Backes, Humbert, Berrang and Zhang: "Data Poisoning Attacks Against Multimodal
Encoders", ICML 2023, arXiv 2209.15266, the first of its defenses: embed every pair with an
independent image-text model, and drop those whose image and caption lie too far apart. A row with
several captions is judged by its first: a poison has one, and the least of several would be lower
by their number alone. The threshold keeps a share 1 - false_alarm of the defender's clean pairs
(the paper picks it by eye from a few labelled ones).

The model is the suspect itself unless defense.scorer names another folder. The paper's is an
independent one, and for a reason: the suspect has learned that its poisons belong together, so as
its own judge it shows what a defender gets who has no other model. Verdict only.
"""

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import sources
from jax_cl_bd.defenses import _detection
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import start

VERDICT_ONLY = True  # no model comes out
NEEDS_POOL = True  # the rows that the suspect was trained on
_SHOWN = 32  # images in the picture of the report, in lines of 16


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are trusted."""
    _detection.check(cfg, clean)
    scorer = cfg.defense.scorer
    if not scorer and cfg.text.name == "none":
        raise UserError("defense cosine_filter needs an image-text model, and text.name is 'none'; "
                        "name the folder of one in defense.scorer")
    if scorer and start.described(scorer, "defense.scorer").get("text", {}).get(
            "name", "none") == "none":
        raise UserError(f"defense.scorer={scorer!r} is an encoder of images alone; cosine_filter "
                        "needs an image-text model")
    if not hasattr(sources.load(cfg.data, "train"), "captions"):
        raise UserError("defense cosine_filter needs captions, and data set "
                        f"{cfg.data.name!r} has none")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Says which pairs of the pool to drop; `truth` says how well, and changes nothing else."""
    del key
    d, pool = cfg.defense, data.pool
    model = encoders.load(d.scorer, mesh) if d.scorer else victims[0]
    cosines = first_cosines(model, pool, "cosine filter: pool")
    clean = first_cosines(model, data.clean, "cosine filter: clean pairs")
    found = _detection.judge(-cosines, -clean, d.false_alarm)
    verdict = {"model": "another" if d.scorer else "suspect", "rows": len(pool),
               "clean_rows": len(clean), "false_alarm": d.false_alarm,
               "threshold": -found["threshold"], "dropped": found["flagged"],
               "most_suspicious": found["most_suspicious"]}
    if truth is not None:
        poisoned = truth.poison >= 0
        verdict |= _detection.grade(-cosines, found["threshold"], poisoned)
        kept = int((poisoned & (cosines >= verdict["threshold"])).sum())
        verdict["remaining_poisons"] = kept if poisoned.any() else None
    _detection.keep(folder / "scores.npz", {"cosine": cosines})
    shown = _detection.most(-cosines, min(_SHOWN, len(pool)))
    lines = [shown[:len(shown) // 2], shown[len(shown) // 2:][:len(shown) // 2]]
    _detection.draw(folder / "suspicious.png", pool, lines, model.image_size)
    caption = "The images of the pool that lie farthest from their captions, the farthest first."
    return Outcome(verdict, None, {"pictures": {"suspicious.png": caption}})


def first_cosines(model, source, label: str) -> np.ndarray:
    """The cosine of each row's image and its first caption, float32 [n], see `cosines`."""
    return np.array([found[0] for found in cosines(model, source, label)], np.float32)


def cosines(model, source, label: str) -> list[np.ndarray]:
    """The cosines of each row's image and its captions ("" where it has none), under an image-text
    model; `label` stands before the progress."""
    found = []
    for items, shown in _detection.blocks(source, model.image_size, label):
        z = model.project(model.image(shown))
        texts = [list(item["captions"]) or [""] for item in items]
        column = {text: j for j, text in enumerate(dict.fromkeys(
            text for own in texts for text in own))}
        z_text = model.text(list(column))
        found += [z_text[[column[text] for text in own]] @ z[i] for i, own in enumerate(texts)]
    return found
