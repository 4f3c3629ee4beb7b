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
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from jax_cl_bd.errors import UserError

WAIT_SECONDS = 3600  # for the other processes: process 0 poisons before it joins them
HEARTBEAT_SECONDS = 60  # without a sign of life, after which a process is given up
ALONE = ("--processes=1", "--config.mesh.data=-1", "--config.mesh.fsdp=1")
# Of clusters whose addresses jax finds itself: how many processes there are, and which this is.
CLUSTERS = (("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
            ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
            ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"))


@dataclasses.dataclass(frozen=True)
class Job:
    """Several processes of one run. `coordinator`: HOST:PORT, or None where jax finds it."""

    processes: int
    process_id: int
    coordinator: str | None


def find(coordinator: str | None, processes: int | None, process_id: int | None,
         environ: Mapping[str, str] = os.environ) -> Job | None:
    """The job of this process, by flags or by what a cluster says; None if it is alone.

    Clusters: a SLURM step of several tasks, Open MPI, TPU workers of GKE.

    Raises:
        UserError: some of the flags without the others, or numbers that do not fit.
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
    for size, rank in CLUSTERS:
        if size in environ and rank in environ:
            names = environ[size].split(",")
            count = int(names[0]) if names[0].isdigit() else len(names)
            if count > 1:
                return Job(count, int(environ[rank]), None)
    return None


def supervise(job: Job, argv: list[str], stages: list[str], force: str | None) -> int:
    """Runs the stages of a job, each in a process of its own; gives the exit status.

    Args:
        argv: the command line's flags without --stages, --force and those of `find`.
    """
    first = job.process_id == 0
    turns = [[s] for s in ("poison", "pretrain") if s in stages]
    turns += [rest] if (rest := [s for s in stages if s not in ("poison", "pretrain")]) else []
    for number, turn in enumerate(turns):
        later = [s for t in turns[number + 1:] for s in t]
        own = [*argv, f"--stages={','.join(turn)}"]
        own += [f"--force={force}"] if force in turn else []
        if turn == ["pretrain"]:
            own += ["--joined", f"--processes={job.processes}", f"--process_id={job.process_id}"]
            own += [f"--coordinator={job.coordinator}"] if job.coordinator else []
        elif first:
            own += [*ALONE, f"--also_check={','.join(later)}"]
        else:
            continue
        status = _child(own)
        if status:
            return status
    return 0


def _child(argv: list[str]) -> int:
    """Runs the command line in a process of its own, passing on SIGTERM and SIGINT.

    It has a process group of its own, so that Ctrl-C reaches it once, and ends with this one.
    """
    child = subprocess.Popen([sys.executable, "-m", "jax_cl_bd", *argv], process_group=0,
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
    try:
        jax.distributed.initialize(**where, initialization_timeout=WAIT_SECONDS,
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
