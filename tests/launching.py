"""Helpers of the tests of launch/: no script of it is given jax, only programs made up here."""

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLICE = {"NAME": "pod", "ZONE": "us-west4-a", "TYPE": "v5litepod-16", "VERSION": "v2-alpha"}
JOBSET = {"NAME": "pod", "IMAGE": "repo/image", "NODES": "4"}
NOT_THE_CALLERS = ("SLURM", "XLA_FLAGS", "CUDA_VISIBLE", "JAX_COMPILATION", "TFDS_DATA_DIR",
                   "GPUS", "MOUNTS")
OWN = ("PYTHON", "DRY_RUN", "SEEDS", "ATTACKS", "SHARES", "RATES", "NUMBERS", "NAME", "ZONE",
       "PROJECT", "CLUSTER", "TYPE", "VERSION", "IMAGE", "BUILD", "NODES", "TPU", "GPU", "TOPOLOGY",
       "PROCESSES", "DEVICES", "PORT")
FLAG = "--config.name=it's a test"  # a quote and spaces, as paths may have them


PROGRAM = ["-m", "jax_cl_bd", "--config=configs/a.py", "--workdir=runs/a b", FLAG]


def callers_environment():
    """The environment, without what launchers read from it."""
    return {k: v for k, v in os.environ.items()
            if k not in OWN and not k.startswith(NOT_THE_CALLERS)}


def launch(script, *words, path=None, **environment):
    """Runs a script of launch/, as the head of a process group; `path`: where its programs are
    looked for first."""
    kept = callers_environment()
    if path is not None:
        kept["PATH"] = f"{path}:{kept['PATH']}"
    return subprocess.run(["bash", f"launch/{script}", *map(str, words)], cwd=ROOT, text=True,
                          env={**kept, **environment}, capture_output=True, timeout=60,
                          start_new_session=True)


def dry(script, *words, **more):
    """The commands of a dry run, each as its words; it must have ended well."""
    done = launch(script, *words, DRY_RUN="1", **more)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def program(folder, name, text):
    """Makes a program for the shell."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder / name
