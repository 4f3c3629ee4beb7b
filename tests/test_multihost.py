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
from etils import epath

from jax_cl_bd import __main__ as command
from jax_cl_bd import multihost, run_folder
from jax_cl_bd.errors import UserError
from jax_cl_bd.multihost import Job
from tests.command_line import BASE, quickstart
from tests.command_line import command as command_line

ROOT = Path(__file__).parents[1]
QUICK = ("--config=configs/quickstart.py:debug,defense=none", "--config.control=False",
         "--config.train.steps=10", "--config.train.save_every=5")


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "node[1-4]"}
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
OPEN_MPI = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911"}


@pytest.mark.parametrize("environ, job", [
    ({}, None), (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    (SLURM, Job(4, 3, None)), (OPEN_MPI, Job(2, 1, None)),
    (SLURM | OPEN_MPI, Job(2, 1, None)),  # in this order, since jax has it
    (OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}, Job(3, 2, None)),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
      "MEGASCALE_SLICE_ID": "1"}, Job(4, 3, None))])
def test_a_cluster_says_who_is_in_a_job(environ, job):
    assert multihost.find(None, None, None, environ) == job


@pytest.mark.parametrize("cluster", [SLURM, OPEN_MPI, OPEN_MPI_5])
def test_flags_win_over_a_cluster(cluster):
    assert multihost.find("a:1", 2, 0, cluster) == Job(2, 0, "a:1")
    assert multihost.find(None, 1, None, cluster) is None
    assert multihost.find("a:1", 1, 0, cluster) is None


def test_a_cluster_that_jax_cannot_join_is_refused():
    for environ in (OPEN_MPI_5, OPEN_MPI_5 | SLURM):
        with pytest.raises(UserError, match="OMPI_MCA_orte_hnp_uri.*--coordinator=HOST:PORT "
                           r"--processes=2 --process_id=\$OMPI_COMM_WORLD_RANK") as refused:
            multihost.find(None, None, None, environ)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("environ, name", [(OPEN_MPI, "ompi"), (SLURM | OPEN_MPI, "ompi"), (
    SLURM | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, "slurm"),
    (OPEN_MPI_5, None)])
def test_jax_recognises_the_same_clusters(monkeypatch, environ, name):
    from jax._src import clusters

    for key in [k for k in os.environ if k.startswith(("OMPI", "SLURM"))]:
        monkeypatch.delenv(key)
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    found = [kind.name for kind in clusters.ClusterEnv._cluster_types
             if kind.name in ("ompi", "slurm") and kind.is_env_present()]
    assert (found[0] if found else None) == name


@pytest.mark.parametrize("given, message", [
    ((None, 2, 0), "--coordinator missing"), (("a:1", None, 0), "--processes missing"),
    (("a:1", None, None), "--processes and --process_id missing"),
    (("a", 2, 0), "must be HOST:PORT"), (("a:b", 2, 0), "must be HOST:PORT"),
    (("a:1", 2, 2), r"--process_id=2 must be in 0..1"), (("a:1", 0, 0), "--process_id=0 must")])
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        multihost.find(*given, {})


def test_a_slice_of_tpu_vms_is_told_by_its_metadata(monkeypatch):
    told = {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2", "agent-worker-number": "1"}
    monkeypatch.setattr(multihost, "on_tpu", lambda: True)
    monkeypatch.setattr(multihost, "_metadata", told.__getitem__)
    for name in [n for names in multihost.CLUSTERS for n in names]:
        monkeypatch.delenv(name, raising=False)
    assert multihost.find(None, None, None) == Job(2, 1, None)
    told["worker-network-endpoints"] = "x:y:10.0.0.1"
    assert multihost.find(None, None, None) is None


@pytest.fixture
def children(monkeypatch):
    """What a supervisor would start, whether on the CPU, and with which status each then ends
    (default 0)."""
    started, statuses = [], {}

    def child(argv, *, on_cpu):
        started.append((argv, on_cpu))
        stage = next(w for w in argv if w.startswith("--stages=")).removeprefix("--stages=")
        return statuses.get("check" if "--check_only" in argv else stage, 0)

    monkeypatch.setattr(multihost, "_child", child)
    return started, statuses


ALL = ["poison", "pretrain", "evaluate", "defend", "report"]
ALONE = ["--processes=1", "--config.mesh.data=-1", "--config.mesh.fsdp=1"]


def test_pretraining_is_for_all_and_the_rest_for_process_0(children, tmp_path):
    job = Job(2, 0, "a:1")
    assert multihost.supervise(job, ["--workdir=x"], ALL, "evaluate", epath.Path(tmp_path)) == 0
    force = "--force=evaluate"
    who = ["--coordinator=a:1", "--processes=2", "--process_id=0"]
    assert children[0] == [
        (["--workdir=x", f"--stages={','.join(ALL)}", *ALONE, force, "--check_only"], True),
        (["--workdir=x", "--stages=poison", force, *ALONE], False),
        (["--workdir=x", "--stages=pretrain", force, "--joined", *who], False),
        (["--workdir=x", "--stages=evaluate,defend,report", force, *ALONE], False)]


def test_the_others_only_check_and_pretrain(children, tmp_path):
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "done.json").write_text("{}")
    assert multihost.supervise(Job(2, 1, None), [], ALL, "poison", epath.Path(tmp_path)) == 0
    assert children[0] == [([f"--stages={','.join(ALL)}", *ALONE, "--force=poison",
                             "--check_only"], True), (["--stages=pretrain", "--joined"], False)]


@pytest.mark.parametrize("chosen", [ALL, ["pretrain"]])
def test_with_a_victim_process_0_does_it_all(children, tmp_path, chosen):
    given = ([], chosen, "poison", epath.Path(tmp_path))
    assert multihost.supervise(Job(2, 1, "a:1"), *given, has_victim=True) == 0
    assert multihost.supervise(Job(2, 0, "a:1"), *given, has_victim=True) == 0
    checked = ([f"--stages={','.join(chosen)}", *ALONE, "--force=poison", "--check_only"], True)
    forced = ["--force=poison"] if "poison" in chosen else []
    assert children[0] == [checked, checked,
                           ([f"--stages={','.join(chosen)}", *forced, *ALONE], False)]


def test_the_program_says_that_there_is_a_victim(tmp_path):
    """Without it, process 1 would wait for poisons that nobody makes."""
    run_folder.write_config(epath.Path(tmp_path / "victim"), quickstart())
    process = command_line(*BASE, f"--config.victim={tmp_path}/victim", f"--workdir={tmp_path}/run",
                           "--coordinator=127.0.0.1:1", "--processes=2", "--process_id=1")
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said


@pytest.mark.parametrize("tpu", [False, True])
def test_settings_are_checked_on_the_cpu_and_what_runs_alone_leaves_a_tpu_alone(
        monkeypatch, tmp_path, tpu):
    started = {}

    class Child:
        def __init__(self, words, *, env, **others):
            kind = next(w for w in words if w == "--check_only" or w.startswith("--stages="))
            started["check" if "--check_only" in words else kind] = env.get("JAX_PLATFORMS")

        def wait(self):
            return 0

    monkeypatch.setattr(multihost.subprocess, "Popen", Child)
    monkeypatch.setattr(multihost, "on_tpu", lambda: tpu)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert multihost.supervise(Job(2, 0, "a:1"), [], ["pretrain", "evaluate"], None,
                               epath.Path(tmp_path)) == 0
    assert started == {"check": "cpu", "--stages=pretrain": "cuda",
                       "--stages=evaluate": "cpu" if tpu else "cuda"}


@pytest.mark.parametrize("environ", [
    SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, {}])
def test_what_joins_finds_the_same_job(environ):
    """With the flags that its supervisor gives it."""
    job = Job(2, 1, None if environ else "a:1")
    given = dict(word.removeprefix("--").split("=") for word in multihost._who(job))
    assert job == multihost.find(
        given.get("coordinator"), *(int(given[n]) if n in given else None
                                    for n in ("processes", "process_id")), environ)


def test_poisons_that_do_not_come_end_the_wait(monkeypatch, tmp_path, children):
    monkeypatch.setattr(multihost, "POISON_SECONDS", -1)
    with pytest.raises(RuntimeError, match="process 0 has not poisoned within"):
        multihost.supervise(Job(2, 1, "a:1"), [], ALL, None, epath.Path(tmp_path))


def test_where_poisons_are_made_anew_the_others_wait_for_the_new_ones(monkeypatch, tmp_path,
                                                                      children):
    mark, slept = tmp_path / "poison" / "done.json", []

    def sleep(seconds):  # in which process 0 drops the old ones, then marks the new ones
        assert len(children[0]) == 1
        slept.append(seconds)
        if len(slept) == 2:
            mark.unlink()
        if len(slept) == 4:
            mark.write_text("{}")

    def others():
        mark.parent.mkdir(exist_ok=True)
        mark.write_text("{}")
        os.utime(mark, (time.time() - 3600,) * 2)
        children[0].clear()
        return multihost.supervise(Job(2, 1, "a:1"), [], ALL, "poison", epath.Path(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(multihost.time, "sleep", sleep)
        assert others() == 0 and len(slept) == 4 and len(children[0]) == 2
    monkeypatch.setattr(multihost, "POISON_SECONDS", -1)
    with pytest.raises(RuntimeError, match="done.json is still the old one"):
        others()


def test_who_joins_waits_as_long_as_is_said(monkeypatch):
    import jax

    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: given.update(words))
    multihost.join(Job(2, 1, "a:1"))
    assert given["initialization_timeout"] == multihost.JOIN_SECONDS > 300  # JAX's own
    assert given["coordinator_address"] == "a:1"


@pytest.mark.parametrize("stage, count", [("check", 1), ("pretrain", 2)])
def test_a_stage_that_breaks_ends_the_process(children, tmp_path, stage, count):
    children[1][stage] = 143
    given = (["pretrain", "evaluate"], None, epath.Path(tmp_path))
    assert multihost.supervise(Job(2, 0, "a:1"), [], *given) == 143
    assert len(children[0]) == count


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
        assert process.wait(1800) == 0, (folder.parent / f"{folder.name}.{i}.log").read_text()
    return losses(folder)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Losses of 2 x 2 devices and of 1 x 4; a kill; other numbers of processes; the same bits."""
    # At the quickstart's rate, 0.3, rounding grows too fast with 16 rows and batch norm.
    calm = ("--config.train.steps=100", "--config.train.save_every=50", "--config.optim.lr=0.003")
    one = train(tmp_path / "one", 1, *calm, devices=4)
    two = train(tmp_path / "two", 2, *calm)
    assert sorted(one) == sorted(two) == list(range(1, 101))
    differs = np.array([abs(two[s] - one[s]) / one[s] for s in range(1, 101)])
    assert differs[:10].max() < 1e-6 and differs.max() < 1e-4
    assert train(tmp_path / "again", 2, *calm) == two

    folder, longer = tmp_path / "killed", ("--config.train.steps=60", "--config.optim.lr=0.003")
    undisturbed, port = train(tmp_path / "undisturbed", 2, *longer), free_port()
    running = [start(folder, i, 2, port, *longer) for i in range(2)]
    deadline = time.monotonic() + 300
    while not (folder / "checkpoints" / "5" / "digests.json").exists():
        assert time.monotonic() < deadline and running[0].poll() is None
        time.sleep(0.02)
    running[1].send_signal(signal.SIGKILL)
    assert running[0].wait(200) != 0  # it notices by itself
    for processes, devices in ((1, 4), (2, 2), (4, 1)):
        went_on = tmp_path / f"went_on_{processes}"
        subprocess.run(["cp", "-r", folder, went_on], check=True)
        found = train(went_on, processes, *longer, devices=devices)
        if processes == 2:
            assert found == undisturbed
        else:
            ours, theirs = ([run[s] for s in range(1, 61)] for run in (found, undisturbed))
            np.testing.assert_allclose(ours[:10], theirs[:10], rtol=1e-6)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.slow
def test_processes_with_other_settings_are_refused(tmp_path):
    port, folder = free_port(), tmp_path / "run"
    running = [start(folder, i, 2, port, f"--config.optim.lr={0.1 * (i + 1)}") for i in range(2)]
    assert [process.wait(300) for process in running] == [2, 2]
    assert ("the settings of process 1 differ from those of process 0"
            in (tmp_path / "run.0.log").read_text())
