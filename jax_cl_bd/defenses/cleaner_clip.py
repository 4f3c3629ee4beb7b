"""CleanerCLIP, also TA-Cleaner: CleanCLIP with a fine-grained alignment of images and texts.

Xun, Liang, Jia, Liu and Cao, arXiv 2409.17601: L_CLIP + defense.in_modality * L_SS +
defense.align * L_TA on clean pairs (objectives/cleaner_clip.py, whose form is reconstructed), with
`defense.negatives` counterfactual sub-captions of every caption by a table instead of a parser
(data/sub_captions.py). Captions that name no class take no part in L_TA. The weights and the
number of sub-captions are not verified. Otherwise as defenses/clean_clip.py.
"""

import dataclasses

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import sources
from jax_cl_bd.data.sub_captions import SubCaptions, spelt, subject
from jax_cl_bd.defenses import _sweep, clean_clip
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import cleaner_clip

NEEDS_LABELS = True  # of the validation images


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on.

    Raises:
        UserError: those of defenses/clean_clip.py and objectives/cleaner_clip.py, a model that is
            not CLIP's, fewer than two class names.
    """
    _sweep.check(cfg)
    clean_clip.check_pairs(cfg, clean)
    _sweep.check_clip(cfg)
    cleaner_clip.heads(_described(cfg).objective)
    names = {spelt(name) for name in sources.load(cfg.data, "train").classes}
    if len(names) < 2:
        raise UserError("defense cleaner_clip exchanges one class name for another, and data set "
                        f"{cfg.data.name!r} has {len(names)} of them")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Fine-tunes `victims[0]` on the clean pairs `data.clean`; never uses `truth`.

    Returns:
        The verdict {"clean_pairs", "captions_that_name_a_class": their share, "rate", "step", ...}
        with the model and all points.
    """
    del truth
    label = whose(folder)
    clean = clean_clip.drawn(cfg, data.clean)
    made = SubCaptions(tuple(map(str, clean.classes)), cfg.defense.negatives)
    found = _sweep.repair(_described(cfg), victims[0], clean, data.validation, mesh=mesh,
                          folder=folder, key=key, label=f"align {label}", derive=made)
    named = [subject(text, made.classes) is not None
             for texts in clean.captions(np.arange(len(clean))) for text in texts]
    verdict = {"clean_pairs": len(clean), "captions_that_name_a_class": float(np.mean(named))}
    return dataclasses.replace(found, verdict=verdict | found.verdict)


def _described(cfg):
    return _sweep.with_loss(cfg, "cleaner_clip", align=cfg.defense.align,
                            negatives=cfg.defense.negatives)
