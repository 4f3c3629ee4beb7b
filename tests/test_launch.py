"""The launch scripts print, with DRY_RUN=1, commands whose configs exist."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"layout_law.sh": 24, "cifar10_reduced.sh": 16}


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh")))
def test_dry_run_prints_commands_that_parse(script):
    printed = subprocess.run(["bash", f"launch/{script}", "runs/x", "--config.seed=1"], cwd=ROOT,
                             env={**os.environ, "DRY_RUN": "1"}, text=True, check=True,
                             capture_output=True).stdout.splitlines()
    assert len(printed) == COUNTS[script]
    for line in printed:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "jax_cl_bd"] and "--config.seed=1" in words
        path, _, arg = words[3].removeprefix("--config=").partition(":")
        spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.get_config(arg)
    assert not (ROOT / "runs" / "x").exists()
