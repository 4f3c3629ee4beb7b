"""Runs of several processes: who is in them, what each runs, and that they train as one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_cl_bd import __main__ as command
from jax_cl_bd import multihost
from jax_cl_bd.errors import UserError
from jax_cl_bd.multihost import Job

ROOT = Path(__file__).parents[1]
QUICK = ("--config=configs/quickstart.py:debug,defense=none", "--config.control=False",
         "--config.train.steps=10", "--config.train.save_every=5")


@pytest.mark.parametrize("environ, job", [
    ({}, None), ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}, Job(4, 3, None)),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Job(2, 1, None)),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}, Job(3, 2, None)),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None)])
def test_a_cluster_says_who_is_in_a_job(environ, job):
    assert multihost.find(None, None, None, environ) == job


def test_flags_win_over_a_cluster():
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
    assert multihost.find("a:1", 2, 0, slurm) == Job(2, 0, "a:1")
    assert multihost.find(None, 1, None, slurm) is None
    assert multihost.find("a:1", 1, 0, slurm) is None


@pytest.mark.parametrize("given, message", [
    ((None, 2, 0), "--coordinator missing"), (("a:1", None, 0), "--processes missing"),
    (("a:1", None, None), "--processes and --process_id missing"),
    (("a", 2, 0), "must be HOST:PORT"), (("a:b", 2, 0), "must be HOST:PORT"),
    (("a:1", 2, 2), r"--process_id=2 must be in 0..1"), (("a:1", 0, 0), "--process_id=0 must")])
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        multihost.find(*given, {})


@pytest.fixture
def children(monkeypatch):
    """What a supervisor would start, and with which status each then ends (default 0)."""
    started, statuses = [], {}

    def child(argv):
        started.append(argv)
        stage = next(w for w in argv if w.startswith("--stages=")).removeprefix("--stages=")
        return statuses.get(stage, 0)

    monkeypatch.setattr(multihost, "_child", child)
    return started, statuses


def test_pretraining_is_for_all_and_the_rest_for_process_0(children):
    stages = ["poison", "pretrain", "evaluate", "defend", "report"]
    assert multihost.supervise(Job(2, 0, "a:1"), ["--workdir=x"], stages, "evaluate") == 0
    first, joined, rest = children[0]
    alone = ["--processes=1", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]
    assert first == ["--workdir=x", "--stages=poison", *alone,
                     "--also_check=pretrain,evaluate,defend,report"]
    assert joined == ["--workdir=x", "--stages=pretrain", "--joined", "--processes=2",
                      "--process_id=0", "--coordinator=a:1"]
    assert rest == ["--workdir=x", "--stages=evaluate,defend,report", "--force=evaluate", *alone,
                    "--also_check="]
    children[0].clear()
    assert multihost.supervise(Job(2, 1, None), [], stages, "poison") == 0
    assert children[0] == [["--stages=pretrain", "--joined", "--processes=2", "--process_id=1"]]


def test_a_stage_that_breaks_ends_the_process(children):
    children[1]["pretrain"] = 143
    assert multihost.supervise(Job(2, 0, "a:1"), [], ["pretrain", "evaluate"], None) == 143
    assert len(children[0]) == 1


def test_each_process_keeps_the_flags_that_are_shared():
    words = ["--config=a", "--stages", "poison", "--force=poison", "--workdir", "b",
             "--processes=2", "--config.seed=1", "--coordinator", "h:1", "-process_id=0"]
    assert command._shared(words) == ["--config=a", "--workdir", "b", "--config.seed=1"]


def start(folder, process_id, processes, port, *flags, devices=2):
    """One process of a job on loopback, with its own simulated devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
           "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    job = () if processes == 1 else (f"--coordinator=127.0.0.1:{port}",
                                     f"--processes={processes}", f"--process_id={process_id}")
    log = open(folder.parent / f"{folder.name}.{process_id}.log", "w")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "jax_cl_bd", *QUICK, f"--workdir={folder}",
             "--stages=poison,pretrain", *job, *flags], cwd=ROOT, env=env, stdout=log,
            stderr=subprocess.STDOUT)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(folder, processes, *flags, devices=2):
    port = free_port()
    running = [start(folder, i, processes, port, *flags, devices=devices)
               for i in range(processes)]
    for i, process in enumerate(running):
        assert process.wait(500) == 0, (folder.parent / f"{folder.name}.{i}.log").read_text()
    return losses(folder)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Losses of 2 x 2 devices and of 1 x 4; a kill; other numbers of processes; the same bits."""
    one = train(tmp_path / "one", 1, devices=4)
    two = train(tmp_path / "two", 2)
    assert sorted(one) == sorted(two) == list(range(1, 11))
    np.testing.assert_allclose([two[s] for s in two], [one[s] for s in one], rtol=1e-6)
    assert train(tmp_path / "again", 2) == two

    port, folder = free_port(), tmp_path / "killed"
    running = [start(folder, i, 2, port) for i in range(2)]
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "5" / "digests.json").exists():
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.02)
    running[1].send_signal(signal.SIGKILL)
    assert running[0].wait(200) != 0  # it notices by itself
    for processes, devices in ((1, 4), (2, 2)):
        went_on = tmp_path / f"went_on_{processes}"
        subprocess.run(["cp", "-r", folder, went_on], check=True)
        np.testing.assert_allclose(list(train(went_on, processes, devices=devices).values()),
                                   list(two.values()), rtol=1e-6)


@pytest.mark.slow
def test_processes_with_other_settings_are_refused(tmp_path):
    port, folder = free_port(), tmp_path / "run"
    running = [start(folder, i, 2, port, f"--config.optim.lr={0.1 * (i + 1)}") for i in range(2)]
    assert [process.wait(300) for process in running] == [2, 2]
    assert ("the settings of process 1 differ from those of process 0"
            in (tmp_path / "run.0.log").read_text())
