"""launch/local.sh with two JAX processes over loopback, one of which is killed.

What it does with processes that end otherwise: test_launch_local.py, with a stub in their place.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from jax_cl_bd import checkpoint
from tests.launching import ROOT, callers_environment

# At the quickstart's rate, 0.3, rounding grows too fast with 16 rows and batch norm.
WORDS = ("--stages=poison,pretrain", "--config.control=False", "--config.train.steps=60",
         "--config.train.save_every=5", "--config.optim.lr=0.003")


def environment():
    """The caller's, with the compilation cache of the tests."""
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    return callers_environment() | {name: os.environ[name] for name in kept}


def start(command, **more):
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment() | more)


def local(folder, processes, devices):
    return start(["bash", "launch/local.sh", "configs/quickstart.py:debug,defense=none",
                  str(folder), *WORDS], PROCESSES=str(processes), DEVICES=str(devices),
                 JAX_PLATFORMS="cpu", PYTHON=sys.executable)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in sorted(lines, key=lambda line: line["step"])]


def pids(folder, number, *, joined):
    """Those of a process of the job: what local.sh started, or what trains below that."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue  # it has ended
        if (f"--workdir={folder}" in words and f"--process_id={number}" in words
                and ("--joined" in words) == joined):
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    process = local(folder, 1, 2)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return losses(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("number, joined", [(0, True), (1, True), (1, False)])
def test_kill_9_of_either_process(tmp_path, undisturbed, number, joined):
    """The survivor is ended within 30 s, what happened and what to do is said, and that works."""
    folder = tmp_path / "run"
    job = local(folder, 2, 1)
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "10" / "digests.json").exists():
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()
        time.sleep(0.02)
    (pid,) = pids(folder, number, joined=joined)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    _, said = job.communicate(timeout=120)
    seconds = time.monotonic() - killed
    assert job.returncode == 137 and seconds < 30, (job.returncode, seconds, said)
    assert not any(pids(folder, i, joined=j) for i in (0, 1) for j in (True, False))
    assert not (folder / "pretrain" / "done.json").exists()
    assert f"process {number} of 2 was ended by SIGKILL; the others were ended" in said
    good = checkpoint.newest_good_step(epath.Path(folder / "checkpoints"))
    assert good >= 5 and f"last good step: {good} (in {folder}/checkpoints)" in said
    again = start(shlex.split(re.search("to go on from there: (.*)", said)[1]))
    printed, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"pretrain victim: going on from step {good}" in printed
    found = losses(folder)
    np.testing.assert_allclose(found[:10], undisturbed[:10], rtol=1e-6)
    np.testing.assert_allclose(found, undisturbed, rtol=1e-4)
    assert len(found) == 60
