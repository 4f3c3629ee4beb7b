"""One folder holds one run: its stages, their settings, and what says that they are complete."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import ml_collections
from etils import epath

from jax_cl_bd.errors import UserError

# Which config groups each stage depends on, its predecessors' included (design 1).
POISON_GROUPS = ("seed", "data", "attack", "augment", "text")
PRETRAIN_GROUPS = POISON_GROUPS + ("model", "objective", "optim", "train", "init_from")
EVALUATE_GROUPS = PRETRAIN_GROUPS + ("evals", "downstream", "control_from")
DEFEND_GROUPS = EVALUATE_GROUPS + ("defense",)
# Settings that change neither weights nor figures, and so never make two runs different.
NEVER_HASHED = ("data.data_dir", "data.workers", "data.feed", "train.log_every", "train.save_every",
                "train.eval_every", "train.steps_per_dispatch", "evals.batch_size")

# Settings younger than some run folders: left out at their default, so that those still fit.
LATER = {"init_from": ""}


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.partial"
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: epath.Path) -> Any:
    """Reads a JSON file of a run folder.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is {path.parent} a run folder?") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def settings_of(cfg: ml_collections.ConfigDict, groups: tuple[str, ...]) -> dict[str, Any]:
    """Flattens the groups of a config into {"data.name": value}, without what is never hashed."""
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key in sorted(value):
                walk(f"{prefix}.{key}", value[key])
        elif prefix not in NEVER_HASHED and (prefix, value) not in LATER.items():
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    tree = cfg.to_dict()
    for group in groups:
        walk(group, tree[group] if group in tree else LATER[group])
    return flat


def hash_of(settings: dict[str, Any]) -> str:
    """Gives 12 hex digits that stand for these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _difference(old: dict, new: dict) -> str:
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return "; ".join(f"{k}: {old.get(k, 'absent')!r} there, {new.get(k, 'absent')!r} now"
                     for k in keys)


def check_settings(stage: epath.Path, settings: dict[str, Any]) -> None:
    """Refuses a stage folder that was begun with other settings.

    Raises:
        UserError: naming every setting that differs.
    """
    path = stage / "settings.json"
    if path.exists() and (old := read_json(path)) != json.loads(json.dumps(settings)):
        raise UserError(f"{stage} was made with other settings: {_difference(old, settings)} "
                        "(use another --workdir, or --force=STAGE to redo it)")


def is_done(stage: epath.Path) -> bool:
    """Says whether a stage is complete: its done.json is there."""
    return (stage / "done.json").exists()


def begin(stage: epath.Path, settings: dict[str, Any]) -> None:
    """Records the settings that a stage is begun with."""
    if not (stage / "settings.json").exists():
        write_json(stage / "settings.json", settings)


def finish(stage: epath.Path, settings: dict[str, Any]) -> None:
    """Marks a stage complete."""
    write_json(stage / "done.json", {"hash": hash_of(settings)})


def control_of(cfg: ml_collections.ConfigDict, victim: epath.Path) -> epath.Path | None:
    """The folder of the clean encoder that a victim is measured against; None if there is none.

    It is the twin in `victim`, or what cfg.control_from names: another run with a control of its
    own, or a run without poisons (so that many victims share one control, or have one of another
    seed).

    Raises:
        UserError: control_from holds no finished clean encoder.
    """
    if not cfg.control_from:
        twin = victim / "control"
        return twin if is_done(twin / "pretrain") else None
    given = epath.Path(cfg.control_from)
    if is_done(given / "control" / "pretrain"):
        return given / "control"
    if is_done(given / "pretrain") and not read_config(given).attack.poisons:
        return given
    raise UserError(f"control_from={cfg.control_from!r} must be a run folder with a finished "
                    "control, or one of a finished run with attack.poisons=0")


@contextlib.contextmanager
def locked(folder: epath.Path) -> Iterator[None]:
    """Keeps a second writer out of a local run folder; the kernel frees the lock on kill -9.

    Object stores have no such lock; there the launcher must not start a run twice.

    Raises:
        UserError: another process holds the folder, or it cannot be written.
    """
    if "://" in str(folder):
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(os.fspath(folder / ".lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder}; wait for it, or use another "
                            "--workdir") from None
        yield


def write_config(folder: epath.Path, cfg: ml_collections.ConfigDict) -> None:
    """Leaves the resolved config of a run in its folder."""
    write_json(folder / "config.json", cfg.to_dict())


def read_config(folder: epath.Path) -> ml_collections.ConfigDict:
    """Reads the resolved config of a run folder; lists become tuples again.

    Raises:
        UserError: the folder has none.
    """
    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    found = tuples(read_json(folder / "config.json"))
    found.setdefault("text", {"name": "none"})  # of runs made before there were image-text models
    found.setdefault("init_from", "")
    return ml_collections.ConfigDict(found).lock()
