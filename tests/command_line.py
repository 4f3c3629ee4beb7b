"""The program as its tests call it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


BASE = ["--config=configs/quickstart.py:debug,defense=none"]


def command(*arguments, **changes):
    """Runs the program on one simulated device."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "jax_cl_bd", *arguments], cwd=ROOT, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **changes)


def refused(*arguments):
    process = command(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, (out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def quickstart(**changes):
    from configs import quickstart as experiment

    cfg = experiment.get_config("debug")
    cfg.update_from_flattened_dict(changes)
    return cfg
