"""ABD, Adversarial Backdoor Defense (Kuang et al., arXiv 2409.15968): fine-tuning on clean pairs
with adversarial images and EDA captions as the augmented views (objectives/abd.py says what is
reconstructed), at several rates (_sweep). Budget, steps and weight are not verified; the small
configs make fewer PGD steps than 10, for time."""

import dataclasses

import jax
import ml_collections
from etils import epath

from jax_cl_bd.defenses import _sweep
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import renamed
from jax_cl_bd.objectives import abd

NEEDS_LABELS = True  # of the validation images


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on.

    Raises:
        UserError: those of _sweep.check and objectives/abd.py, a model that is not CLIP's, or fewer
            pairs than one batch.
    """
    _sweep.check(cfg)
    _sweep.check_clip(cfg)
    with renamed("objective.", "defense."):
        abd.heads(_sweep.described(_described(cfg)).objective)
    _sweep.check_batch(cfg, clean)


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Tunes `victims[0]` on `data.clean`; never uses `truth`.

    Returns:
        The verdict {"clean_pairs", "rate", "step", ...} with the model and all points.
    """
    del truth
    label = whose(folder)
    found = _sweep.repair(_described(cfg), victims[0], data.clean, data.validation, mesh=mesh,
                          folder=folder, key=key, label=f"adversarial {label}")
    return dataclasses.replace(found, verdict={"clean_pairs": len(data.clean), **found.verdict})


def _described(cfg):
    d = cfg.defense
    return _sweep.with_loss(cfg, "abd", budget=d.budget, pgd_steps=d.pgd_steps, pgd_rate=d.pgd_rate)
