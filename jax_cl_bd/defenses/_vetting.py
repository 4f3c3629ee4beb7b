"""What vetting defenses share: thresholds with a stated false alarm rate, and results that stay.

Ours. All figures rest on one assumption, which nobody can test: what is known to be clean was made
as what is judged would have been made had nobody touched it.
"""

import json

import ml_collections
import numpy as np
from etils import epath
from scipy import stats

from jax_cl_bd import run_folder


def part(cfg: ml_collections.ConfigDict, name: str, **changes) -> ml_collections.ConfigDict:
    """The config as the detector `name` reads it: its own settings, cfg.defense[name], as its
    `defense`, with `changes`."""
    own = ml_collections.ConfigDict(cfg.to_dict())
    own.defense = ml_collections.ConfigDict({**cfg.defense[name].to_dict(), "name": name,
                                             **changes})
    return own


def threshold(clean: np.ndarray, false_alarm: float) -> tuple[float, float, str]:
    """What a score must exceed to be suspicious at the rate `false_alarm`.

    By ranks: the k-th largest of n clean scores is exceeded by one more of their kind with
    probability at most k / (n + 1), whatever their distribution; k is the largest that keeps this
    within `false_alarm`. Fewer than 1 / false_alarm - 1 scores have no such k; the threshold then
    is the end of Student's one-sided prediction interval for one more, mean + t s sqrt(1 + 1 / n),
    as if they were normal, and never below the largest. At least two scores.

    Returns:
        The threshold; the rate that holds for any distribution, never below 1 / (n + 1); and how
        the threshold was found, "ranks" or "normal".
    """
    n, ascending = len(clean), np.sort(clean)
    k = int(false_alarm * (n + 1) + 1e-9)
    if k >= 1:
        return float(ascending[n - k]), k / (n + 1), "ranks"
    reach = stats.t.isf(false_alarm, n - 1) * np.std(clean, ddof=1) * np.sqrt(1 + 1 / n)
    return float(max(ascending[-1], np.mean(clean) + reach)), 1 / (n + 1), "normal"


def surplus(flagged: int, rows: int, clean_rows: int, false_alarm: float) -> tuple[float, int]:
    """Whether more rows lie above a threshold of _detection.judge than clean ones would.

    Of `rows` clean rows the number above the j-th largest of m other clean scores, j = 1 +
    int(false_alarm m), is beta-binomial (rows, j, m + 1 - j), whatever the scores' distribution;
    ties make it smaller.

    Returns:
        The probability that clean data flag so many or more, and their mean number of flagged rows.
    """
    j = 1 + int(false_alarm * clean_rows)
    law = stats.betabinom(rows, j, clean_rows + 1 - j)
    return float(law.sf(flagged - 1)), round(float(law.mean()))


def kept(place: epath.Path, facts: dict, make) -> dict:
    """What `make()` gave, JSON values, from `place`/found.json if it was made for the same facts;
    else made now and left there."""
    path, facts = place / "found.json", json.loads(json.dumps(facts))
    if path.exists():
        before = run_folder.read_json(path)
        if before["for"] == facts:
            return before["found"]
    found = make()
    run_folder.write_json(path, {"for": facts, "found": found})
    return found


def shown(folder: epath.Path, name: str, pictures: dict[str, str]) -> dict[str, str]:
    """Copies the pictures that a detector left in `folder`/`name` up, under names of their own;
    gives their captions by these."""
    for file in pictures:
        (folder / name / file).copy(folder / f"{name}_{file}", overwrite=True)
    return {f"{name}_{file}": caption for file, caption in pictures.items()}
