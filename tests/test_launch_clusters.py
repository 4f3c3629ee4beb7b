"""launch/ for clusters: DRY_RUN, and the retries with made-up srun and gcloud."""

import re
import shlex
import tomllib

import pytest
import yaml

from tests.launching import FLAG, JOBSET, PROGRAM, ROOT, SLICE, dry, launch, program


def test_slurm_puts_a_job_back_into_the_queue_a_bounded_number_of_times(tmp_path):
    (words,) = dry("slurm.sh", "configs/a.py", "runs/a b", FLAG, SLURM_CPUS_PER_TASK="6")
    assert words[0] == "srun" and words[3:] == ["--cpus-per-task=6", "python", *PROGRAM]
    text = (ROOT / "launch" / "slurm.sh").read_text()
    assert "#SBATCH --requeue\n#SBATCH --signal=TERM@300\n" in text
    program(tmp_path, "scontrol", f'echo "$*" >>{tmp_path}/asked')
    program(tmp_path, "sleep", "")
    for status, count, again in ((0, "0", 0), (1, "0", 1), (2, "0", 0), (143, "1", 1),
                                 (137, "2", 0)):
        program(tmp_path, "srun", f"exit {status}")
        done = launch("slurm.sh", "configs/a.py", "runs/a", path=tmp_path, MAX_RESTARTS="2",
                      SLURM_JOB_ID="12", SLURM_RESTART_COUNT=count)
        asked = tmp_path / "asked"
        assert done.returncode == status and asked.exists() == bool(again)
        assert not again or asked.read_text() == "requeue 12\n"
        asked.unlink(missing_ok=True)
    program(tmp_path, "srun", "kill -TERM $PPID; exit 1")  # as scancel does
    done = launch("slurm.sh", "configs/a.py", "runs/a", path=tmp_path, SLURM_JOB_ID="12")
    assert done.returncode == 1 and not (tmp_path / "asked").exists()


# Stands for gcloud: one worker, whose home is here; `states` are what describe says, in turn:
# NONE that there is nothing, BROKEN something else, INT while Ctrl-C is pressed.
GCLOUD = """
cd {folder}
echo "$*" >>calls
case "$*" in
  *describe*) found=$(head -n 1 states); sed -i 1d states
    case ${{found:-NONE}} in
      NONE) echo "ERROR: (gcloud.describe) NOT_FOUND: Resource 'pod' was not found." >&2; exit 1 ;;
      BROKEN) echo "WARNING: slow" >&2; echo "ERROR: (gcloud.describe) UNAVAILABLE" >&2; exit 1 ;;
      INT) trap '' INT; kill -INT 0; echo SUSPENDED ;;
      *) echo "$found" ;;
    esac ;;
  *" ssh "*) for word in "$@"; do
      case $word in
        --command=*uv*) ;;
        --command=*) bash -c "${{word#--command=}}" || exit $? ;;
      esac
    done ;;
esac
"""


UP = "ACTIVE\nREADY\n"


def on_a_slice(folder, states, statuses="0", sleep=""):
    """Runs tpu_vm.sh on made-up states of a slice and statuses of the program: its exit status,
    what it did, and what it said. `sleep`: what happens while it waits."""
    program(folder, "gcloud", GCLOUD.format(folder=folder))
    program(folder, "sleep", sleep)
    python = folder / "jax_cl_bd" / ".venv" / "bin"
    python.mkdir(parents=True, exist_ok=True)
    for name, text in (("states", states), ("statuses", statuses), ("calls", "")):
        (folder / name).write_text(text)
    program(python, "python", f'printf "%s\\n" "$@" >{folder}/words\n'
            f"status=$(head -n 1 {folder}/statuses); sed -i 1d {folder}/statuses\n"
            "exit $status")
    done = launch("tpu_vm.sh", "run", "configs/a.py", "gs://b/a b", FLAG, path=folder,
                  TMPDIR=str(folder), RETRIES="1", SPOT="1", **SLICE)
    lines = (folder / "calls").read_text().splitlines()
    kinds = [("create", " create "), ("delete", " delete "), ("install", "uv"),
             ("run", "run.attempt"), ("stop", "kill")]
    return (done.returncode, [kind for line in lines for kind, mark in kinds if mark in line],
            done.stderr)


def test_tpu_vm_makes_a_slice_anew_that_was_taken_away(tmp_path):
    def calls(*given):
        return on_a_slice(tmp_path, *given)[:2]

    assert calls(UP, "0") == (0, ["install", "run"])
    assert (tmp_path / "words").read_text().splitlines() == [
        *PROGRAM[:3], "--workdir=gs://b/a b", FLAG]
    assert calls("NONE\n" + UP, "0") == (0, ["create", "install", "run"])
    assert calls(UP, "2") == (2, ["install", "run"])
    # Pre-empted, so made anew; then it broke on a slice that is there, twice: one retry.
    for taken in ("ACTIVE\nPREEMPTED\n", "ACTIVE\nNONE\n", "SUSPENDED\n"):
        assert calls(UP + 2 * taken + 4 * UP, "1\n1\n3\n") == (
            3, ["install", "run", "delete", "create", "stop", "install", "run", "stop", "run"])
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize("states, statuses, did", [
    ("BROKEN\nBROKEN\n" + UP, "0", ["install", "run"]),
    ("ACTIVE\nBROKEN\n" + UP, "0", ["install", "run"]),
    ("NONE\nBROKEN\n" + UP, "0", ["create", "install", "run"]),
    (UP + "BROKEN\n" + 2 * UP, "1\n0\n", ["install", "run", "stop", "run"])])
def test_tpu_vm_asks_again_where_gcloud_does_not_answer(tmp_path, states, statuses, did):
    status, done, said = on_a_slice(tmp_path, states, statuses)
    assert (status, done) == (0, did)
    assert "pod is, and is asked again: ERROR: (gcloud.describe) UNAVAILABLE\n" in said


@pytest.mark.parametrize("states, sleep, did", [
    ("CREATING\n", "kill -INT 0", []), ("BROKEN\n", "kill -INT 0", []),
    ("INT\n", "", []), ("ACTIVE\nINT\n", "", []),
    (UP, "kill -INT 0", ["install", "run", "stop"]),
    (UP + "INT\n", "", ["install", "run", "stop"])])
def test_ctrl_c_ends_tpu_vm_wherever_it_waits(tmp_path, states, sleep, did):
    status, done, said = on_a_slice(tmp_path, states, "1\n", sleep)
    assert (status, done) == (130, did) and "stopped; the same command goes on" in said


def test_tpu_vm_prints_its_commands():
    create, described, packed, copied, installed = dry("tpu_vm.sh", "create", SPOT="1",
                                                       PROJECT="p", **SLICE)
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--spot", "--node-id=pod", "--project=p", "--zone=us-west4-a",
            "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha"} <= set(create)
    assert "--worker=all" in copied and "--worker=all" in installed
    assert "-c constraints.txt -e '.[tpu]'" in installed[-1]
    packed = packed[packed.index("-C") + 2:]
    assert packed and all((ROOT / name).exists() for name in packed)
    listed, stop, *_, ran = dry("tpu_vm.sh", "restart", "configs/a.py", "gs://b/a", **SLICE)
    assert listed[-1] == "gs://b" and "kill -TERM" in stop[-1] and "--worker=all" in ran
    (deleted,) = dry("tpu_vm.sh", "delete", NAME="pod", ZONE="z")
    assert deleted[4:6] == ["delete", "pod"] and "--quiet" not in deleted


def test_xpk_restarts_all_but_bad_input():
    (words,) = dry("xpk.sh", "configs/a.py", "gs://b/a b", FLAG, CLUSTER="c", IMAGE="i", **SLICE)
    flags = dict(word.split("=", 1) for word in words[3:])
    assert words[:3] == ["xpk", "workload", "create"] and flags["--restart-on-exit-codes"] == "1"
    assert shlex.split(flags["--command"]) == ["python", *PROGRAM[:3], "--workdir=gs://b/a b", FLAG]


def jobset(**environment):
    """The manifest, parsed, with its job and container."""
    done = launch("gke_jobset.sh", "configs/a.py", "gs://b/a b", FLAG, '--config.x=$(A)"\\',
                  DRY_RUN="1", **JOBSET, **environment)
    assert done.returncode == 0, done.stderr
    whole = yaml.safe_load(done.stdout)
    (job,) = whole["spec"]["replicatedJobs"]
    return whole, job, job["template"]["spec"]["template"]["spec"]["containers"][0]


def test_a_jobset_restarts_all_of_it_and_fails_at_once_on_bad_input():
    whole, job, container = jobset(GPU="nvidia-h100-80gb", MAX_RESTARTS="3")
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    failure, spec = whole["spec"]["failurePolicy"], job["template"]["spec"]
    assert failure["maxRestarts"] == 3 and failure["restartStrategy"] == "BlockingRecreate"
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in failure["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])]
    assert spec["backoffLimit"] == 0 and spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == 4
    assert spec["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": {
        "containerName": container["name"], "operator": "In", "values": [2]}}]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert container["command"] == [
        "python", *PROGRAM[:3], "--workdir=gs://b/a b", FLAG, '--config.x=$$(A)"\\',
        "--coordinator=pod-main-0-0.pod:55527", "--processes=4", "--process_id=$(PROCESS_ID)"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_a_jobset_of_gpus_finds_the_driver_or_fails():
    def variables(**kind):
        return {entry["name"]: entry.get("value") for entry in jobset(**kind)[2]["env"]}

    found = variables(GPU="nvidia-h100-80gb")
    assert found["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert found["JAX_PLATFORMS"] == "cuda" and "latency_hiding" in found["XLA_FLAGS"]
    for kind in ({}, {"TPU": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}):
        assert not {"LD_LIBRARY_PATH", "JAX_PLATFORMS", "XLA_FLAGS"} & variables(**kind).keys()


def test_a_jobset_of_tpus_leaves_it_to_jax_to_find_the_others():
    whole, job, container = jobset(TPU="tpu-v5-lite-podslice", TOPOLOGY="4x4", SLICES="2")
    assert job["replicas"] == 2 and not any("coordinator" in w for w in container["command"])
    assert job["template"]["spec"]["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4"}
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://b/jax_cl_bd_cache"} in container[
        "env"]


def test_the_image_takes_what_is_there_and_an_extra_that_exists():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
              for name in line.split()[:-1]]
    kept = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    assert kept[0] == "*" and copied
    assert all((ROOT / name).exists() and f"!{name}" in kept for name in copied)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"gpu", "tpu"} <= set(extras["optional-dependencies"]) and "ARG EXTRA=\n" in text
