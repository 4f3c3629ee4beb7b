"""Checkpoints that are verified before they are used; no other file imports orbax (design 8)."""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys

import orbax.checkpoint as ocp
from etils import epath

from jax_cl_bd import multihost, run_folder

KEEP = 2  # the newest, and the one to fall back on
DIGESTS = "digests.json"
# tensorstore says by a ValueError what a storage refused; it begins with one of these, or has the
# number of a local file system's error.
REFUSED = re.compile("(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|"
                     "DEADLINE_EXCEEDED|ABORTED|DATA_LOSS|NOT_FOUND): ")
NUMBER = re.compile(r"\[os_error_code='(\d+)'\]")


def open_manager(folder: epath.Path) -> ocp.CheckpointManager:
    """Opens (and makes) a folder of checkpoints; use it as a context manager."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, create=True,
                                           enable_async_checkpointing=False)
    return ocp.CheckpointManager(_absolute(folder), options=options)


def _absolute(folder: epath.Path) -> epath.Path:
    return folder if "://" in str(folder) else epath.Path(os.path.abspath(folder))


def save(manager: ocp.CheckpointManager, step: int, state) -> None:
    """Saves a state, then, last and atomically, the SHA-256 of every file of the step.

    Raises:
        OSError: the storage refused; it names the step.
    """
    try:
        with _one_error():
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
            manager.wait_until_finished()
        if multihost.is_writer():
            folder = manager.directory / str(step)
            run_folder.write_json(folder / DIGESTS, _digests(folder))
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError) and not _refused(error):
            raise
        refused = OSError(f"step {step} could not be saved in {manager.directory}: {error}")
        number = NUMBER.search(str(error))
        refused.errno = int(number[1]) if number else getattr(error, "errno", None)
        raise refused from None
    multihost.wait("digests")


@contextlib.contextmanager
def _one_error():
    """Keeps to itself what a save's other writes print once one of them was refused.

    There are hundreds, and each reports to an event loop that Orbax has closed by then: a traceback
    for each, of tensorstore's threads or of asyncio, before and after the error that is raised. So
    both stay quiet after an error.
    """
    log, hook = logging.getLogger("asyncio"), sys.excepthook
    level = log.level

    def others(kind, error, trace):
        if str(error) != "Event loop is closed":
            hook(kind, error, trace)

    log.setLevel(logging.CRITICAL)
    sys.excepthook = others
    yield
    log.setLevel(level)
    sys.excepthook = hook


def _refused(error: ValueError) -> bool:
    """Whether tensorstore raised it for what a file system or an object store refused."""
    return bool(REFUSED.match(str(error)) or NUMBER.search(str(error)))


def _digests(folder: epath.Path) -> dict[str, str]:
    found, pending = {}, [folder]
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                pending.append(path)
            elif DIGESTS not in path.name:
                name = str(path.relative_to(folder))
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def fault(checkpoints: epath.Path, step: int) -> str | None:
    """Says what is wrong with the files of a step, or None."""
    folder = checkpoints / str(step)
    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except (FileNotFoundError, ValueError):
        return "its digests are missing or unreadable"
    found = _digests(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} is not what was saved"
    return None


def newest_good_step(folder: epath.Path, *, rename: bool = False) -> int | None:
    """Finds the newest step whose files are what was saved; damaged ones are named.

    Only the run that owns the folder may `rename` a damaged one, to bad-<step>: to a reader, a step
    that is just being written looks damaged too.
    """
    if not folder.exists():
        return None
    steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
    for step in steps:
        wrong = fault(folder, step)
        if wrong is None:
            return step
        print(f"checkpoint {folder / str(step)} is damaged ({wrong}); falling back to the one "
              f"before{f', this one is renamed to bad-{step}' if rename else ''}", file=sys.stderr)
        if rename:
            bad = folder / f"bad-{step}"
            if bad.exists():
                bad.rmtree()
            (folder / str(step)).rename(bad)
    return None


def restore(manager: ocp.CheckpointManager, step: int, abstract_state):
    """Restores a state into the shapes and shardings of `abstract_state`."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
    return manager.restore(step, args=args)["state"]


def restore_part(folder: epath.Path, step: int, item):
    """Restores only the leaves that `item` (a nested dict of abstract arrays) names."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            _absolute(folder / str(step) / "state"),
            args=ocp.args.PyTreeRestore(
                item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                partial_restore=True))
