"""What every defense gives back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from etils import epath


def whose(folder: epath.Path) -> str:
    """Of whom a folder takes what a defense finds, in a word: "victim" or "control"."""
    return "control" if folder.name == "control" else "victim"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A verdict (JSON values), a repaired encoder or None, and figures for the report.

    variables: {"params": {part: ...}, "batch_stats": {part: ...}} of the repaired model, described
    by `cfg`; of an encoder of images its part "encoder" is enough.
    points: all that a repair tried (_sweep.Point), the chosen one among them.
    classify: of a repaired model with a classifier of its own, which answers instead of zero-shot:
    variables -> (features of the encoder [N, D] -> class [N]).
    """

    verdict: dict[str, Any]
    variables: Any
    report: dict[str, Any]
    cfg: ml_collections.ConfigDict | None = None
    points: list = dataclasses.field(default_factory=list)
    classify: Callable[[Any], Callable[[np.ndarray], np.ndarray]] | None = None
