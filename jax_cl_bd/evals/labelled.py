"""Which rows of the training set carry a label for the probes.

Lists depend on the labels and the fraction alone, never on the run's seed: victim, control,
untrained encoder and defended models read the same rows. 1 % is a part of 10 %, which is a
part of 100 %.
"""

from pathlib import PurePosixPath

import numpy as np
from etils import epath

from jax_cl_bd.errors import UserError

_LIST_SEED = 20_220_519
_SPLIT_SEED = 7


def choose(cfg_evals, source, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the clean source that the probes may read, and their labels.

    Args:
        cfg_evals: cfg.evals; `label_list` (a text file) wins over `fraction`.
        source: the clean train source.
        labels: its labels [N], -1 where there is none.

    Returns:
        (rows int64 [n] ascending, labels int64 [n]).

    Raises:
        UserError: a fraction outside (0, 1], or a list that does not fit the source.
    """
    if cfg_evals.label_list:
        return from_list(cfg_evals.label_list, source, labels)
    rows = stratified(labels, cfg_evals.fraction)
    return rows, labels[rows]


def stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """The same share of every class, at least one row of each; rows ascending."""
    if not 0.0 < fraction <= 1.0:
        raise UserError(f"evals.fraction is {fraction}; it must lie in (0, 1], e.g. 0.1")
    rows = []
    for label in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([_LIST_SEED, int(label)]).permutation(members)
        rows.append(order[:max(1, round(fraction * len(members)))])
    if not rows:
        raise UserError("the training set has no labels, so no probe can be trained on it; "
                        "set downstream to a labelled source")
    return np.sort(np.concatenate(rows)).astype(np.int64)


def from_list(path: str, source, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads one relative path per line, optionally followed by an integer label.

    Raises:
        UserError: the file or a path in it is missing, a path occurs twice, or a row has no label.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"evals.label_list names {path!r}, which does not exist")
    if not hasattr(source, "paths"):
        raise UserError("evals.label_list needs a source with file paths (folder:PATH); "
                        "for this source set evals.fraction instead")
    row_of = {str(PurePosixPath(p)): i for i, p in enumerate(source.paths)}
    chosen = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        line = line.strip()
        if not line:
            continue
        name, label = line, None
        if str(PurePosixPath(name)) not in row_of:
            head, _, tail = line.rpartition(" ")
            if tail.lstrip("-").isdigit():
                name, label = head.strip(), int(tail)
        row = row_of.get(str(PurePosixPath(name)))
        if row is None:
            raise UserError(f"{path}, line {number}: {name!r} is not in the training set; paths "
                            f"are relative to its folder, e.g. {source.paths[0]!r}")
        if row in chosen:
            raise UserError(f"{path}, line {number}: {name!r} is listed twice")
        chosen[row] = int(labels[row]) if label is None else label
        if not 0 <= chosen[row] < len(source.classes):
            raise UserError(f"{path}, line {number}: label {chosen[row]} of {name!r} is outside "
                            f"0..{len(source.classes) - 1}")
    if not chosen:
        raise UserError(f"{path} lists no image")
    rows = np.array(sorted(chosen), np.int64)
    return rows, np.array([chosen[r] for r in rows], np.int64)


def validation_split(labels: np.ndarray, share: float = 0.2) -> np.ndarray:
    """Marks the labelled rows held out for choosing a regularisation strength.

    Returns:
        bool [n]; True = held out. A class keeps at least one row to train on, so with one row per
        class nothing is held out.
    """
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = np.random.default_rng([_SPLIT_SEED, int(label)]).permutation(members)
        held_out[order[:min(round(share * len(members)), len(members) - 1)]] = True
    return held_out
