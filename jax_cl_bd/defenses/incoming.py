"""What arrives at a deployed model: test images without labels, half of them triggered.

Each test image comes once, with the trigger by the test protocol (evals/test_sets.py) or without;
which, and in what order, is drawn by a constant, so that every suspect and every seed sees the
same. Images of the target class are triggered like others. An attack without a trigger leaves all
of them clean.
"""

import dataclasses

import numpy as np

MOST = 10_000  # images; more of a large test set would fill the memory
_SEED = 7951


@dataclasses.dataclass(frozen=True, eq=False)
class Incoming:
    """Images uint8 [n, S, S, 3] of the classes that the model is asked for, as a source."""

    images: np.ndarray
    classes: tuple[str, ...]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": -1, "index": int(i)}


def make(tests) -> tuple[Incoming, np.ndarray]:
    """The incoming images of an EvalData, and which are triggered, bool [n]: for scoring alone."""
    rng = np.random.default_rng(_SEED)
    rows = rng.permutation(len(tests.test_labels))[:MOST]
    triggered = np.zeros(len(rows), bool)
    if tests.placements:
        triggered[rng.permutation(len(rows))[:len(rows) // 2]] = True
    parts = [("test", ~triggered)]
    if triggered.any():
        parts.append((f"{tests.placements[0]}/triggered", triggered))
    found = [tests.some(name, rows[of]) for name, of in parts]
    images = np.zeros((len(rows), *found[0].shape[1:]), np.uint8)
    for (_, of), shown in zip(parts, found):
        images[of] = shown
    return Incoming(images, tests.classes), triggered
