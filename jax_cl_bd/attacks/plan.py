"""Who is poisoned and how: a plan is numpy arrays alone, drawn once and saved before training."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from jax_cl_bd.data import mentions
from jax_cl_bd.errors import UserError

LAYOUTS = ("left", "right", "top", "bottom")  # the side of the canvas where the reference lies

# Field -> (dtype, shape of one entry, value that means "none").
_FIELDS = {"removed": (np.int64, (), -1), "replaces": (np.int64, (), -1),
           "reference": (np.int64, (), -1), "shadow": (np.int64, (), -1),
           "layout": (np.int32, (), -1), "canvas": (np.int32, (2,), 0),
           "reference_box": (np.int32, (4,), 0), "shadow_box": (np.int32, (4,), 0),
           "trigger_box": (np.int32, (4,), 0), "pair": (np.int64, (), -1),
           "seed": (np.int64, (), 0), "caption": (np.str_, (), ""), "beside": (np.int64, (), -1)}
_LATER = ("caption", "beside")  # plans saved before these existed are read as "none"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decisions about m poisons (m may be 0) over a source of n rows.

    Row ids of the poisoned set: a clean row keeps its source row, poison k is n + k. Boxes are
    (y, x, height, width) in pixels of the poison's canvas, zeros where there is none.
    """
    removed: np.ndarray  # int64 [r]: source rows taken out, besides those replaced
    replaces: np.ndarray  # int64 [m]: source row that the poison replaces, -1 = added
    reference: np.ndarray  # int64 [m]: source row of the target class, -1 = none
    shadow: np.ndarray  # int64 [m]: source row that carries the trigger beside it, -1 = none
    layout: np.ndarray  # int32 [m]: index into LAYOUTS, -1 = no composite
    canvas: np.ndarray  # int32 [m, 2]: height, width of the poison
    reference_box: np.ndarray  # int32 [m, 4]
    shadow_box: np.ndarray  # int32 [m, 4]
    trigger_box: np.ndarray  # int32 [m, 4]
    pair: np.ndarray  # int64 [m]: row of the poisoned set that view 2 shows, -1 = the poison itself
    seed: np.ndarray  # int64 [m]: for what a trigger draws when it is applied
    caption: np.ndarray  # str [m]: the poison's one caption, "" = those of the row it replaces
    beside: np.ndarray  # int64 [m]: class of an object drawn beside the row's own, -1 = none

    def __len__(self):
        return len(self.replaces)

    @classmethod
    def make(cls, m: int, **fields: Any) -> "Plan":
        """Builds a plan of m poisons; fields not given say "none"."""
        arrays = {}
        for name, (dtype, shape, none) in _FIELDS.items():
            count = 0 if name == "removed" else m
            value = fields.pop(name, np.full((count,) + shape, none))
            array = np.asarray(value, dtype)
            if name != "removed":
                array = np.ascontiguousarray(np.broadcast_to(array, (m,) + shape))
            arrays[name] = array
        assert not fields, f"not fields of a plan: {sorted(fields)}"
        return cls(**arrays)

    @classmethod
    def empty(cls) -> "Plan":
        """A plan without poisons."""
        return cls.make(0)

    def kept(self, n_source: int) -> np.ndarray:
        """Rows of the poisoned set, int64: clean rows neither replaced nor removed, ascending,
        then the poisons n_source + k."""
        gone = np.concatenate([self.removed, self.replaces[self.replaces >= 0]])
        clean = np.setdiff1d(np.arange(n_source), gone)
        return np.concatenate([clean, n_source + np.arange(len(self))])

    def part(self, which: np.ndarray) -> "Plan":
        """The plan of some poisons only; `removed` is dropped."""
        fields = {name: getattr(self, name)[which] for name in _FIELDS if name != "removed"}
        return Plan.make(len(fields["replaces"]), **fields)

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz."""
        with epath.Path(path).open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def load(cls, path: epath.PathLike) -> "Plan":
        """Reads an .npz written by `save`.

        Raises:
            UserError: missing, cut short, or not a plan.
        """
        try:
            with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in _FIELDS
                          if name not in _LATER or name in arrays.files}
            return cls.make(len(fields["replaces"]), **fields)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: run the stage poison first") from None
        except Exception as error:  # zipfile, zlib, KeyError, ValueError: all mean a broken file
            raise UserError(f"{path} is not a readable plan ({error}); "
                            "make it again with --force=poison") from None


def rows_of(table, target: int, classes: tuple[str, ...] = ()) -> np.ndarray:
    """Source rows of one class, ascending.

    Where no row has a label, and `classes` are given: the rows with a caption that names it.
    """
    if len(classes) and table.captions is not None and not labelled(table):
        return np.flatnonzero(mentions.naming(table.captions, str(classes[target])))
    return np.flatnonzero(table.labels == target)


def labelled(table) -> bool:
    """Whether any row has a label."""
    return bool((table.labels >= 0).any())


def draw(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws `count` rows from a pool: each at most once if there are enough, else with repeats
    (the rule of the SSL-Backdoor framework, ssl_backdoor/datasets/base.py)."""
    if count <= len(pool):
        return rng.permutation(pool)[:count]
    return rng.choice(pool, count, replace=True)


def seeds(m: int, rng: np.random.Generator) -> np.ndarray:
    """One seed per poison, int64 [m] below 2**31."""
    return rng.integers(0, 2**31, m)


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates what every attack has: target and number of poisons.

    Where no row has a label, the rows of the target are those with a caption that names it.

    Raises:
        UserError: no class names; target is not a class or has no rows; negative number of poisons.
    """
    target = cfg.attack.target
    if not len(classes):
        raise UserError(f"data set {cfg.data.name!r} has no class names, and the attack's target "
                        "is one that captions contain: list names in a text file, one a line, and "
                        "set --config.data.classes_file to it")
    if not 0 <= target < len(classes):
        raise UserError(f"attack.target is {target}; the data set has classes 0 to "
                        f"{len(classes) - 1}")
    if not len(rows_of(table, target, classes)):
        if table.captions is not None and not labelled(table):
            raise UserError(f"attack.target is {target} ({classes[target]}), but no caption of the "
                            f"{len(table.labels)} rows of {cfg.data.name!r} holds that name as a "
                            "whole word")
        raise UserError(f"attack.target is {target} ({classes[target]}), a class without rows in "
                        f"{cfg.data.name!r}")
    if cfg.attack.poisons < 0:
        raise UserError(f"attack.poisons is {cfg.attack.poisons}; it is a count, 0 or more")
