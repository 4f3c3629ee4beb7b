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

STAGES = ("poison", "pretrain", "evaluate", "defend", "report")
# Which config groups each stage depends on, its predecessors' included (design 1).
POISON_GROUPS = ("seed", "data", "attack", "augment", "text")
PRETRAIN_GROUPS = POISON_GROUPS + ("model", "objective", "optim", "train", "init_from")
MEASURE_GROUPS = ("evals", "downstream", "control_from")  # how encoders are measured, not made
EVALUATE_GROUPS = PRETRAIN_GROUPS + MEASURE_GROUPS
DEFEND_GROUPS = EVALUATE_GROUPS + ("defense",)
# What victim and control must share to be compared.
SHARED_GROUPS = ("data", "augment", "text", "model", "objective", "optim", "train", "init_from")
# What settings that older runs lack were before there was a choice; any other is "".
BEFORE = {"text.name": "none", "defense.mask_own": True, "defense.oracle.segmenter": "classical",
          "defense.oracle.segmenter_points": 32, "defense.preserve": 0.0,
          "defense.curate.rho_recurring": 2.0, "defense.scan.curate.rho_recurring": 2.0,
          "defense.cross_modal": True, "train.chunks": 1}
# Settings that change neither weights nor figures, and so never make two runs different.
NEVER_HASHED = ("data.data_dir", "data.workers", "data.feed", "train.log_every", "train.save_every",
                "train.eval_every", "train.steps_per_dispatch", "train.profile_from",
                "train.profile_steps", "evals.batch_size")


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it, so that no reader sees half a file."""
    temporary = path.parent / f".{path.name}.partial"
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(path)


@contextlib.contextmanager
def naming(path: epath.Path) -> Iterator[None]:
    """Lets an error of the file system name the file; that of a write, on a full disk say, names
    none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


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
        elif prefix not in NEVER_HASHED:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    tree = cfg.to_dict()
    for group in groups:
        walk(group, tree.get(group, ""))
    return flat


def hash_of(settings: dict[str, Any]) -> str:
    """Gives 12 hex digits that stand for these settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def of_groups(settings: dict[str, Any], groups: tuple[str, ...]) -> dict[str, Any]:
    """Keeps the settings of some groups."""
    return {k: v for k, v in settings.items() if k.partition(".")[0] in groups}


def difference(old: dict, new: dict) -> str:
    """Says which settings differ, "" if none; one that is absent was not yet there to be set."""
    new = json.loads(json.dumps(new))  # lists for tuples, as in what was read
    pairs = {k: [side.get(k, BEFORE.get(k, "")) for side in (old, new)]
             for k in sorted(old.keys() | new.keys())}
    return "; ".join(f"{k}: {there!r} there, {now!r} now"
                     for k, (there, now) in pairs.items() if there != now)


def check_settings(stage: epath.Path, settings: dict[str, Any], *,
                   but: tuple[str, ...] = ()) -> None:
    """Refuses a stage folder that was begun with other settings, the groups `but` left out.

    Raises:
        UserError: naming every setting that differs.
    """
    if not (stage / "settings.json").exists():
        return
    groups = tuple({key.partition(".")[0] for key in settings} - set(but))
    old = of_groups(read_json(stage / "settings.json"), groups)
    if differs := difference(old, of_groups(settings, groups)):
        raise UserError(f"{stage} was made with other settings: {differs} "
                        "(use another --workdir, or --force=STAGE to redo it)")


def is_done(stage: epath.Path) -> bool:
    """Says whether a stage is complete: its done.json is there."""
    return (stage / "done.json").exists()


def begin(stage: epath.Path, settings: dict[str, Any]) -> None:
    """Records the settings that a stage is begun with."""
    if not (stage / "settings.json").exists():
        write_json(stage / "settings.json", settings)


def finish(stage: epath.Path, settings: dict[str, Any], **facts: int) -> None:
    """Marks a stage complete; `facts`, such as the last step, are kept in its mark."""
    write_json(stage / "done.json", {"hash": hash_of(settings), **facts})


def is_begun(folder: epath.Path) -> bool:
    """Says whether a run's training, or a defense, was begun and is not complete."""
    stage = folder / "pretrain" if (folder / "pretrain").exists() else folder
    return (stage / "settings.json").exists() and not is_done(stage)


def last_step(folder: epath.Path) -> int | None:
    """The step that a run's training ended with; None if it did not, or did not say."""
    mark = folder / "pretrain" / "done.json"
    return read_json(mark).get("step") if mark.exists() else None


def kept_defenses(folder: epath.Path) -> dict[str, dict]:
    """The rows of results.json that are of complete defenses."""
    path = folder / "results.json"
    rows = read_json(path).get("defenses", {}) if path.exists() else {}
    return {name: row for name, row in rows.items() if is_done(folder / "defenses" / name)}


def weights_alone(folder: epath.Path) -> bool:
    """Says whether a folder holds an encoder and nothing of how it was made: a hub folder, a
    control, or a defense's folder. Any other is a run folder."""
    weights = (folder / "model.safetensors").exists() or (folder / "checkpoints").exists()
    return weights and not (folder / "poison").exists()


def from_elsewhere(cfg: ml_collections.ConfigDict) -> bool:
    """Says whether the victim that a config names came as weights alone."""
    return bool(cfg.get("victim", "")) and weights_alone(epath.Path(cfg.victim))


def is_clean(folder: epath.Path) -> bool:
    """Says whether a run's data were poisoned by nothing at all."""
    path = folder / "poison" / "summary.json"
    return path.exists() and read_json(path).get("poisons") == 0


def control_of(cfg: ml_collections.ConfigDict, victim: epath.Path) -> epath.Path | None:
    """The folder of the clean encoder that a victim is measured against; None if there is none.

    It is the twin in `victim`, or the victim itself where nothing was poisoned, or what
    cfg.control_from names: another run with a control of its own, or a run without poisons (so that
    many victims share one control, or have one of another seed).

    Raises:
        UserError: control_from holds no finished clean encoder, or one that was made otherwise than
            the victim in more than seed and attack.
    """
    home = epath.Path(cfg.control_from) if cfg.control_from else victim
    if is_done(home / "control" / "pretrain"):
        found = home / "control"
    elif is_done(home / "pretrain") and is_clean(home):
        found = home
    elif not cfg.control_from:
        return None
    else:
        raise UserError(f"control_from={cfg.control_from!r} must be a run folder with a finished "
                        "control, or one of a finished run whose poison/summary.json counts no "
                        "poisons")
    if cfg.control_from:
        made = of_groups(read_json(found / "pretrain" / "settings.json"), SHARED_GROUPS)
        if differs := difference(made, settings_of(cfg, SHARED_GROUPS)):
            raise UserError(f"control_from={cfg.control_from!r} was made otherwise than the "
                            f"victim: {differs} (they may differ in seed and attack alone)")
    return found


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
    found.setdefault("control_from", "")
    found.setdefault("init_from", "")
    if "train" in found:
        found["train"] = {"chunks": 1, "profile_from": 0, "profile_steps": 0} | found["train"]
    return ml_collections.ConfigDict(found).lock()
