"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images that come with the package.

Enlarged once to the configured image size (PIL, bicubic) and copied to three channels, so that the
rest of the program sees ordinary colour images. 1,470 rows train, 327 test, the split stratified
and fixed.
"""

import dataclasses
import functools

import numpy as np
from sklearn.datasets import load_digits

from jax_cl_bd.data import images
from jax_cl_bd.errors import unknown

N_TEST = 327
_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Digits:
    """One split, wholly in memory: pixels uint8 [N, S, S, 3], labels int64 [N]."""
    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple = tuple("0123456789")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.pixels[i], "label": int(self.labels[i]), "index": int(i)}

    def table(self, rows):
        return self.labels[rows], np.tile(self.pixels.shape[1:3], (len(rows), 1))


def load(cfg, split: str) -> Digits:
    """Loads "train" or "test" at cfg.image_size."""
    rows = split_rows()
    if split not in rows:
        raise unknown("split of digits", split, rows)
    pixels, labels = _all(cfg.image_size)
    return Digits(pixels[rows[split]], labels[rows[split]])


@functools.cache
def split_rows() -> dict[str, np.ndarray]:
    """Row numbers of scikit-learn's array in each split.

    Rows are shuffled, sorted by class, and every 5.5th goes to the test: each class is cut in the
    same proportion to within one row.
    """
    labels = load_digits().target
    shuffled = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    picks = ((np.arange(N_TEST) + 0.5) * len(labels) / N_TEST).astype(int)
    test = np.sort(by_class[picks])
    return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": test}


@functools.cache
def _all(side):
    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the originals hold 0..16
    pixels = np.stack([images.resize(np.repeat(g[..., None], 3, -1), side, side) for g in grey])
    return pixels, digits.target.astype(np.int64)
