"""PAR, Perturb and Recover (Singh, Croce and Hein, arXiv 2412.00727): fine-tuning on clean pairs
that first moves both towers away from what they were (objectives/par.py), at several rates
(_sweep). The paper: 250 K clean pairs of CC3M, 10 epochs, 3e-5, tau 2.15."""

import dataclasses

import jax
import ml_collections
from etils import epath

from jax_cl_bd.defenses import _sweep
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import renamed
from jax_cl_bd.objectives import par

NEEDS_LABELS = True  # of the validation images


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on.

    Raises:
        UserError: those of _sweep.check and objectives/par.py, a model that is not CLIP's, or fewer
            pairs than one batch.
    """
    _sweep.check(cfg)
    _sweep.check_clip(cfg)
    with renamed("objective.", "defense."):
        par.heads(_described(cfg).objective)
    _sweep.check_batch(cfg, clean)


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Perturbs and recovers `victims[0]` on `data.clean`; never uses `truth`.

    Returns:
        The verdict {"clean_pairs", "rate", "step", ...} with the model and all points.
    """
    del truth
    label = whose(folder)
    found = _sweep.repair(_described(cfg), victims[0], data.clean, data.validation, mesh=mesh,
                          folder=folder, key=key, label=f"perturb {label}")
    return dataclasses.replace(found, verdict={"clean_pairs": len(data.clean), **found.verdict})


def _described(cfg):
    return _sweep.with_loss(cfg, "par", tau=cfg.defense.tau)
