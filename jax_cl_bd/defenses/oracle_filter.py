"""What an oracle repairs without any search for a trigger: two baselines for oracle_finetune.

No paper: ours, to tell what Algorithm 1 of EftCLIP (arXiv 2511.13545) adds to its oracle. A random
`defense.pairs` pairs of the pool that the suspect was trained on (0: all) are shown to the oracle
(_oracle). A pair stands if its captions name a class that the oracle sees in the image (score at
least `defense.sure`). Of the others, those that name no class at all included,

"drop"     leaves out every one;
"relabel"  gives each a caption by a template (data/templates.PROMPTS) with the oracle's top class,
           and leaves out those in which the oracle sees nothing at all (every score is 0).

The suspect is then fine-tuned on what is there (_sweep). The pairs are held in memory.

With `truth` the verdict has victim_precision and victim_recall, over the pairs that did not stand
and the poisons among the pairs drawn, as oracle_finetune has them.
"""

import dataclasses

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd.data import images, mentions, templates
from jax_cl_bd.defenses import _oracle, _sweep
from jax_cl_bd.defenses._compact_set import Pairs
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError, unknown

NEEDS_LABELS = True  # of the images, for its oracle and its validation
NEEDS_POOL = True  # the pairs that the suspect was trained on
ACTIONS = ("drop", "relabel")
_SEED = 7949  # of the draws, beside cfg.seed


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images train a classifier oracle.

    Raises:
        UserError: those of _sweep.check and _oracle.check, or a setting out of range.
    """
    _sweep.check(cfg)
    _oracle.check(cfg, clean)
    d = cfg.defense
    if d.action not in ACTIONS:
        raise unknown("defense.action", d.action, ACTIONS)
    if not 0 < d.sure <= 1:
        raise UserError(f"defense.sure={d.sure} must lie in (0, 1]")
    if d.pairs and d.pairs < d.batch_size:
        raise UserError(f"defense.pairs={d.pairs} must be 0 (all) or at least defense.batch_size="
                        f"{d.batch_size}")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Fine-tunes `victims[0]` on pairs of `data.pool` that the oracle agrees with; `truth` scores.

    Returns:
        The verdict {"action", "pairs" drawn, "oracle_images", "dropped", "relabelled", "rate",
        "step"} and, with truth, its scores (None where nothing can be said), with the model and
        all points.

    Raises:
        UserError: more pairs asked for than there are, or fewer left than one batch.
    """
    d, pool = cfg.defense, data.pool
    if d.pairs > len(pool):
        raise UserError(f"defense.pairs={d.pairs}, but the suspect was trained on {len(pool)}")
    label = whose(folder)
    oracle_key, tune_key = jax.random.split(key)
    # The oracle has never seen the suspect, so one serves victim and control.
    place = (folder.parent if label == "control" else folder) / "oracle"
    ground = _oracle.make(cfg, data.clean, mesh, place, oracle_key)
    rng = np.random.default_rng([_SEED, cfg.seed])
    rows = np.sort(rng.permutation(len(pool))[:d.pairs or None])
    pairs, caught, counts = filtered(d, cfg.data.image_size, pool, rows, ground, rng)
    verdict = {"action": d.action, "pairs": len(rows), "oracle_images": ground.images, **counts}
    if truth is not None:
        verdict |= _score(truth.poison[rows] >= 0, caught)
    if len(pairs) < d.batch_size:
        raise UserError(f"the oracle leaves {len(pairs)} of {len(rows)} pairs, fewer than "
                        f"defense.batch_size={d.batch_size}; raise defense.pairs or lower "
                        f"defense.sure={d.sure}")
    repaired = _sweep.repair(cfg, victims[0], pairs, data.validation, mesh=mesh, folder=folder,
                             key=tune_key, label=f"{d.action} {label}",
                             steps_before=_oracle.steps(cfg))
    return dataclasses.replace(repaired, verdict=verdict | repaired.verdict)


def filtered(settings, side: int, pool, rows: np.ndarray, ground, rng: np.random.Generator
             ) -> tuple[Pairs, np.ndarray, dict[str, int]]:
    """Drops or relabels the pairs that do not stand (top of the file).

    Args:
        settings: action, sure. rows: int64 [N] of the pool. ground: of _oracle.make.
    Returns:
        The pairs to train on, which rows did not stand (bool [N]), and counts "dropped" and
        "relabelled".
    """
    texts = [list(found) for found in pool.captions(rows)]
    seen = _oracle.asked(ground, pool, rows, "ask the oracle")  # [N, C]
    named = np.stack([mentions.naming(texts, str(name)) for name in pool.classes], axis=1)
    caught = ~(named & (seen >= settings.sure)).any(1)
    relabelled = caught & (seen.max(1) > 0) & (settings.action == "relabel")
    for i in np.flatnonzero(relabelled):
        prompt = templates.PROMPTS[rng.integers(len(templates.PROMPTS))]
        texts[i] = [templates.fill(prompt, str(pool.classes[seen[i].argmax()]))]
    kept = np.flatnonzero(~caught | relabelled)
    image = images.test_images(pool, rows[kept], side)
    counts = {"dropped": len(rows) - len(kept), "relabelled": int(relabelled.sum())}
    return Pairs(image, [texts[i] for i in kept], tuple(pool.classes)), caught, counts


def _score(poisoned, caught) -> dict:
    """Which share of what was caught is poison, and which share of the poisons was caught."""
    hits = int((poisoned & caught).sum())
    return {"victim_precision": hits / int(caught.sum()) if caught.any() else None,
            "victim_recall": hits / int(poisoned.sum()) if poisoned.any() else None}
