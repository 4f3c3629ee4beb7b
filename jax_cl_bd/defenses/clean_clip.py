"""CleanCLIP: fine-tuning on clean pairs with the CLIP loss and a term within each modality.

Bansal, Singhi, Yang, Yin, Grover, Chang: "CleanCLIP: Mitigating Data Poisoning Attacks in
Multimodal Contrastive Learning", ICCV 2023, arXiv 2303.03323; code nishadsinghi/CleanCLIP
(src/train.py). The loss is L_CLIP + defense.in_modality * L_SS (objectives/in_modality.py; 1.0 is
CleanCLIP's, 0.0 its control "CLIP loss only"), with the learned scale shared by all terms unless
the victim's own objective.in_modality_temperature says otherwise. defense.cross_modal = False
leaves L_CLIP out (objectives/unimodal.py), the third loss of Verma et al. (arXiv 2311.14948).
Differences:

- The augmented image is drawn by the config's augment.view2, where CleanCLIP has AutoAugment's
  ImageNet policy; EDA takes synonyms from a small table (data/captions.py) instead of WordNet.
- Shown at every rate of defense.rates and at several points of each (_sweep), in place of one.
- Steps count from 0 and the optimiser starts afresh; the released code goes on with the optimiser
  of pretraining and starts beyond its warm-up. A SigLIP victim is tuned with its own loss.
- The clean pairs are disjoint from everything that the attack touched. `defense.pairs` of them are
  used (0: all), so that another repair's number can be given.
"""

import dataclasses

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import sources
from jax_cl_bd.defenses import _sweep
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError

_SEED = 7937  # of the draw of pairs, beside cfg.seed

NEEDS_LABELS = True  # of the validation images


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on.

    Raises:
        UserError: those of _sweep.check, more pairs than there are, or fewer than one batch.
    """
    _sweep.check(cfg)
    d = cfg.defense
    if not d.cross_modal:
        if d.in_modality <= 0:
            raise UserError(f"defense.cross_modal=False and in_modality={d.in_modality} leave no "
                            "loss; set one of them")
        _sweep.check_clip(cfg, "defense.cross_modal=False")
    check_pairs(cfg, clean)


def check_pairs(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Refuses a number of pairs that is not there, or less than one batch. Raises UserError."""
    d = cfg.defense
    if not 0 <= d.pairs <= clean:
        raise UserError(f"defense.pairs={d.pairs} must be 0 (all) to the {clean} clean pairs; "
                        f"raise defense.clean_fraction={d.clean_fraction} for more")
    _sweep.check_batch(cfg, d.pairs or clean)


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Fine-tunes `victims[0]` on the clean pairs `data.clean`; never uses `truth`.

    Returns:
        The verdict {"clean_pairs", "rate", "step"} with the model and all points of the sweep.
    """
    del truth
    label = whose(folder)
    clean = drawn(cfg, data.clean)
    own = cfg if cfg.defense.cross_modal else _sweep.with_loss(cfg, "unimodal")
    repaired = _sweep.repair(own, victims[0], clean, data.validation, mesh=mesh, folder=folder,
                             key=key, label=f"clean {label}")
    return dataclasses.replace(repaired,
                               verdict={"clean_pairs": len(clean), **repaired.verdict})


def drawn(cfg, clean):
    """The `defense.pairs` clean pairs that are trained on (0: all), by cfg.seed."""
    if not cfg.defense.pairs:
        return clean
    rng = np.random.default_rng([_SEED, cfg.seed])
    return sources.Subset(clean, np.sort(rng.permutation(len(clean))[:cfg.defense.pairs]))
