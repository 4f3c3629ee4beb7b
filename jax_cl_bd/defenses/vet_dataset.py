"""Vetting of a data set, by an encoder that was trained on it.

No paper's: the detectors of rows of this library, each through its own module, on all rows of the
data: the four scores of local density (defenses/density.py) and, where rows have captions, the
cosine filter (defenses/cosine_filter.py), by defense.scorer if it names an independent model, and
the search of the oracle-guided repair (_row_search.py), where known clean rows have labels.

Known clean rows are `defense.clean_data`, split `clean_split`; "" is the test split of the same
data, taken to be clean. A row is flagged above the threshold that a share `false_alarm` of them
exceeds, so a share of the rows of clean data is flagged too: a score makes the data suspicious only
where it flags more rows than clean data would but with probability `level`, divided by the number
of scores (_vetting.surplus; for the search _row_search.surplus). This finds nothing that changes
fewer rows than chance does, and takes known clean rows for rows of the same kind: an encoder that
fits its training rows better than others moves both counts.

Rows are ranked by every score, those of equal score all at the first of their places; a row's place
in the merged list is the best of its ranks by scores that make the data suspicious, then by any, of
equal ones the mean rank. The best, since any one of the detectors may be turned round by an attack
(many like poisons are dense, and the suspect finds its own poisons well matched).

Verdict {"suspicious", "findings", "not_checked", "suspects", ...}; `truth` (of a run folder of this
library) adds each detector's own scoring and changes nothing else.
"""

import jax
import ml_collections
import numpy as np
from etils import epath
from scipy import stats

from jax_cl_bd.data import sources
from jax_cl_bd.defenses import (
    _detection,
    _row_search,
    _search,
    _vetting,
    cosine_filter,
    density,
)
from jax_cl_bd.defenses.given import Given
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError, renamed

VETS = True
VERDICT_ONLY = True
_SHOWN = 32  # images in the picture of the suspects, in lines of 16
NEVER = ("whether the rows taken to be clean are clean",
         "triggers that cover the image, and images that show the target beside a trigger, by the "
         "search",
         "poisons that outnumber density.k in a reference batch, by density",
         "fewer poisons than the false alarms of as many clean rows, but for the ranking",
         "the encoder: configs/vet_encoder.py does that")


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` is the number of rows to be judged.

    Raises:
        UserError: a bad setting, or no known clean rows.
    """
    d = cfg.defense
    if not 0 < d.level < 1:
        raise UserError(f"defense.level={d.level} must lie in (0, 1)")
    known = len(clean_rows(cfg))
    if known < 1 / d.false_alarm - 1e-9:
        raise UserError(f"defense.false_alarm={d.false_alarm} needs {1 / d.false_alarm:.0f} clean "
                        f"rows and more, and {where(cfg)} has {known}; raise it")
    if clean < 2:
        raise UserError(f"split {cfg.data.train_split!r} of {cfg.data.name!r} has {clean} rows, "
                        "too few to judge")
    with renamed("defense.", "defense.density."):
        density.check(_density_settings(cfg), clean)
    if d.scorer:
        cosine_filter.check(_cosine_settings(cfg), known)
    if d.search.batch_size < 1:
        raise UserError(f"defense.search.batch_size={d.search.batch_size} must be at least 1")
    with renamed("defense.", "defense.search."):
        _search.check(_search_settings(cfg), max(known, d.search.batch_size))


def clean_rows(cfg: ml_collections.ConfigDict):
    """The rows that are known to be clean, a source.

    Raises:
        UserError: there are none, they are those to be judged, or false_alarm is out of range.
    """
    d = cfg.defense
    if not 0 < d.false_alarm < 1:
        raise UserError(f"defense.false_alarm={d.false_alarm} must lie in (0, 1)")
    split = d.clean_split or cfg.data.test_split
    own = d.clean_data or cfg.data.name
    if own == cfg.data.name and split == cfg.data.train_split:
        raise UserError(f"the known clean rows, split {split!r} of {cfg.data.name!r}, are the rows "
                        "to be judged; name others: --config.defense.clean_data=folder:PATH, or "
                        "--config.defense.clean_split=SPLIT")
    known = sources.load({**cfg.data.to_dict(), "name": own,
                          "test_split": split, "limit": 0}, "test")
    if count := sources.shared(known, sources.load(cfg.data, "train")):
        raise UserError(f"{where(cfg)}, the known clean rows, has {count} rows in common with "
                        f"those to be judged, split {cfg.data.train_split!r}; name a slice of its "
                        "own")
    return known


def where(cfg: ml_collections.ConfigDict) -> str:
    """Where the known clean rows come from, in words."""
    split = cfg.defense.clean_split or cfg.data.test_split
    return f"split {split!r} of {cfg.defense.clean_data or cfg.data.name!r}"


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Judges the rows of `data.pool` by `victims[0]`; `truth` says how well, and changes nothing
    else."""
    d, pool, suspect = cfg.defense, data.pool, victims[0]
    given = Given(clean_rows(cfg), None, pool)
    scores, findings, not_checked, pictures, details = {}, [], list(NEVER), {}, {}
    if not d.clean_data:
        not_checked[0] = f"whether {where(cfg)}, taken to be clean, is clean"
    for name, refusal, settings in DETECTORS:
        if why := refusal(cfg, suspect, given):
            not_checked.append(f"{name}: {why}")
            continue
        outcome = MODULES[name].run(settings(cfg), victims, given, truth, mesh, folder / name, key)
        details[name] = outcome.verdict
        pictures |= _vetting.shown(folder, name, outcome.report["pictures"])
        with (folder / name / "scores.npz").open("rb") as file, np.load(file) as found:
            scores |= {score: found[score] for score in found.files}
        findings += _findings(name, outcome.verdict, len(pool), len(given.clean), d.false_alarm)
    if "cosine" in scores and not d.scorer:
        not_checked.append("pairs that the encoder itself has learned to match, by the cosine "
                           "filter: defense.scorer names no independent model")
    if "cosine" in scores:
        scores["cosine"] = -scores["cosine"]  # higher is more suspicious
    for finding in findings:
        finding["suspicious"] = finding["p"] < d.level / len(findings)
    findings.sort(key=lambda f: f["p"])
    order, ranks = merged(scores, [f["detector"] for f in findings if f["suspicious"]])
    suspects = [_described(pool, int(row), {name: int(rank[row]) for name, rank in ranks.items()})
                for row in order[:_detection.MOST]]
    count = min(_SHOWN, len(pool)) // 2
    _detection.draw(folder / "suspects.png", pool, [list(order[:count]),
                                                    list(order[count:2 * count])],
                    suspect.image_size)
    pictures = {"suspects.png": "The most suspicious rows over all detectors, the first first."
                } | pictures
    verdict = {"suspicious": any(f["suspicious"] for f in findings), "rows": len(pool),
               "clean_rows": len(given.clean), "clean_rows_from": where(cfg),
               "false_alarm": d.false_alarm, "level": d.level, "findings": findings,
               "not_checked": not_checked, "suspects": suspects, "details": details}
    return Outcome(verdict, None, {"pictures": pictures})


def _findings(name, verdict, rows, clean_rows, false_alarm) -> list[dict]:
    """What a detector found, by each of its scores: {"detector", "flagged", "expected", "p"}."""
    if name == "search":
        labels = ", ".join(repr(label) for label in verdict["labels"])
        says = f"a picture that leads to {labels}" if labels else "no trigger found"
        return [{"detector": name, "flagged": verdict["flagged"],
                 "expected": verdict["expected"], "p": verdict["p"], "says": says}]
    flagged = ({"cosine": verdict["dropped"]} if name == "cosine_filter" else
               {score: own["flagged"] for score, own in verdict.items()
                if isinstance(own, dict) and "flagged" in own})
    found = []
    for score, count in flagged.items():
        p, expected = _vetting.surplus(count, rows, clean_rows, false_alarm)
        found.append({"detector": score, "flagged": count, "expected": expected, "p": p})
    return found


def merged(scores: dict[str, np.ndarray], first=()) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All rows, the most suspicious first, int64 [n], by {score: float [n]}; and each score's rank
    of every row, 0 the most suspicious, rows of equal score all at the first of their places. The
    order: best rank by the scores `first`, best rank by all, mean rank, row."""
    ranks = {name: stats.rankdata(-values, method="min").astype(np.int64) - 1
             for name, values in scores.items()}
    every = np.stack(list(ranks.values()))
    told = np.stack([ranks[name] for name in first]) if len(first) else every
    return np.lexsort((every.mean(0), every.min(0), told.min(0))), ranks


def _described(pool, i: int, ranks: dict[str, int]) -> dict:
    """A suspect as somebody finds it again: its row of the data, and file and captions if any."""
    row = int(pool.order[i])
    found = {"row": row, "ranks": ranks}
    if row < len(pool.source) and hasattr(pool.source, "paths"):
        found["file"] = str(pool.source.paths[row])
    elif row < len(pool.source) and hasattr(pool.source, "where"):
        found["file"] = pool.source.where(row)
    if hasattr(pool, "captions"):
        found["captions"] = list(pool.captions(np.array([i]))[0])
    return found


def _always(cfg, suspect, given) -> str:
    return ""


def _no_captions(cfg, suspect, given) -> str:
    """Why images and captions cannot be compared."""
    if not hasattr(given.pool, "captions"):
        return "the rows have no captions"
    if not hasattr(given.clean, "captions"):
        return f"{where(cfg)} has no captions to set a threshold by"
    if not cfg.defense.scorer and (suspect.pair is None or suspect.pair.tokenizer is None):
        return ("the encoder cannot read captions (no text tower or no tokenizer), and "
                "defense.scorer names no other model")
    return ""


def _density_settings(cfg):
    return _vetting.part(cfg, "density", clean_fraction=1.0, false_alarm=cfg.defense.false_alarm)


def _cosine_settings(cfg):
    own = ml_collections.ConfigDict(cfg.to_dict())
    own.defense = ml_collections.ConfigDict({
        "name": "cosine_filter", "clean_fraction": 1.0, "scorer": cfg.defense.scorer,
        "false_alarm": cfg.defense.false_alarm})
    return own


def _no_search(cfg, suspect, given) -> str:
    return _row_search.refusal(_search_settings(cfg), suspect, given.pool, given.clean)


def _search_settings(cfg):
    return _vetting.part(cfg, "search")


MODULES = {"density": density, "cosine_filter": cosine_filter, "search": _row_search}
# Name; why it cannot be run on this encoder and these rows, "" if it can; its settings.
DETECTORS = (("density", _always, _density_settings),
             ("cosine_filter", _no_captions, _cosine_settings),
             ("search", _no_search, _search_settings))
