"""The search of oracle-guided repair as a detector of rows: pairs that carry a trigger.

No paper's; the parts are those of EftCLIP (oracle_finetune.py, _search.py). In the rows to be
judged it looks for a picture that takes the encoder to a label which the oracle does not see there,
and for all rows that carry it. The oracle is a classifier trained on the known clean rows, or the
labels that the rows have (cfg.defense.oracle).

Whether what it found is more than chance: rows whose image shows the picture, among the rows to be
judged against known clean ones, by Fisher's exact test. The rows that the picture was taken from
and the clean rows that it was verified on are left out, since it was chosen by them; with these
gone, rows of one kind are as likely to show it on either side.
"""

import jax
import numpy as np
from etils import epath
from scipy import stats

from jax_cl_bd.data import images, sources, templates
from jax_cl_bd.defenses import _detection, _find_trigger, _oracle, _pinpoint, _regions, _search
from jax_cl_bd.defenses import oracle_finetune as repair
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.evals import zero_shot
from jax_cl_bd.metrics import Progress

_AT_ONCE = 2048  # images held in memory


def refusal(cfg, suspect, pool, clean) -> str:
    """Why these rows cannot be searched with this encoder, "" if they can."""
    if suspect.pair is None or suspect.pair.tokenizer is None:
        return "the encoder has no text tower or no tokenizer"
    if not hasattr(pool, "captions"):
        return "the rows have no captions"
    if tuple(clean.classes) != tuple(pool.classes) or len(pool.classes) < 3:
        return "it needs known clean rows of the same three classes or more"
    known = int((sources.labels(clean) >= 0).sum())
    if known < max(cfg.defense.batch_size, 2):
        return (f"its oracle needs defense.search.batch_size={cfg.defense.batch_size} known clean "
                f"rows with labels, and there are {known}")
    return ""


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Says which rows of the pool carry a trigger; `truth` says how right that is, and no more."""
    suspect, pool, curate = victims[0], data.pool, cfg.defense.curate
    clean = sources.Subset(data.clean, np.flatnonzero(sources.labels(data.clean) >= 0))
    split = np.random.default_rng([cfg.seed, len(clean)]).permutation(len(clean))
    count = min(curate.flips * len(pool.classes), len(clean) // 2)
    tried, untouched = (sources.Subset(clean, part) for part in (split[:count], split[count:]))
    ground = _oracle.make(cfg, clean, mesh, folder / "oracle", key)
    regions = _regions.make(cfg.defense.oracle)
    head = zero_shot.class_weights(suspect, pool.classes, templates.PROMPTS)
    claims = _find_trigger.suspect_of(suspect, head)
    rng = np.random.default_rng([cfg.seed, len(pool)])
    candidates, counts = _search.scan_pool(cfg, claims, pool, tried, ground, regions, "rows", rng)
    triggers = _search.verified(cfg, claims, pool, candidates, counts, tried, rng)
    found = _search.victims(cfg, claims, pool, tried, triggers, ground, regions, "rows")
    others = np.setdiff1d(rng.permutation(len(pool))[:cfg.defense.scan.screen],
                          [c.row for c in candidates])
    (rows, carrying), (clean_rows, clean_carrying) = (
        (len(rows), int((_likeness(triggers, source, rows, suspect.image_size)
                         >= curate.correlation).sum()))
        for source, rows in ((pool, others), (untouched, np.arange(len(untouched)))))
    verdict = {"labels": [str(pool.classes[t.label]) for t in triggers],
               "images_scanned": counts["images"], "oracle_images": ground.images,
               "candidates": len(candidates),
               "flagged": len(found), "rows_compared": rows, "carrying": carrying,
               "clean_rows": clean_rows, "clean_carrying": clean_carrying,
               "expected": round(clean_carrying / clean_rows * len(pool)),
               "p": surplus(carrying, rows, clean_carrying, clean_rows)}
    if truth is not None:
        verdict |= repair.score(truth, suspect.image_size, triggers, found)
    scores = np.full(len(pool), -1.0, np.float32)
    if found:  # the rest stay equal: nothing was found that tells them apart
        hits = np.array(sorted(found))
        scores[hits] = _likeness(triggers, pool, hits, suspect.image_size)
        scores[hits] = np.maximum(scores[hits], curate.correlation)
    _detection.keep(folder / "scores.npz", {"search": scores} if found else {})
    return Outcome(verdict, None, {"pictures": _search.draw(folder, pool, candidates, triggers,
                                                            suspect.image_size)})


def surplus(carrying: int, rows: int, clean_carrying: int, clean_rows: int) -> float:
    """The probability that `rows` hold so many of all that carry a picture, or more, if every row
    of these and of the clean ones is as likely to (hypergeometric, Fisher's exact test)."""
    return float(stats.hypergeom.sf(carrying - 1, rows + clean_rows, carrying + clean_carrying,
                                    rows))


def _likeness(triggers, source, rows, side) -> np.ndarray:
    """The best correlation of each image with any trigger, float32 [n], -1 without triggers."""
    best = np.full(len(rows), -1.0, np.float32)
    if not triggers:
        return best
    progress = Progress("compare rows with the trigger", len(rows))
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        shown = images.test_images(source, rows[part], side)
        best[part] = np.max([_pinpoint.matches(one, shown) for one in triggers], axis=0)
        progress.update(len(shown))
    progress.close()
    return best
