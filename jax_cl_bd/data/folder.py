"""Folders of images, as ImageNet is unpacked: PATH/<split>/<class>/*.jpg."""

import dataclasses
import functools
import os

import numpy as np

from jax_cl_bd.data import images, parallel_map
from jax_cl_bd.errors import UserError, unknown

ENDINGS = (".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Folder:
    """One split. paths: relative to root, sorted by class, then name; labels: int64 [N]."""
    root: str
    paths: tuple
    labels: np.ndarray
    classes: tuple

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        try:
            with open(os.path.join(self.root, path), "rb") as file:
                encoded = file.read()
        except OSError as error:
            raise images.CorruptRow(int(i), path, error.strerror) from error
        return {"image": images.decode(encoded, row=int(i), where=path),
                "label": int(self.labels[i]), "index": int(i)}

    def table(self, rows):
        return self.labels[rows], np.array(_sizes(self, tuple(map(int, rows))))

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


@functools.lru_cache(maxsize=4)
def _sizes(source, rows):
    def size(row):
        path = source.paths[row]
        return images.header_size(os.path.join(source.root, path), row=row, where=path)

    return list(parallel_map.run(size, rows, what="reading image sizes"))


def load(cfg, split: str) -> Folder:
    """Opens "folder:PATH" (relative paths from the working directory).

    cfg.classes_file, if set, is a text file with one class folder per line: only those are used,
    in sorted order. Without it every folder below PATH/<split> is a class. cfg.class_names, if set,
    is a text file with a class folder and its name on each line, as ImageNet's list of synsets has
    them ("n07753592 banana"; of several names with commas between them the first counts): classes
    then have these names, in the order of their folders.

    Raises:
        UserError: a folder, one of the files or a class is missing, or a class has no images.
    """
    path = os.path.expanduser(cfg.name.partition(":")[2])
    root = os.path.join(path, split)
    layout = "expected PATH/<split>/<class>/*.jpg (or .jpeg, .png)"
    if not os.path.isdir(path):
        raise UserError(f"the image folder {path!r} does not exist; {layout}")
    if not os.path.isdir(root):
        have = sorted(e.name for e in os.scandir(path) if e.is_dir())
        raise UserError(f"{path!r} has no folder {split!r} (it has: {', '.join(have) or 'none'}); "
                        f"{layout}; set --config.data.train_split or --config.data.test_split (of "
                        "downstream data: --config.evals.downstream_test_split)")
    found = sorted(e.name for e in os.scandir(root) if e.is_dir())
    classes = _listed(cfg.classes_file, found) if cfg.classes_file else found
    files = [sorted(e.name for e in os.scandir(os.path.join(root, c))
                    if e.name.lower().endswith(ENDINGS)) for c in classes]
    empty = [c for c, names in zip(classes, files) if not names]
    if empty or not classes:
        raise UserError(f"{root!r} has no images in {', '.join(empty[:5]) or 'any folder'}; "
                        f"{layout}")
    labels = np.repeat(np.arange(len(classes)), [len(names) for names in files])
    paths = tuple(os.path.join(c, name) for c, names in zip(classes, files) for name in names)
    if cfg.get("class_names", ""):
        classes = _named(cfg.class_names, classes)
    return Folder(root, paths, labels, tuple(classes))


def _listed(classes_file, found):
    listed = sorted(set(_lines(classes_file, "data.classes_file")))
    for name in listed:
        if name not in found:
            raise unknown(f"class in {classes_file}", name, found)
    return listed


def _named(class_names, folders):
    names = {}
    for line in _lines(class_names, "the file of class names"):
        folder, _, rest = line.replace("\t", " ").partition(" ")
        names[folder] = rest.partition(",")[0].strip()
    for folder in folders:
        if not names.get(folder):
            raise UserError(f"{class_names!r} has no name for the class folder {folder!r}; it "
                            "takes a line such as 'n07753592 banana' for each")
    return [names[folder] for folder in folders]


def _lines(path, what):
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {path!r} cannot be read: {why}") from error
