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
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import training

_SEED = 7937  # of the draw of pairs, beside cfg.seed

NEEDS_LABELS = True  # of the validation images


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on.

    Raises:
        UserError: those of _sweep.check, more pairs than there are, or fewer than one batch.
    """
    _sweep.check(cfg)
    d = cfg.defense
    if not d.get("cross_modal", True) and d.in_modality <= 0:  # cleaner_clip has no such field
        raise UserError(f"defense.cross_modal=False and in_modality={d.in_modality} leave no loss; "
                        "set one of them")
    if not d.get("cross_modal", True) and training.plain(cfg).objective.name != "clip":
        raise UserError("defense.cross_modal=False is for models pretrained with objective 'clip'; "
                        f"this one has {cfg.objective.name!r}")
    if not 0 <= d.pairs <= clean:
        raise UserError(f"defense.pairs={d.pairs} must be 0 (all) to the {clean} clean pairs; "
                        f"raise defense.clean_fraction={d.clean_fraction} for more")
    if (d.pairs or clean) < d.batch_size:
        raise UserError(f"{d.pairs or clean} clean pairs are fewer than one batch of "
                        f"defense.batch_size={d.batch_size}")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Fine-tunes `victims[0]` on the clean pairs `data.clean`; never uses `truth`.

    Returns:
        The verdict {"clean_pairs", "rate", "step"} with the model and all points of the sweep.
    """
    del truth
    label = "control" if folder.name == "control" else "victim"
    clean, own = drawn(cfg, data.clean), training.plain(cfg)
    if not cfg.defense.cross_modal:
        own.objective.name = "unimodal"
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
