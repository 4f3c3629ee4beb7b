"""Oracle-guided repair of a poisoned image-text model (EftCLIP).

Hossain, Sajeeda, Perla and Shao: "Robust Defense Strategies for Multimodal Contrastive Learning:
Efficient Fine-tuning Against Backdoor Attacks", arXiv 2511.13545. Four stages: find regions in
which the suspect sees what the oracle does not (_find_trigger, the paper's Algorithm 1, in part
reconstructed); from them the target label, the trigger and the poisoned pairs (_search, _recurring,
_pinpoint); a compact set of pairs (_compact_set); fine-tuning on it (_sweep), by CLIP's loss with
the suspect held on untouched pairs (objectives/preserve.py). No code and no full text of the second
algorithm are public: _pinpoint, _compact_set and that loss are reconstructions, _recurring is ours,
and all thresholds are reconstructed. docs/results.md has what each reconstructed step is worth.
For triggers that are visible, compact regions; the paper leaves others open.

The verdict says what was found by the defender's own means; with `truth` it also says how right
that is: target_label_correct (the label named first is the target), trigger_iou (mean over the
images on which that trigger rests; 0 for clean pairs), victim_precision and victim_recall (over the
pairs of the pool).
"""

import dataclasses
import sys
import time

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import templates
from jax_cl_bd.defenses import (
    _compact_set,
    _find_trigger,
    _oracle,
    _pinpoint,
    _regions,
    _search,
    _sweep,
)
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError
from jax_cl_bd.evals import zero_shot

NEEDS_LABELS = True  # of the images, for its oracle and its validation
NEEDS_POOL = True  # the pairs that the suspect was trained on


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are trusted."""
    _sweep.check(cfg)
    _search.check(cfg, clean)
    if cfg.defense.preserve < 0:
        raise UserError(f"defense.preserve={cfg.defense.preserve} must be 0 (off) or more")
    if cfg.defense.preserve:
        _sweep.check_clip(cfg, f"defense.preserve={cfg.defense.preserve} (0 leaves it out)")
    if not set(cfg.defense.curate.parts) - {"replay"}:
        raise UserError(f"defense.curate.parts={tuple(cfg.defense.curate.parts)} must name a part "
                        "beside 'replay', which has a number of pairs for each pair of the others")
    if clean < 2:
        raise UserError("defense oracle_finetune needs trusted images; raise "
                        f"defense.clean_fraction={cfg.defense.clean_fraction}")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Finds and removes the backdoor of `victims[0]`; `truth` scores what was found, no more.

    A suspect in which nothing is found is given back as it is, and so is one whose compact set is
    smaller than a batch (the verdict's `repaired`).
    """
    suspect, pool = victims[0], data.pool
    label = whose(folder)
    began, seconds = time.monotonic(), {}

    def lap(stage):
        nonlocal began
        seconds[stage] = round(time.monotonic() - began, 1)
        began = time.monotonic()

    oracle_key, tune_key = jax.random.split(key)
    # The oracle has never seen the suspect, so one serves victim and control.
    place = (folder.parent if label == "control" else folder) / "oracle"
    ground = _oracle.make(cfg, data.clean, mesh, place, oracle_key)
    regions = _regions.make(cfg.defense.oracle)
    lap("oracle")
    rng = np.random.default_rng([cfg.seed, len(pool)])
    head = zero_shot.class_weights(suspect, pool.classes, templates.PROMPTS)
    claims = _find_trigger.suspect_of(suspect, head)
    candidates, counts = _search.scan_pool(cfg, claims, pool, data.clean, ground, regions, label,
                                           rng)
    lap("find trigger")
    triggers = _search.verified(cfg, claims, pool, candidates, counts, data.clean, rng)
    lap("verify")
    found = _search.victims(cfg, claims, pool, data.clean, triggers, ground, regions, label)
    lap("find victims")
    verdict = _verdict(pool, counts, triggers, found)
    if truth is not None:
        verdict |= score(truth, suspect.image_size, triggers, found)
    # Rows of the set that was trained on, see data/poisoned.py: what there is to throw away.
    report = {"seconds": seconds, "victims": [int(pool.order[row]) for row in sorted(found)],
              "pictures": _search.draw(folder, pool, candidates, triggers, suspect.image_size)}
    pairs, parts = (), dict.fromkeys(_compact_set.PARTS, 0)
    if triggers:
        pairs, parts = _compact_set.curate(cfg.defense.curate, cfg.data.image_size, pool,
                                           data.clean, triggers, found, ground, rng)
        lap("curate")
        if len(pairs) < cfg.defense.batch_size:
            print(f"{label}: the compact set has {len(pairs)} pairs, fewer than defense.batch_size="
                  f"{cfg.defense.batch_size}, so nothing is repaired; raise defense.curate."
                  "per_label", file=sys.stderr)
    verdict |= {"oracle_images": ground.images, "compact_set_pairs": len(pairs),
                "compact_set": parts,
                "repaired": len(pairs) >= cfg.defense.batch_size}
    if not verdict["repaired"]:
        own = _sweep.described(cfg)
        _sweep.keep(folder, own, suspect.pair.variables, 0, suspect)
        verdict |= {"training_pairs": 0, "gradient_steps": _oracle.steps(cfg)}
        return Outcome(verdict, suspect.pair.variables, report, own)
    own = cfg
    if cfg.defense.preserve:
        own = _sweep.with_loss(cfg, "preserve", preserve=cfg.defense.preserve,
                               untouched=sum(parts[name] for name in _compact_set.UNTOUCHED))
    repaired = _sweep.repair(own, suspect, pairs, data.validation, mesh=mesh, folder=folder,
                             key=tune_key, label=f"repair {label}", steps_before=_oracle.steps(cfg))
    lap("fine-tune")
    return dataclasses.replace(repaired, verdict=verdict | repaired.verdict, report=report)


def _verdict(pool, counts, triggers, found) -> dict:
    """What the defender can say."""
    of_first = triggers[0].where if triggers else ()
    return {"backdoor_found": bool(triggers),
            "target_label": triggers[0].label if triggers else None,
            "target_class": str(pool.classes[triggers[0].label]) if triggers else None,
            "flagged_labels": [t.label for t in triggers],
            "affected_labels": sorted({c for t in triggers for c in t.affected()}),
            "flip_rate": [round(t.rate, 4) for t in triggers],
            "trigger_box": list(of_first[0].box) if of_first else None,
            "images_scanned": counts["images"],
            "candidates": int(counts["found"].sum()), "victims": len(found)}


def score(truth, side, triggers, found) -> dict:
    """How right the verdict is; None where nothing can be said, as of boxes on images that were not
    poisoned at the encoder's size."""
    poisoned = truth.poison >= 0
    if not poisoned.any():
        return {"target_label_correct": None, "trigger_iou": None, "victim_precision": None,
                "victim_recall": None, "false_alarm": bool(triggers)}
    overlaps = []
    for c in triggers[0].where if triggers else ():
        k = truth.poison[c.row]
        if k < 0 or tuple(truth.plan.canvas[k]) == (side, side):
            overlaps.append(_pinpoint.iou(c.box, truth.plan.trigger_box[k]) if k >= 0 else 0.0)
    rows = np.array(sorted(found), np.int64)
    hits = int(poisoned[rows].sum()) if len(rows) else 0
    return {"target_label_correct": bool(triggers) and triggers[0].label == truth.target,
            "trigger_iou": float(np.mean(overlaps)) if overlaps else None,
            "victim_precision": hits / len(rows) if len(rows) else None,
            "victim_recall": hits / int(poisoned.sum())}
