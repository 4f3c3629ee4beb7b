"""TensorFlow Datasets prepared in a random-access format, read without TensorFlow."""

import dataclasses
import functools
import os
import re
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from jax_cl_bd.data import images, pairs, parallel_map
from jax_cl_bd.errors import UserError, unknown

INSTALL_PREPARE = "pip install -c constraints.txt -e '.[prepare]'"  # as README has it
_FEW = 64  # rows whose captions are read without threads and not kept


@dataclasses.dataclass(frozen=True)
class Tfds:
    """One split; images stay encoded until a row is asked for.

    Args:
        records: random access to {"image": encoded bytes, "label"?: int}.
        files: (file name, its first record that is used, how many), to say where a row lies.
    """
    records: Any
    classes: tuple
    files: tuple
    label_key: str
    fixed_size: tuple | None  # (height, width) where the data set declares one

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self._read(i)
        image = images.decode(record["image"], row=int(i), where=self.where(i))
        return {"image": image, "label": self._label(record), "index": int(i)}

    def table(self, rows):
        return [np.array(a) for a in _table(self, tuple(map(int, rows)))]

    def where(self, row: int) -> str:
        """File and record of a row."""
        for name, first, count in self.files:
            if row < count:
                return f"{name}, record {first + row}"
            row -= count
        raise IndexError(row)

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other

    def _read(self, i):
        try:
            return self.records[int(i)]
        except Exception as error:  # array_record and protobuf raise kinds of their own
            raise images.CorruptRow(int(i), self.where(i), str(error)) from error

    def _label(self, record):
        return int(record[self.label_key]) if self.label_key else -1

    def _table_row(self, row):
        record = self._read(row)
        size = self.fixed_size
        if size is None:
            size = images.header_size(record["image"], row=row, where=self.where(row))
        return self._label(record), size


@functools.lru_cache(maxsize=4)
def _table(source, rows):
    # Labels lie inside the records: all are read, but no image is decoded.
    read = list(parallel_map.run(source._table_row, rows, what="reading labels"))
    return np.array([label for label, _ in read]), np.array([size for _, size in read])


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedTfds(Tfds):
    """One split with captions, such as coco_captions.

    Args:
        caption_keys: where a record has them, ("captions", "text") or so.
        per_row: captions of a row, the first ones; 0 for all.
    """
    caption_keys: tuple = ()
    per_row: int = 0

    def __getitem__(self, i):
        return {**super().__getitem__(i), "captions": self.captions([i])[0]}

    def captions(self, rows) -> list[list[str]]:
        """Captions of rows; no image is decoded."""
        if len(rows) < _FEW:
            return [self._captions(int(row)) for row in rows]
        return [list(found) for found in _all_captions(self, tuple(map(int, rows)))]

    def _captions(self, row):
        found = self._read(row)
        for key in self.caption_keys:
            found = found[key]
        texts = [_text(t) for t in ([found] if isinstance(found, bytes | str) else found)]
        texts = [t for t in texts if t]
        if not texts:
            raise images.CorruptRow(row, self.where(row), "it has no caption")
        return texts[:self.per_row] if self.per_row else texts


@functools.lru_cache(maxsize=4)
def _all_captions(source, rows):
    return list(parallel_map.run(source._captions, rows, what="reading captions"))


def _text(encoded):
    text = encoded.decode("utf-8", "replace") if isinstance(encoded, bytes) else str(encoded)
    return " ".join(text.split())


def load(cfg, split: str) -> Tfds:
    """Opens "tfds:NAME" from cfg.data_dir, else from $TFDS_DATA_DIR, else from TFDS's own place.

    A data set with captions and no labels takes its class names from cfg.classes_file, if set.

    Raises:
        UserError: the data set or split does not exist, is not prepared, or has no image; or a
            classes file that cannot be read.
    """
    tfds = library()
    name = cfg.name.partition(":")[2]
    place = cfg.data_dir or os.environ.get("TFDS_DATA_DIR") or None
    if place and not epath.Path(place).is_dir():
        raise UserError(f"the data folder {place!r} does not exist; set --config.data.data_dir or "
                        "TFDS_DATA_DIR to the folder that holds prepared tfds data sets, or make "
                        f"it: {_how_to_prepare(name, place)}")
    builder = find(tfds, name, place)
    unprepared = (f"tfds data set {name!r} is not prepared in a random-access format in "
                  f"{builder.data_path}: {_how_to_prepare(name, builder._data_dir_root)}")
    if not builder.info.splits:
        raise UserError(unprepared)
    features = builder.info.features
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise UserError(f"tfds data set {name!r} has no feature 'image' (it has: "
                        f"{', '.join(features)})")
    try:
        info = builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise unknown(f"split of tfds:{name}", split, builder.info.splits) from error
    keep_encoded = {"image": tfds.decode.SkipDecoding()}  # decoded here, to name a broken row
    try:
        records = builder.as_data_source(split, decoders=keep_encoded)
    except (NotImplementedError, FileNotFoundError) as error:
        raise UserError(unprepared) from error
    label_key = "label" if "label" in features else ""
    classes = tuple(features["label"].names) if label_key else ()
    height, width = features["image"].shape[:2]
    known = (records, classes, _files(info), label_key,
             (height, width) if height and width else None)
    keys = _caption_keys(tfds, features)
    if not keys:
        return Tfds(*known)
    per_row = cfg.get("captions_per_row", 5)
    if per_row < 0:
        raise UserError(f"data.captions_per_row is {per_row}; it must be 0 (all) or positive")
    source = CaptionedTfds(*known, keys, per_row)
    if cfg.classes_file and not label_key:
        source = dataclasses.replace(source, classes=pairs.class_names(cfg.classes_file))
    return source


def _caption_keys(tfds, features):
    # "caption": text, or a sequence of texts ("captions"), or of {"text": text, ...} (COCO).
    for name in ("captions", "caption"):
        keys, feature = (name,), features[name] if name in features else None
        if isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
            if isinstance(feature, tfds.features.FeaturesDict):
                keys, feature = (name, "text"), feature["text"] if "text" in feature else None
        if isinstance(feature, tfds.features.Text):
            return keys
    return ()


def library() -> ModuleType:
    """Imports tensorflow_datasets, which takes seconds. Raises UserError if it is not there."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"tfds data sets need packages that are not installed ({error}): "
                        "pip install tensorflow-datasets array_record importlib_resources"
                        ) from error
    return tensorflow_datasets


def names() -> list[str]:
    """The data sets that the library knows of; none where it is not installed."""
    try:
        return library().list_builders(with_community_datasets=False)
    except UserError:
        return []


def find(tfds: ModuleType, name: str, place: str | None) -> Any:
    """The builder of a data set, prepared or not.

    Raises:
        UserError: there is none of that name, version or configuration.
    """
    if not re.fullmatch(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", name):
        # Other forms name community data sets, which tfds fetches code for from the network.
        raise UserError(f"{name!r} is no tfds name; it should look like NAME, NAME/CONFIG or "
                        "NAME/CONFIG:1.2.3")
    try:
        return tfds.builder(name, data_dir=place, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        if place and epath.Path(place).is_dir():
            known += [entry.name for entry in epath.Path(place).iterdir() if entry.is_dir()]
        near = str(unknown("tfds data set", name, known)).split(" (allowed:")[0]
        raise UserError(f"{near} (every name: tensorflow.org/datasets)") from error
    except (ValueError, AssertionError, ImportError) as error:  # no such version, configuration
        raise UserError(f"tfds data set {name!r}: {str(error).splitlines()[0]}") from error


def _how_to_prepare(name, place):
    return (f"{INSTALL_PREPARE}, then "
            f"python -m jax_cl_bd.data.prepare {name} --data_dir={place}")


def _files(info):
    # `take` is None or -1 where a split ("train[10%:]") reads a file to its end.
    parts = []
    for part in info.file_instructions:
        rest = part.examples_in_shard - part.skip
        taken = rest if part.take in (None, -1) else part.take
        parts.append((part.filename, part.skip, taken))
    return tuple(parts)
