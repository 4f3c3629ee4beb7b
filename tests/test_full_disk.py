"""A disk that fills: one line says so, what was saved stays good, and the same command goes on."""

import errno
import logging
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import CheckpointManager

from jax_cl_bd import checkpoint, run_folder, stages
from tests.command_line import BASE, ROOT, command
from tests.toy_loop import losses, run

FULL = OSError(errno.ENOSPC, "No space left on device")
# As tensorstore said it on a disk that was full.
TENSORSTORE = ValueError(
    'RESOURCE_EXHAUSTED: Error writing "w0/0" in OCDBT database at local file "/a/": Failed '
    'writing: "/a/d/89e7": Failed to write 1358 bytes to file 7: No space left on device '
    "[os_error_code='28']")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), 10)


def said_of(error, what):
    """The one line that the command line prints."""
    said = stages.explain(error)
    assert said.startswith("the disk is full") and what in said and "\n" not in said
    assert said.endswith("the same command goes on where it stopped")


def fill_while_saving(monkeypatch, part):
    """Lets the arrays, another file of orbax, or the digests of step 10 find the disk full."""
    save, write = CheckpointManager.save, run_folder.write_json

    def saves(manager, step, **given):
        if step == 10:
            begun = manager.directory / "10.orbax-checkpoint-tmp" / "state"
            begun.mkdir(parents=True)
            raise TENSORSTORE if part == "arrays" else FULL
        return save(manager, step, **given)

    def writes(path, value):
        if path.parent.name == "10" and path.name == checkpoint.DIGESTS:
            (path.parent / f".{path.name}.partial").write_text('{"cut": "sh')
            raise FULL
        write(path, value)

    if part == "digests":
        monkeypatch.setattr(run_folder, "write_json", writes)
    else:
        monkeypatch.setattr(CheckpointManager, "save", saves)


@pytest.mark.parametrize("part", ["arrays", "files", "digests"])
def test_while_a_checkpoint_is_saved(tmp_path, monkeypatch, capsys, whole, part):
    with monkeypatch.context() as patch, pytest.raises(OSError) as full:
        fill_while_saving(patch, part)
        run(tmp_path, 10)
    said_of(full.value, f"step 10 could not be saved in {tmp_path}/checkpoints")
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == 5
    resumed = run(tmp_path, 10)
    assert "going on from step 5" in capsys.readouterr().out
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == 10


def test_while_metrics_are_appended(tmp_path, whole):
    """/dev/full in their place, which refuses every write; half a line is left before it."""
    metrics, kept = tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"

    def fill(state):
        metrics.rename(kept)
        metrics.symlink_to("/dev/full")
        return {"eval/x": 0.0}

    with pytest.raises(OSError) as full:
        run(tmp_path, 10, save_every=3, eval_every=5, evaluate=fill)
    said_of(full.value, "metrics.jsonl")
    kept.write_text(kept.read_text() + '{"step": 5, "eval/')
    kept.replace(metrics)
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == 3
    resumed = run(tmp_path, 10, save_every=3, eval_every=5, evaluate=lambda state: {"eval/x": 0.0})
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])
    assert [step for step, _ in losses(tmp_path)] == [5, 10]


@pytest.mark.parametrize("said, refused", [
    (str(TENSORSTORE), errno.ENOSPC), ("PERMISSION_DENIED: gs://a: HTTP response code: 403", None),
    ("OUT_OF_RANGE: File too large [os_error_code='27']", errno.EFBIG),
    ("Checkpoint for step 1 already exists.", False), ("INVALID_ARGUMENT: no such dtype", False)])
def test_only_what_the_storage_refused_is_said_to_be_its_fault(tmp_path, said, refused):
    def save(*_, **__):
        raise ValueError(said)

    manager = types.SimpleNamespace(save=save, directory=epath.Path(tmp_path))
    with pytest.raises(ValueError if refused is False else OSError) as raised:
        checkpoint.save(manager, 1, {})
    if refused is False:
        assert str(raised.value) == said
    else:
        assert raised.value.errno == refused and "step 1 could not be saved" in str(raised.value)


def test_poisons(tmp_path):
    short = [*BASE, "--stages=poison", f"--workdir={tmp_path}/run"]
    blocked = tmp_path / "run" / "poison" / ".summary.json.partial"
    blocked.parent.mkdir(parents=True)
    blocked.symlink_to("/dev/full")  # every write to it finds the disk full
    process = command(*short)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the disk is full" in err and "summary.json" in err
    assert "the same command goes on" in err and "Traceback" not in err
    blocked.unlink(missing_ok=True)
    process = command(*short)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "run" / "poison" / "done.json").exists()


def test_the_other_writes_of_a_refused_save_print_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # and put back after the test
    with checkpoint._one_error():
        pass
    assert sys.excepthook is sys.__excepthook__
    level = logging.getLogger("asyncio").level
    with pytest.raises(OSError), checkpoint._one_error():
        raise OSError("refused")
    sys.excepthook(RuntimeError, RuntimeError("Event loop is closed"), None)  # as tensorstore does
    logging.getLogger("asyncio").error("Future exception was never retrieved")
    assert capsys.readouterr().err == ""
    sys.excepthook(RuntimeError, RuntimeError("something else"), None)
    assert "something else" in capsys.readouterr().err
    logging.getLogger("asyncio").setLevel(level)


# A disk of the test's own: poisons and a checkpoint or two fit, three do not; then it is enlarged.
TWICE = """
mount -t tmpfs -o size=640k small "$DISK"
"$@" || echo "status $?"
ls "$DISK/run/checkpoints"
mount -o remount,size=64m "$DISK"
"$@" && cat "$DISK/run/pretrain/done.json"
"""


@pytest.mark.slow
def test_the_program_on_a_small_disk(tmp_path):
    own = ["unshare", "--map-root-user", "--mount"]
    probe = [*own, "mount", "-t", "tmpfs", "small", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk of his own")
    words = [sys.executable, "-m", "jax_cl_bd", *BASE, "--stages=poison,pretrain",
             "--config.control=False", "--config.train.steps=8", "--config.train.save_every=2",
             "--config.train.eval_every=0", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*own, "env", f"DISK={tmp_path}", "XLA_FLAGS=", "bash", "-c", TWICE, "bash", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    step = re.match(r"error: the disk is full \(step (\d) could not be saved in ", errors[0])
    assert step and int(step[1]) > 2, errors
    good, printed = int(step[1]) - 2, done.stdout.splitlines()
    assert "status 1" in printed and str(good) in printed, printed
    assert f"pretrain victim: going on from step {good}" in printed and '"step": 8' in done.stdout
