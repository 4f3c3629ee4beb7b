"""FindAdversarialTrigger: where the suspect model sees an object that the oracle does not.

EftCLIP (Hossain et al., arXiv 2511.13545), Algorithm 1, of which a summary is public and no code
(docs/papers.md). From the paper: the objects L that the suspect claims, those S that the
oracle grounds, P = L \\ S, and the suspect's opinion of the oracle's regions, which decides what
stays in P. Reconstructed here, and so named in docs/papers.md: every threshold; the claim test
p >= 2 / C; which crop a region is shown in (`evidence`: "crop", resized as the summary has it, or
"transplant", at its own size and place on a plain canvas and on clean images, since a resized patch
may trigger nothing); the counterfactual (the region filled with the image's mean takes the label
away, and what is then seen is what the oracle grounds; `counterfactual` False leaves it out); the
choice among regions that pass (confident and small); and the order in which images are scanned.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jax_cl_bd.data import images
from jax_cl_bd.defenses import _oracle, _regions

Regions = Callable[[np.ndarray], np.ndarray]  # image -> boxes int [R, 4]
EVIDENCE = ("transplant", "crop")
_BLOCK = 256  # images that one call of the suspect sees: one shape, one compile
_CANVASES = 4  # clean images that a region is moved to, beside a plain one
_ASKED = 32  # rows that the oracle is asked about at once
_KEPT = 24  # regions of an image that pass the counterfactual and are looked at further
_MARGIN = 0.1  # around a crop, share of its sides
_AREA_WEIGHT = 7.0  # what a region's share of the image costs, against the label's probability


@dataclasses.dataclass(frozen=True)
class Suspect:
    """The model under suspicion as a zero-shot classifier.

    probabilities: uint8 [N, S, S, 3] -> float32 [N, C].
    """

    probabilities: Callable[[np.ndarray], np.ndarray]
    side: int


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A region that may hold a trigger: `row` of the pool, suspected `label`, the region's `box`
    (y, x, height, width), its `pixels` uint8 [h, w, 3], and how surely it carries the label."""

    row: int
    label: int
    box: tuple[int, int, int, int]
    pixels: np.ndarray
    score: float


def suspect_of(encoder, head: np.ndarray) -> Suspect:
    """Wraps an image-text encoder and its class embeddings [C, E] (evals/zero_shot.py)."""
    seen = dataclasses.replace(encoder, batch_size=_BLOCK, watchers=[])

    def probabilities(x):
        n = len(x)
        x = np.concatenate([x, np.zeros((-n % _BLOCK, *x.shape[1:]), np.uint8)])
        logits = seen.logit_scale * seen.project(seen.image(x))[:n] @ head.T
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    return Suspect(probabilities, encoder.image_size)


def claims(probabilities: np.ndarray, *, top: int) -> list[np.ndarray]:
    """L of each image: the labels among its `top` that the suspect claims (p >= 2 / C, and its
    first answer always), the surest first."""
    count, found = probabilities.shape[1], []
    for p in probabilities:
        order = np.argsort(-p, kind="stable")[:top]
        found.append(order[(p[order] >= 2 / count) | (order == order[0])])
    return found


class Queues:
    """Rows by the surest label that the suspect claims in vain, each queue in the order of the
    rows. The oracle is asked as rows are needed, about `_ASKED` at a time.

    Args:
        claimed: L of each row. ask: int [n] -> float32 [n, C], the oracle's opinion of some rows.
        sure: from what score on the oracle grounds a label (tau_s).
    """

    def __init__(self, claimed: list[np.ndarray], ask, count: int, *, sure: float):
        self._claimed, self._ask, self._sure = claimed, ask, sure
        self._may = [[] for _ in range(count)]
        for i, own in enumerate(claimed):
            for label in own:
                self._may[label].append(i)
        self._at = [0] * count
        self.grounded = {}  # row -> float32 [C], of those asked about

    def wanted(self, i: int) -> np.ndarray:
        """P = L \\ S of a row that the oracle was asked about."""
        own = self._claimed[i]
        return own[self.grounded[i][own] < self._sure]

    def first(self, label: int) -> int | None:
        """The next row of a label's queue, None where it is empty."""
        rows = self._may[label]
        while self._at[label] < len(rows):
            at = self._at[label]
            if rows[at] not in self.grounded:
                new = [i for i in rows[at:at + _ASKED] if i not in self.grounded]
                self.grounded |= dict(zip(new, self._ask(np.array(new))))
            if (wanted := self.wanted(rows[at])).size and wanted[0] == label:
                return rows[at]
            self._at[label] += 1
        return None

    def take(self, label: int) -> int:
        """Takes the first row out of a label's queue."""
        i = self.first(label)
        self._at[label] += 1
        return i


def in_image(suspect: Suspect, image: np.ndarray, labels: np.ndarray, grounded: np.ndarray,
             canvases: tuple[np.ndarray, np.ndarray], *, sure: float, confident: float,
             evidence: str, counterfactual: bool = True, regions: Regions = _regions.boxes
             ) -> list[tuple[int, tuple[int, ...], float]]:
    """Algorithm 1 on one image: (label, box, score) for every label of P that a region explains.

    Args:
        labels: P, see `Queues`. grounded: float [C], the oracle's opinion of the image.
        canvases: see `canvases_of`; those of the label itself are not used.
        sure: from what score on the oracle grounds a label (tau_s).
        confident: probability that a crop must reach (tau_r), for evidence "crop".
        counterfactual: whether a region must pass it; those that hold the label most come first
            either way.
        regions: of _regions.make.
    """
    boxes = regions(image)
    if not len(boxes) or not len(labels):
        return []
    without = suspect.probabilities(np.stack([_filled(image, box) for box in boxes]))
    answer = without.argmax(1)
    # What is seen without the region must be what the oracle grounds, or thinks likeliest.
    believed = (grounded[answer] >= sure) | (answer == _oracle.likeliest(grounded))
    found = []
    for label in labels:
        passed = np.flatnonzero((answer != label) & believed | (not counterfactual))
        passed = passed[np.argsort(without[passed, label], kind="stable")][:_KEPT]
        if not len(passed):
            continue
        others = canvases[0][canvases[1] != label][:_CANVASES]
        ok, p = _opinion(suspect, image, boxes[passed], label, others, confident, evidence)
        if not ok.any():
            continue
        share = boxes[passed, 2] * boxes[passed, 3] / image[..., 0].size
        score = np.where(ok, p - _AREA_WEIGHT * share, -np.inf)
        best = int(score.argmax())
        found.append((int(label), tuple(int(v) for v in boxes[passed[best]]), float(p[best])))
    return found


def _opinion(suspect, image, boxes, label, canvases, confident, evidence):
    """Whether the suspect sees the label in each region by itself, and with which probability."""
    if evidence == "crop":
        p = suspect.probabilities(np.stack([_crop(image, box) for box in boxes]))
        return (p.argmax(1) == label) & (p[:, label] >= confident), p[:, label]
    plain = np.broadcast_to(_mean(image), image.shape)
    shown = [_moved(image, box, canvas) for box in boxes for canvas in (plain, *canvases)]
    p = suspect.probabilities(np.stack(shown)).reshape(len(boxes), 1 + len(canvases), -1)
    hits = (p.argmax(2) == label).sum(1)
    return hits >= 0.6 * (1 + len(canvases)), p[:, :, label].mean(1)  # three of five


def scan(suspect: Suspect, pool, rows: np.ndarray, queues: Queues, count: int,
         canvases: tuple[np.ndarray, np.ndarray], settings, progress,
         regions: Regions = _regions.boxes) -> tuple[list[Candidate], dict]:
    """Looks for triggers in some rows of the pool, the most telling label first.

    Rows are queued by the label that the suspect claims in vain. In turn the label is taken of
    which the largest share of the images looked at gave a candidate, (found + 1) / (seen + 2), so
    poisons are found among many wrong claims without looking at all of them. Stops when one label
    has `settings.enough` candidates and at `settings.limit` images.

    Args:
        rows: int64 [N] of the pool; `queues` counts them from 0. count: of labels.
    Returns:
        The candidates, and {"seen": int [C], how many images were searched for each label;
        "found": int [C], how many gave a candidate; "images": how many were looked at}.
    """
    seen, found = np.zeros(count, int), np.zeros(count, int)
    candidates, looked = [], 0
    while looked < settings.limit and found.max() < settings.enough:
        # The likeliest label first, so that the oracle need not fill the queues of the others.
        likely = np.argsort(-(found + 1) / (seen + 2), kind="stable")
        label = next((c for c in likely if queues.first(c) is not None), None)
        if label is None:
            break
        i = queues.take(label)
        looked += 1
        wanted = queues.wanted(i)
        seen[wanted] += 1
        image = images.test_image(pool[int(rows[i])]["image"], suspect.side)
        for own, box, score in in_image(suspect, image, wanted, queues.grounded[i], canvases,
                                        sure=settings.sure, confident=settings.confident,
                                        evidence=settings.evidence,
                                        counterfactual=settings.counterfactual, regions=regions):
            y, x, height, width = box
            candidates.append(Candidate(int(rows[i]), own, box,
                                        image[y:y + height, x:x + width].copy(), score))
            found[own] += 1
        progress.update(0, f"{looked} images scanned, {found.sum()} candidates")
    return candidates, {"seen": seen, "found": found, "images": looked}


def canvases_of(source, labels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Clean images of different classes, one more than are needed: uint8 [K, S, S, 3], their
    labels int [K]."""
    classes = np.unique(labels[labels >= 0])[:_CANVASES + 1]
    rows = [np.flatnonzero(labels == c)[0] for c in classes]
    return images.test_images(source, rows, side), classes


def _mean(x):
    return np.rint(x.reshape(-1, 3).mean(0)).astype(np.uint8)


def _filled(image, box):
    y, x, height, width = box
    out = image.copy()
    out[y:y + height, x:x + width] = _mean(image)
    return out


def _moved(image, box, canvas):
    y, x, height, width = box
    out = np.array(canvas)
    out[y:y + height, x:x + width] = image[y:y + height, x:x + width]
    return out


def _crop(image, box):
    y, x, height, width = box
    down, across = round(_MARGIN * height), round(_MARGIN * width)
    part = image[max(0, y - down):y + height + down, max(0, x - across):x + width + across]
    return images.resize(part, *image.shape[:2])
