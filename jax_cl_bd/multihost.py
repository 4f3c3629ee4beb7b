"""A run of several processes, one per host or per share of its devices.

Every process is started by the same command. What that starts in each is a supervisor, which holds
no device and runs the stages one after another as processes of their own: pretrain in all, joined
by jax.distributed; the other stages on process 0 alone, with its own devices. The folder of the run
is shared by all, and process 0 alone writes to it (orbax writes each process's part of a
checkpoint). Where something breaks the whole job ends, and the same command goes on from the last
checkpoint, on any number of processes.
"""

import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from etils import epath

from jax_cl_bd.errors import UserError

POISON_SECONDS = 3600  # that the others wait for process 0 to poison
JOIN_SECONDS = 900  # that a process waits for the others to join, of which one may still be started
HEARTBEAT_SECONDS = 60  # without a sign of life, after which a process is given up
ALONE = ("--processes=1", "--config.mesh.data=-1", "--config.mesh.fsdp=1")
# Of clusters, in the order in which jax looks for them: how many processes there are, which this
# is, and from what jax learns where the others are. Open MPI 5 no longer sets the last.
CLUSTERS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"),
            ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"))


@dataclasses.dataclass(frozen=True)
class Job:
    """Several processes of one run. `coordinator`: HOST:PORT, or None where jax finds it."""

    processes: int
    process_id: int
    coordinator: str | None


def find(coordinator: str | None, processes: int | None, process_id: int | None,
         environ: Mapping[str, str] = os.environ) -> Job | None:
    """The job of this process, by flags or by what a cluster says; None if it is alone.

    Clusters: Open MPI up to version 4, a SLURM step of several tasks, TPU workers of GKE, in one
    slice or several, and a slice of TPU VMs.

    Raises:
        UserError: some of the flags without the others, or numbers that do not fit; or a cluster
            that does not say where the others are.
    """
    if processes == 1 and coordinator is None and process_id in (None, 0):
        return None
    given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{' and '.join(missing)} missing: a job of several processes needs "
                        "--coordinator=HOST:PORT, --processes=N and --process_id=I in each")
    if not missing:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator={coordinator!r} must be HOST:PORT, of process 0")
        if processes < 1 or not 0 <= process_id < processes:
            raise UserError(f"--process_id={process_id} must be in 0..{processes - 1}, of "
                            f"--processes={processes}")
        return Job(processes, process_id, coordinator) if processes > 1 else None
    for size, rank, others in CLUSTERS:
        if size in environ and rank in environ and int(environ[size]) > 1:
            if others not in environ:
                hint = " (Open MPI 5 does not)" if size.startswith("OMPI") else ""
                raise UserError(f"{size}={environ[size]}, but {others}, from which jax learns where"
                                f" the others are, is not set{hint}: give "
                                f"--coordinator=HOST:PORT --processes={environ[size]} "
                                f"--process_id=${rank} in each, or --processes=1 to run alone")
            return Job(int(environ[size]), int(environ[rank]), None)
    if "TPU_WORKER_HOSTNAMES" in environ and "TPU_WORKER_ID" in environ:
        workers = len(environ["TPU_WORKER_HOSTNAMES"].split(","))
        count = workers * int(environ.get("MEGASCALE_NUM_SLICES", 1))
        rank = workers * int(environ.get("MEGASCALE_SLICE_ID", 0)) + int(environ["TPU_WORKER_ID"])
        return Job(count, rank, None) if count > 1 else None
    return _of_tpu_vm() if on_tpu() and environ is os.environ else None


def on_tpu() -> bool:
    """Says whether this machine has TPUs that this installation can use."""
    chips = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None


def _of_tpu_vm() -> Job | None:
    """What the metadata server of Google's cloud says of a slice of TPU VMs."""
    try:
        workers = len(_metadata("worker-network-endpoints").split(","))
        return Job(workers, int(_metadata("agent-worker-number")), None) if workers > 1 else None
    except (OSError, ValueError):
        return None


def _metadata(name):
    address = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        return answer.read().decode()


def supervise(job: Job, argv: list[str], stages: list[str], force: str | None,
              folder: epath.Path, *, has_victim: bool = False) -> int:
    """Runs the stages of a job, each in a process of its own; gives the exit status.

    All settings are checked first, in every process, on its CPU: as many processes as a host has
    GPUs would each open all of them. On TPUs process 0 runs the stages of its own on the CPU of its
    host, since a slice is opened by all of its hosts or by none.

    Args:
        argv: the command line's flags without --stages, --force and those of `find`.
        folder: the run's.
        has_victim: another run's victim is taken, so nothing is poisoned and pretrained.
    """
    made_before = _time_of_poisons(folder) if job.process_id and force == "poison" else None
    everything = [*argv, f"--stages={','.join(stages)}", *ALONE]
    everything += [f"--force={force}"] if force else []
    if status := _child([*everything, "--check_only"], on_cpu=True):
        return status
    apart = [] if has_victim else [s for s in ("poison", "pretrain") if s in stages]
    turns = [[s] for s in apart]
    turns += [rest] if (rest := [s for s in stages if s not in apart]) else []
    for number, turn in enumerate(turns):
        own = [*argv, f"--stages={','.join(turn)}"]
        # Until it is redone, what is to be redone may have been made with other settings.
        own += [f"--force={force}"] if any(force in t for t in turns[number:]) else []
        if turn == ["pretrain"] and apart:
            if job.process_id and "poison" in stages:
                _wait_for_poisons(folder, made_before)
            status = _child([*own, "--joined", *_who(job)], on_cpu=False)
        else:
            status = 0 if job.process_id else _child([*own, *ALONE], on_cpu=on_tpu())
        if status:
            return status
    return 0


def _who(job):
    """What tells a process of a job which it is, unless a cluster does."""
    return [] if job.coordinator is None else [
        f"--coordinator={job.coordinator}", f"--processes={job.processes}",
        f"--process_id={job.process_id}"]


def _time_of_poisons(folder):
    """When they were marked complete; None if they are not."""
    try:
        return (folder / "poison" / "done.json").stat().mtime
    except FileNotFoundError:
        return None


def _wait_for_poisons(folder, made_before):
    """Waits until process 0 has poisoned. Raises RuntimeError if that takes too long.

    `made_before`: where they are made anew, when those were marked that this process found at its
    start. Were it only a short while ago, they may be the new ones, of a process 0 that was started
    earlier; and if they are not, that while is left for joining.
    """
    begun, old = time.monotonic(), made_before
    if old is not None and time.time() - old < JOIN_SECONDS:
        old = None
    while (made := _time_of_poisons(folder)) is None or made == old:
        if time.monotonic() - begun > POISON_SECONDS:
            raise RuntimeError(f"process 0 has not poisoned within {POISON_SECONDS / 60:.0f} "
                               f"minutes ({folder / 'poison' / 'done.json'} is "
                               f"{'not there' if made is None else 'still the old one'})")
        time.sleep(1)


def _child(argv: list[str], *, on_cpu: bool) -> int:
    """Runs the command line in a process of its own, passing on SIGTERM and SIGINT.

    It has a process group of its own, so that Ctrl-C reaches it once, and ends with this one.
    """
    env = os.environ | ({"JAX_PLATFORMS": "cpu"} if on_cpu else {})
    child = subprocess.Popen([sys.executable, "-m", "jax_cl_bd", *argv], process_group=0, env=env,
                             preexec_fn=_end_with_parent if sys.platform == "linux" else None)
    before = {s: signal.signal(s, lambda number, frame: child.send_signal(number))
              for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def join(job: Job) -> None:
    """Joins the processes of a job.

    Raises:
        RuntimeError: they do not find one another.
    """
    import jax

    where = {} if job.coordinator is None else {
        "coordinator_address": job.coordinator, "num_processes": job.processes,
        "process_id": job.process_id}
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from train.fit
    try:
        jax.distributed.initialize(**where, initialization_timeout=JOIN_SECONDS,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                                   shutdown_timeout_seconds=HEARTBEAT_SECONDS)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(f"process {job.process_id} of {job.processes} did not find the others"
                           f"{f' at {job.coordinator}' if job.coordinator else ''}: "
                           f"{str(error).splitlines()[0]}") from None


def is_writer() -> bool:
    """Says whether this process writes to the run folder and reports progress."""
    import jax

    return jax.process_index() == 0


def wait(what: str) -> None:
    """Waits until all processes are here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def of_writer(value: int) -> int:
    """What process 0 says, in all of them."""
    return int(_gathered(value)[0])


def any_of(value: bool) -> bool:
    """Whether it is true in one of the processes; the same answer in all."""
    return bool(_gathered(value).any())


def _gathered(value):
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    value = np.asarray(value, np.int32)
    return value[None] if jax.process_count() == 1 else multihost_utils.process_allgather(value)


def check_alike(facts: dict[str, Any]) -> None:
    """Refuses a job whose processes were started with other settings or see other data.

    Args:
        facts: what must be equal in all, by name; JSON.

    Raises:
        UserError: naming what differs, and in which processes.
    """
    for name, fact in facts.items():
        digest = hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest()[:4]
        found = _gathered(int.from_bytes(digest, "big") >> 1)
        others = [i for i, value in enumerate(found) if value != found[0]]
        if others:
            raise UserError(f"the {name} of process{'es' * (len(others) > 1)} "
                            f"{', '.join(map(str, others))} differ from those of process 0; start "
                            "all processes with the same command, over the same data")
