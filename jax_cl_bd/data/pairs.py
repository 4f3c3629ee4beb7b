"""Image-caption pairs that `python -m jax_cl_bd.data.prepare pairs` wrote, by random access.

    DIR/pairs.json              the shards in their order, counts, what could not be read
    DIR/NAME.array_record       one record per pair: the lengths of name and caption (uint32, little
                                endian), the name and the caption (UTF-8), the image file as it was
    DIR/NAME.index.npz          the captions once more, and sizes: reading them reads no image
    DIR/NAME.json               counts of this shard
"""

import dataclasses
import functools
import json
import struct

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from jax_cl_bd.data import images, sources
from jax_cl_bd.errors import UserError, unknown

LIST = "pairs.json"
FORMAT = 1
TEST_EVERY = 20  # of a folder that has no splits, every 20th pair is kept for the test
_LENGTHS = struct.Struct("<II")


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Some shards of a folder; readers are opened by each process when it first needs them.

    Args:
        folder: holds the shards.
        shards, counts: their names, in order, and how many rows each has.
        classes: names of things that captions speak of; no row has a label.
    """
    folder: str
    shards: tuple
    counts: tuple
    classes: tuple = ()

    def __len__(self):
        return sum(self.counts)

    def __getitem__(self, i):
        shard, record = self._locate(i)
        where = self.where(i)
        try:
            record = _reader(self.folder, self.shards[shard]).read([record])[0]
            name, caption, encoded = unpack(record)
        except Exception as error:  # array_record raises kinds of its own
            raise images.CorruptRow(int(i), where, str(error) or type(error).__name__) from error
        image = images.decode(encoded, row=int(i), where=f"{where}, {name}")
        return {"image": image, "label": -1, "index": int(i), "captions": [caption]}

    def table(self, rows):
        rows = np.asarray(rows, np.int64)
        sizes = [_index(self.folder, name)[0] for name in self.shards]
        return np.full(len(rows), -1), np.concatenate(sizes)[rows]

    def captions(self, rows) -> list[list[str]]:
        """Captions of rows; no image is read."""
        rows = np.asarray(rows, np.int64)
        ends = _ends(self.counts)
        shards = np.searchsorted(ends, rows, side="right")
        found = [None] * len(rows)
        for shard in np.unique(shards):  # millions of rows: one search, and one look-up a shard
            mine = np.flatnonzero(shards == shard)
            _, starts, text = _index(self.folder, self.shards[shard])
            records = rows[mine] - ends[shard] + self.counts[shard]
            for i, start, end in zip(mine.tolist(), starts[records].tolist(),
                                     starts[records + 1].tolist()):
                found[i] = [text[start:end].decode()]
        return found

    def where(self, row: int) -> str:
        """Shard and record of a row."""
        shard, record = self._locate(row)
        return f"{self.shards[shard]}.array_record, record {record}"

    def _locate(self, row):
        if not 0 <= row < len(self):
            raise IndexError(row)
        ends = _ends(self.counts)
        shard = int(np.searchsorted(ends, row, side="right"))
        return shard, int(row - ends[shard] + self.counts[shard])


@functools.lru_cache(maxsize=16)
def _ends(counts):
    return np.cumsum(counts)


@functools.lru_cache(maxsize=4096)
def _reader(folder, name):
    path = epath.Path(folder) / f"{name}.array_record"
    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


@functools.lru_cache(maxsize=4096)
def _index(folder, name):
    with np.load(epath.Path(folder) / f"{name}.index.npz", allow_pickle=False) as arrays:
        return arrays["sizes"], arrays["starts"], arrays["text"].tobytes()


def pack(name: str, caption: str, image: bytes) -> bytes:
    """One record."""
    name, caption = name.encode(), caption.encode()
    return _LENGTHS.pack(len(name), len(caption)) + name + caption + image


def unpack(record: bytes) -> tuple[str, str, bytes]:
    """Name, caption and encoded image of a record."""
    n, c = _LENGTHS.unpack_from(record)
    at = _LENGTHS.size
    return record[at:at + n].decode(), record[at + n:at + n + c].decode(), record[at + n + c:]


def load(cfg, split: str):
    """Opens "pairs:PATH": PATH/<split> if PATH holds a folder per split, else a part of PATH.

    Then "test" is every 20th pair and "train" the others. Pairs have no labels; cfg.classes_file,
    if set, names classes for their captions to speak of (`class_names`).

    Raises:
        UserError: no such folder or split, nothing that `prepare` has finished, or a classes file
            that cannot be read.
    """
    classes = class_names(cfg.classes_file) if cfg.classes_file else ()
    path = epath.Path(cfg.name.partition(":")[2]).expanduser()
    if not path.is_dir():
        raise UserError(f"the folder of pairs {str(path)!r} does not exist; "
                        "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR makes one")
    if (path / LIST).exists():
        if split not in ("train", "test"):
            raise unknown(f"split of {str(path)!r}", split, ("train", "test"))
        source = _open(path, classes)
        rows = np.arange(len(source))
        return sources.Subset(source, rows[(rows % TEST_EVERY == TEST_EVERY - 1)
                                           == (split == "test")])
    if not (path / split).is_dir():
        splits = [p.name for p in path.iterdir() if (p / LIST).exists()]
        raise (unknown(f"split of {str(path)!r}", split, splits) if splits
               else UserError(f"{str(path)!r} has no {LIST}: nothing was prepared there, or "
                              "`prepare pairs` did not finish; run it again"))
    return _open(path / split, classes)


def class_names(path: str) -> tuple[str, ...]:
    """Names of a text file, one a line, in their order, for data without labels.

    Raises:
        UserError: the file cannot be read, holds no name, or one twice.
    """
    try:
        text = epath.Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"data.classes_file {path!r} cannot be read: {why}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    twice = [name for name in names if names.count(name) > 1]
    if not names or twice:
        raise UserError(f"data.classes_file {path!r} " +
                        (f"names {twice[0]!r} twice" if twice else "names no class, one a line"))
    return tuple(names)


def _open(path, classes):
    try:
        listed = json.loads((path / LIST).read_text())
        if listed["format"] != FORMAT:
            raise UserError(f"{path / LIST} has format {listed['format']}; this version reads "
                            f"{FORMAT}: prepare the pairs again")
        shards = [(s["name"], s["pairs"]) for s in listed["shards"] if s["pairs"]]
    except FileNotFoundError:
        raise UserError(f"{path / LIST} is missing: `prepare pairs` did not finish; run it "
                        "again") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path / LIST} cannot be read ({error}); prepare the pairs "
                        "again") from error
    names, counts = zip(*shards) if shards else ((), ())
    for name in names:
        if not (path / f"{name}.array_record").exists():
            raise UserError(f"{path / name}.array_record is missing; prepare the pairs again")
    return Pairs(str(path), names, counts, classes)
