"""UBT, Unlearning Backdoor Threats: suspected pairs are found by overfitting and then forgotten.

Liang et al., arXiv 2403.16257; long version Liu et al., arXiv 2409.19526. Neither full text nor
code was seen; the abstracts give the three steps, and whose each detail is stands with it:

1. Overfit a copy of the suspect on pairs of the pool, the set that it was trained on, of the lowest
   similarity of image and caption (the paper's). That these are the lowest `overfit.fraction`, for
   `overfit.steps` steps at the constant rate `overfit.lr`, and by what `overfit.objective`: ours.
   "clip" is the loss that the suspect was trained by, "pull_together" its attraction alone: where
   poisons crowd among the weakest pairs they are each other's negatives, and CLIP's loss parted
   them instead (docs/papers.md).
2. Pairs whose similarity then stands out are suspected (the paper's). The score is similarity after
   minus similarity before, a mean over the captions of a row, and the `suspects` rows of the
   highest score are taken: a reconstruction, with counts of ours.
3. Token-level unlearning of these (the paper's), on the suspect itself, beside CLIP's loss on
   clean-looking pairs, the share `clean_looking` of the pool with the lowest scores; suspected
   pairs are repeated to about the share `bad_share` of every batch. How is reconstructed, see
   objectives/unlearn_tokens.py; there stands the rule, too, at which unlearning rests.

On the sweep (_sweep); nothing of the defender's clean pairs is used but the validation images. No
number here is the paper's. With `truth` the verdict says which share of the suspected rows are
poisons (suspect_precision) and which share of the poisons is suspected (suspect_recall).
"""

import dataclasses

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import optim, parallel, run_folder
from jax_cl_bd.data import feed, sources, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.defenses import _detection, _sweep, cosine_filter
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError, renamed, unknown
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.objectives import training, unlearn_tokens
from jax_cl_bd.train import fit

NEEDS_LABELS = True  # of the validation images
NEEDS_POOL = True
OVERFIT_BY = ("pull_together", "clip")
_SHOWN = 32  # images in the picture of the report, in two lines


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; no clean pairs are needed.

    Raises:
        UserError: those of _sweep.check and objectives/unlearn_tokens.py, a model that is not
            CLIP's, a setting out of range, or sets of pairs that the pool cannot give.
    """
    del clean
    _sweep.check(cfg)
    d = cfg.defense
    _sweep.check_clip(cfg)
    with renamed("objective.", "defense."):
        unlearn_tokens.heads(_described(cfg, 0, ()).objective)
    for name, value in (("overfit.fraction", d.overfit.fraction),
                        ("clean_looking", d.clean_looking), ("bad_share", d.bad_share)):
        if not 0 < value < 1:
            raise UserError(f"defense.{name}={value} must lie in (0, 1)")
    if d.overfit.objective not in OVERFIT_BY:
        raise unknown("defense.overfit.objective", d.overfit.objective, OVERFIT_BY)
    if d.overfit.steps < 1 or d.overfit.lr <= 0:
        raise UserError(f"defense.overfit.steps={d.overfit.steps} must be at least 1 and lr="
                        f"{d.overfit.lr} positive")
    _sizes(d, len(sources.load(cfg.data, "train")))


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Finds suspected pairs of `data.pool` and makes `victims[0]` forget them; `truth` scores.

    Returns:
        The verdict {"overfit_pairs", "overfit_steps", "suspected", "most_suspicious": the first 20
        rows of the pool, "clean_looking", "rate", "step", ...} with the model and all points.
    """
    d, suspect, pool = cfg.defense, victims[0], data.pool
    label = whose(folder)
    weakest, count = _sizes(d, len(pool))
    overfit_key, tune_key = jax.random.split(key)
    before = similarities(suspect, pool, f"similarity, {label}")
    weak = np.sort(np.argsort(before, kind="stable")[:weakest])
    copy = _overfit(cfg, suspect, sources.Subset(pool, weak), mesh=mesh, folder=folder / "overfit",
                    key=overfit_key, label=f"overfit {label}")
    after = similarities(copy, pool, f"similarity, overfit {label}")
    scores = after - before
    bad = _detection.most(scores, d.suspects)
    good = np.sort(np.argsort(scores, kind="stable")[:count])
    verdict = {"overfit_pairs": weakest, "overfit_steps": d.overfit.steps, "suspected": len(bad),
               "most_suspicious": bad[:_detection.MOST], "clean_looking": len(good)}
    if truth is not None:
        verdict |= _score(truth.poison >= 0, bad)
    _detection.keep(folder / "scores.npz", {"before": before, "after": after})
    half = min(_SHOWN, len(bad)) // 2
    _detection.draw(folder / "suspected.png", pool, [bad[:half], bad[half:2 * half]],
                    suspect.image_size)
    # Rows of the set that was trained on, see data/poisoned.py: what there is to throw away.
    report = {"suspected": [int(pool.order[row]) for row in bad], "pictures": {
        "suspected.png": "The suspected pairs' images, the most suspicious first."}}
    repeats = max(1, round(d.bad_share / (1 - d.bad_share) * len(good) / len(bad)))
    pairs = sources.Subset(pool, np.concatenate([good, np.tile(bad, repeats)]))
    words = suspect.pair.tokenizer
    special = tuple(i for i in (words.start, words.end, words.pad) if i is not None)
    found = _sweep.repair(_described(cfg, len(good), special), suspect, pairs, data.validation,
                          mesh=mesh, folder=folder, key=tune_key, label=f"unlearn {label}",
                          steps_before=d.overfit.steps)
    different = len(np.unique(np.concatenate([weak, good, bad])))  # `bad` ones come repeatedly
    return dataclasses.replace(found, verdict=verdict | found.verdict | {
        "training_pairs": different}, report=report)


def similarities(model, source, label: str) -> np.ndarray:
    """The mean cosine of each row's image and its captions under an image-text model, float32 [n];
    `label` stands before the progress."""
    return np.array([found.mean() for found in cosine_filter.cosines(model, source, label)],
                    np.float32)


def _sizes(settings, rows: int) -> tuple[int, int]:
    """How many pairs are overfitted on, and how many count as clean-looking, of a pool."""
    weakest = round(settings.overfit.fraction * rows)
    if weakest < settings.batch_size:
        raise UserError(f"defense.overfit.fraction={settings.overfit.fraction} of {rows} pairs is "
                        f"{weakest}, fewer than one batch of defense.batch_size="
                        f"{settings.batch_size}")
    good = round(settings.clean_looking * rows)
    if not 2 <= settings.suspects <= rows - good or good < 1:
        raise UserError(f"defense.suspects={settings.suspects} must be at least 2 and, beside the "
                        f"{good} of {rows} pairs that defense.clean_looking="
                        f"{settings.clean_looking} takes, at most {rows - good}")
    return weakest, good


def _overfit(cfg, suspect, pairs, *, mesh, folder, key, label):
    """Trains a copy of the suspect on pairs by `overfit.objective`; gives the encoder."""
    own = _sweep.described(cfg)
    own.objective.name = cfg.defense.overfit.objective
    recipe = cfg.defense.optim.copy_and_resolve_references()
    recipe.update(lr=float(cfg.defense.overfit.lr), schedule="constant", warmup_steps=0)
    steps = cfg.defense.overfit.steps
    tx, _ = optim.make(recipe, steps, 1)
    state = _sweep.first_state(own, suspect.pair.variables, tx, key)
    shardings = parallel.state_shardings(mesh, jax.eval_shape(lambda: state))
    dataset = PoisonedSet(pairs, texts=texts.of(own, suspect.pair.tokenizer, pairs))
    run_folder.write_config(folder, own)
    state = fit(training.make_step(own, tx, steps), jax.device_put(state, shardings), shardings,
                feed.make(own, dataset), folder=folder, steps=steps, cfg_train=own.train,
                mesh=mesh, label=label)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return encoders.of_parts(own, variables, mesh, suspect.pair.tokenizer)


def _score(poisoned, bad):
    """How right the suspicion is; None where there is no poison."""
    hits = int(poisoned[bad].sum())
    some = bool(poisoned.any())
    return {"suspect_precision": hits / len(bad) if some else None,
            "suspect_recall": hits / int(poisoned.sum()) if some else None}


def _described(cfg, first_bad, special):
    d = cfg.defense
    return _sweep.with_loss(cfg, "unlearn_tokens", first_bad=first_bad, weight=d.weight,
                            tokens=d.tokens, floor=d.floor, ascend=d.ascend, special=special)
