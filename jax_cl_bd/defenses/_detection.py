"""What the detectors of samples share: a look at all rows, and what is said of their scores.

A score is higher for rows that are more suspicious.
"""

import numpy as np
from etils import epath
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from jax_cl_bd.data import images
from jax_cl_bd.errors import UserError
from jax_cl_bd.metrics import Progress

MOST = 20  # rows that the verdict names
_AT_ONCE = 2048  # images held in memory
_SIDE = 64  # pixels, at least, of an image in the picture of the report


def check(cfg, clean: int) -> None:
    """Finds a bad false alarm rate, and too few clean images. Raises UserError."""
    if not 0 < cfg.defense.false_alarm < 1:
        raise UserError(f"defense.false_alarm={cfg.defense.false_alarm} must lie in (0, 1)")
    if clean < 2:
        raise UserError(f"defense {cfg.defense.name} needs clean images for its threshold; raise "
                        f"defense.clean_fraction={cfg.defense.clean_fraction}")


def blocks(source, side: int, label: str):
    """Goes through a source once: (items, uint8 [n, side, side, 3] as they are measured)."""
    progress = Progress(label, len(source))
    for start in range(0, len(source), _AT_ONCE):
        items = [source[i] for i in range(start, min(start + _AT_ONCE, len(source)))]
        yield items, np.stack([images.test_image(item["image"], side) for item in items])
        progress.update(len(items))
    progress.close()


def judge(scores: np.ndarray, clean: np.ndarray, false_alarm: float) -> dict:
    """The defender's verdict on scores [n], by those of clean rows [m], as JSON values.

    The threshold is the lowest clean score that at most a share `false_alarm` of the clean ones
    exceeds; with fewer than 1 / false_alarm of them, the highest.
    """
    threshold = float(np.sort(clean)[len(clean) - 1 - int(false_alarm * len(clean))])
    return {"threshold": threshold, "flagged": int((scores > threshold).sum()),
            "most_suspicious": most(scores, MOST)}


def most(scores: np.ndarray, count: int) -> list[int]:
    """The rows of the highest scores [n], the highest first; of equal ones the earlier row."""
    return [int(i) for i in np.argsort(-scores, kind="stable")[:count]]


def grade(scores: np.ndarray, threshold: float, poisoned: np.ndarray) -> dict:
    """How right a verdict on scores [n] is, poisoned bool [n]; None where there is no poison.

    auroc: ties count half. tpr: the share of poisons above the threshold; fpr: that of other rows.
    tpr_at_1_percent_fpr: the most that any threshold finds whose fpr is at most 0.01, which takes
    knowledge of the poisons.
    """
    if not poisoned.any() or poisoned.all():
        return {"auroc": None, "tpr": None, "fpr": None, "tpr_at_1_percent_fpr": None}
    above = scores > threshold
    fpr, tpr, _ = roc_curve(poisoned, scores, drop_intermediate=False)
    return {"auroc": float(roc_auc_score(poisoned, scores)), "tpr": float(above[poisoned].mean()),
            "fpr": float(above[~poisoned].mean()),
            "tpr_at_1_percent_fpr": float(tpr[fpr <= 0.01].max())}


def draw(path: epath.Path, source, rows: list[list[int]], side: int) -> None:
    """Writes a PNG with one line of images for each list of rows; all lists of one length."""
    times = -(-_SIDE // side)
    lines = [np.concatenate([images.test_image(source[i]["image"], side) for i in line], axis=1)
             for line in rows]
    picture = np.concatenate(lines).repeat(times, axis=0).repeat(times, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(picture).save(file, "PNG")


def keep(path: epath.Path, scores: dict[str, np.ndarray]) -> None:
    """Writes the scores of all rows, {name: float32 [n]}, for whoever acts on them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **scores)
