"""launch/local.sh: what it prints, and real processes, with a stub in place of Python."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launching import FLAG, PROGRAM, ROOT, callers_environment, dry, launch, program


def test_local_prints_what_it_runs(tmp_path):
    assert dry("local.sh", "configs/a.py", "runs/a b", FLAG) == [["python", *PROGRAM]]
    two = dry("local.sh", "configs/a.py", "runs/a b", FLAG, PROCESSES="2", DEVICES="4", PORT="9")
    assert two == [["env", "XLA_FLAGS=--xla_force_host_platform_device_count=4", "python",
                    *PROGRAM, "--coordinator=127.0.0.1:9", "--processes=2", f"--process_id={i}"]
                   for i in range(2)]
    free = dry("local.sh", "configs/a.py", "runs/a b", PROCESSES="2")
    assert 20_000 <= int(free[0][-3].rpartition(":")[2]) < 32_000


def test_processes_share_the_gpus(tmp_path):
    program(tmp_path, "nvidia-smi", "for i in 0 1 2 3; do echo $i; done")

    def visible(**environment):
        printed = dry("local.sh", "configs/a.py", "runs/a", PROCESSES="2", path=tmp_path,
                      **environment)
        return [[w for w in words if w.startswith("CUDA")] for words in printed], printed

    shares, printed = visible(JAX_PLATFORMS="")
    assert shares == [["CUDA_VISIBLE_DEVICES=0,1"], ["CUDA_VISIBLE_DEVICES=2,3"]]
    assert all("XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true" in w for w in printed)
    shares, _ = visible(JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="5,7")
    assert shares == [["CUDA_VISIBLE_DEVICES=5"], ["CUDA_VISIBLE_DEVICES=7"]]
    assert visible(JAX_PLATFORMS="cpu")[0] == [[], []]
    done = launch("local.sh", "c", "w", DRY_RUN="1", PROCESSES="3", JAX_PLATFORMS="", path=tmp_path)
    assert done.returncode == 2 and "must divide the 4 GPUs" in done.stderr
    program(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert visible(JAX_PLATFORMS="")[0] == [[], []]


# Stands for Python: does what the file plan-I in its --workdir says, in place of a run.
STUB = """
id=0 several=""
for word in "$@"; do
  case $word in
    --process_id=*) id=${word#*=} several=1 ;;
    --workdir=*) cd "${word#*=}" ;;
  esac
done
[ -z "$several" ] || { sleep 30 & echo $! >worker-$id; }
trap 'echo TERM >signal-$id; exit 143' TERM
trap 'echo INT >signal-$id; exit 130' INT
echo "process $id has begun" | tee begun-$id
case $(cat plan-$id 2>/dev/null) in
  exit*) sleep 0.3; echo "error: it broke"; exit $(cut -c 5- plan-$id) ;;
  kill) sleep 0.3; kill -9 $$ ;;
  deaf) trap '' TERM ;;
  leave) kill $(cat worker-$id); exit 0 ;;
esac
wait
"""


def supervised(tmp_path, plans, script="local.sh", words=(FLAG,), **environment):
    """Starts local.sh on a stub in place of Python; gives the process and its run folder."""
    folder = tmp_path / "run folder"
    folder.mkdir()
    for i, plan in enumerate(plans):
        (folder / f"plan-{i}").write_text(plan)
    python = program(tmp_path / "bin", "a python", STUB)
    started = subprocess.Popen(
        ["bash", f"launch/{script}", "configs/a.py", str(folder), *words], cwd=ROOT, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**callers_environment(), "PROCESSES": str(len(plans)), "JAX_PLATFORMS": "cpu",
             "GRACE": "1", "PYTHON": str(python), **environment})
    return started, folder


def gone(pid):
    """Whether a process ended: nobody waits for an orphan here, so it may be a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("plans, status, how", [
    (("", "kill"), 137, "process 1 of 2 was ended by SIGKILL"),
    (("kill", "", "deaf"), 137, "process 0 of 3 was ended by SIGKILL"),
    (("", "exit1"), 1, "process 1 of 2 ended with status 1"),
    (("exit3", "leave"), 3, "process 0 of 2 ended with status 3"),
    (("", "exit2"), 2, None)])
def test_when_one_dies_the_others_are_ended(tmp_path, plans, status, how):
    started, folder = supervised(tmp_path, plans)
    (folder / "checkpoints" / "7").mkdir(parents=True)
    (folder / "checkpoints" / "20").mkdir()
    (folder / "checkpoints" / "20" / "digests.json").touch()
    (folder / "checkpoints" / "100").mkdir()  # not whole
    begun = time.monotonic()
    printed, said = started.communicate(timeout=30)
    assert started.returncode == status and time.monotonic() - begun < 10
    for i, plan in enumerate(plans):
        assert gone((folder / f"worker-{i}").read_text().strip()), i
        assert (folder / f"signal-{i}").exists() == (plan == "")
        shown = f"process {i} has begun" in printed
        assert shown == (i == 0) and (i == 0 or "begun" in
                                      (folder / "logs" / f"process-{i}.log").read_text())
    if how is None:
        assert "error: it broke" in said and "good step" not in said and "go on" not in said
        return
    assert how in said and f"last good step: 20 (in {folder}/checkpoints)" in said
    again = shlex.split(said.splitlines()[-1].partition("to go on from there: ")[2])
    assert again[:2] == ["env", f"PROCESSES={len(plans)}"]
    assert again[-5:] == ["bash", "launch/local.sh", "configs/a.py", str(folder), FLAG]
    assert "Killed" not in said


def test_the_last_good_step_is_that_of_the_control_once_it_is_trained(tmp_path):
    started, folder = supervised(tmp_path, ("kill", ""))
    (folder / "control" / "pretrain").mkdir(parents=True)
    (folder / "control" / "pretrain" / "settings.json").touch()
    _, said = started.communicate(timeout=30)
    assert f"last good step: none (in {folder}/control/checkpoints)" in said


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("terminal", [False, True])
def test_signals_are_passed_on(tmp_path, number, status, terminal):
    started, folder = supervised(tmp_path, ("", ""))
    until = time.monotonic() + 10
    while len(list(folder.glob("begun-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    if terminal:  # Ctrl-C, say, goes to all of a process group
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    _, said = started.communicate(timeout=30)
    assert started.returncode == status and "stopped; to go on: " in said
    assert [path.read_text() for path in sorted(folder.glob("signal-*"))] == [
        f"{number.name[3:]}\n"] * 2


def test_a_sweep_passes_signals_on_and_stops(tmp_path):
    started, folder = supervised(tmp_path, ("", ""), script="sweep.sh", words=("x=1",))
    until = time.monotonic() + 10
    while len(list(folder.glob("*/begun-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)
    _, said = started.communicate(timeout=30)
    assert started.returncode == 130 and said.count("stopped; to go on: ") == 1
    assert [path.parent.name for path in folder.glob("*/signal-*")] == ["x=1+seed=0"] * 2


def test_all_end_well_and_one_process_is_the_program_itself(tmp_path):
    started, folder = supervised(tmp_path, ("leave", "leave"))
    assert started.wait(timeout=30) == 0 and "good step" not in started.communicate()[1]
    (folder / "plan-0").write_text("exit7")
    done = launch("local.sh", "configs/a.py", folder, PYTHON=str(tmp_path / "bin" / "a python"))
    assert done.returncode == 7 and "process 0 has begun" in done.stdout
