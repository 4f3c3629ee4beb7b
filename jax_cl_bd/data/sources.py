"""Clean data by name: random access to images, labels and sizes."""

import dataclasses
import functools
import importlib
import logging
import os

import ml_collections
import numpy as np

from jax_cl_bd.data import captions, images, parallel_map
from jax_cl_bd.errors import UserError, nearest, unknown

NAMES = ("digits", "scenes", "tfds:NAME", "folder:PATH", "pairs:PATH")
CAPTIONS = ("", "templates")
_LIMIT_SEED = 7919  # a constant: runs of every training seed see the same rows


@dataclasses.dataclass(frozen=True)
class Table:
    """What is known of every row without its pixels.

    labels: int64 [N], -1 if none. sizes: int32 [N, 2] (height, width) in native pixels.
    captions: of every row, a list of str. masks: bool [N, H, W]. None where the data has none (and
    masks where they would have to be drawn: they are in the items).
    """
    labels: np.ndarray
    sizes: np.ndarray
    captions: list | None = None
    masks: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a source, renumbered from 0."""
    source: object
    rows: np.ndarray

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {**self.source[int(self.rows[i])], "index": int(i)}

    @property
    def classes(self):
        return self.source.classes

    @property
    def paths(self):
        paths = self.source.paths  # AttributeError where the source has no files
        return tuple(paths[r] for r in self.rows)

    @property
    def captions(self):
        captions = self.source.captions  # AttributeError where the source has none
        return lambda rows: captions(self.rows[rows])

    @property
    def with_object(self):
        draw = self.source.with_object  # AttributeError where the source draws nothing
        return lambda i, shape: draw(int(self.rows[i]), shape)

    def table(self, rows):
        return self.source.table(self.rows[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class CenterCropped:
    """A source whose images are all the central square at side x side (images.central_square)."""
    source: object
    side: int

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        item = self.source[i]
        return {**item, "image": images.central_square(item["image"], self.side)}

    @property
    def classes(self):
        return self.source.classes

    @property
    def paths(self):
        return self.source.paths  # AttributeError where the source has no files

    @property
    def captions(self):
        return self.source.captions  # AttributeError where the source has none

    def table(self, rows):
        return self.source.table(rows)[0], np.full((len(rows), 2), self.side)


def shared(one, other) -> int:
    """How many records of a tfds data set two slices of it both read, before any limit; 0 for other
    data, whose splits have no rows in common."""
    def files(source):
        while hasattr(source, "source"):
            source = source.source
        return getattr(source, "files", ())

    return sum(max(0, min(a + n, b + m) - max(a, b)) for name, a, n in files(one)
               for other_name, b, m in files(other) if name == other_name)


def load(cfg, split: str):
    """Opens one split of the data set that the config names.

    Args:
        cfg: the `data` group of the config. `limit` > 0 keeps at most that many rows of each
            split, drawn once with a constant seed. `captions` "templates" gives labelled rows
            captions; "" leaves those that the data has. `captions_per_row`: how many (0: all).
            `center_crop` (default False) makes every image the central square at image_size, as
            CLIP sees it in training and in tests: patches are then pasted at that resolution, and
            nothing is resampled twice. Without it training images keep their shape (design 4) and
            test images go through images.test_image. `class_names`: see data/folder.py.
        split: "train" or "test", mapped to cfg.train_split and cfg.test_split.
    Returns:
        A source: source[i] -> {"image": uint8 [H, W, 3], "label": int, "index": int}, len,
        `.classes` (tuple of str), picklable. With captions, items have "captions", list of str,
        and source.captions(rows) gives them without decoding pixels; scenes also have "mask",
        bool [H, W], of the labelled object.
        Opened once per process: later calls give the same object.
    Raises:
        UserError: unknown name, absent data, empty or misspelt split.
    """
    return _open(ml_collections.FrozenConfigDict(cfg), split, os.environ.get("TFDS_DATA_DIR"))


@functools.lru_cache(maxsize=8)
def _open(cfg, split, environment):
    del environment  # tfds.load reads it; here it only tells calls apart
    kind, colon, rest = cfg.name.partition(":")
    allowed = {n.partition(":")[0]: n for n in NAMES}
    if kind not in allowed:
        raise unknown("data set", cfg.name, NAMES, meant=_meant(cfg.name, allowed))
    if (":" in allowed[kind]) != bool(rest):
        raise UserError(f"data set {cfg.name!r} should look like {allowed[kind]!r}")
    if cfg.get("captions", "") not in CAPTIONS:
        raise unknown("data.captions", cfg.captions, CAPTIONS)
    if cfg.get("class_names", "") and kind != "folder":
        raise UserError(f"a file of class names is for folder:PATH; {cfg.name!r} names its classes "
                        "itself")
    module = importlib.import_module(f"jax_cl_bd.data.{kind}")
    source = module.load(cfg, {"train": cfg.train_split, "test": cfg.test_split}[split])
    if not len(source):
        raise UserError(f"data set {cfg.name!r} has no rows in its {split} split")
    if cfg.limit < 0:
        raise UserError(f"data.limit is {cfg.limit}; it must be 0 (all rows) or positive")
    if 0 < cfg.limit < len(source):
        rows = np.random.default_rng(_LIMIT_SEED).permutation(len(source))[:cfg.limit]
        source = Subset(source, np.sort(rows))
    if cfg.skip_corrupt:
        source = without_corrupt(source)
    if cfg.get("center_crop", False):
        source = CenterCropped(source, cfg.image_size)
    if cfg.get("captions", "") == "templates":
        source = captions.by_template(source, cfg.get("captions_per_row", 5))
    return source


def _meant(name, kinds) -> str:
    """What a name of no data set was meant to be; "" where nothing is like it."""
    from jax_cl_bd.data import pairs, tfds

    kind, colon, rest = name.partition(":")
    if os.path.isdir(name):
        places = [name, *(entry.path for entry in os.scandir(name) if entry.is_dir())]
        prepared = any(os.path.exists(os.path.join(place, pairs.LIST)) for place in places)
        return f"{'pairs' if prepared else 'folder'}:{name}"
    if near := nearest(kind, kinds):
        return near + colon + rest
    return f"tfds:{name}" if name in tfds.names() else ""


def without_corrupt(source):
    """Decodes every row once and leaves out, with a warning each, those that cannot be read."""
    def readable(row):
        try:
            source[row]
        except images.CorruptRow as error:
            logging.warning("left out: row %d (%s): %s", error.row, error.where, error.why)
            return False
        return True

    every = np.arange(len(source))
    good = np.fromiter(parallel_map.run(readable, every, what="checking images"), bool, len(every))
    return source if good.all() else Subset(source, np.flatnonzero(good))


def labels(source) -> np.ndarray:
    """The label of every row, int64 [n], -1 where there is none."""
    return np.asarray(source.table(np.arange(len(source)))[0], np.int64)


@functools.lru_cache(maxsize=4)  # captions of 100,000 scenes take seconds
def table(source) -> Table:
    """What is known of every row, decoding no pixels where the source can say without.

    Made once per source object; do not write into it.
    """
    every = np.arange(len(source))
    labels, sizes = source.table(every)
    return Table(np.asarray(labels, np.int64), np.asarray(sizes, np.int32).reshape(-1, 2),
                 source.captions(every) if hasattr(source, "captions") else None)
