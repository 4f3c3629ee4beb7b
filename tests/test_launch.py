"""The launch scripts print, with DRY_RUN=1, commands whose configs exist."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"layout_law.sh": 24, "cifar10_reduced.sh": 16}


TWIN = ("seed", "data", "augment", "model", "objective", "optim", "train")  # what a twin shares


def commands(script, *flags):
    """What a script would run: words of each command."""
    printed = subprocess.run(["bash", f"launch/{script}", "runs/x", *flags], cwd=ROOT,
                             env={**os.environ, "DRY_RUN": "1"}, text=True, check=True,
                             capture_output=True).stdout
    return [shlex.split(line) for line in printed.splitlines()]


def config_of(words):
    """The config of a command, before its overrides."""
    path, _, arg = words[3].removeprefix("--config=").partition(":")
    spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("script", sorted(COUNTS))
def test_dry_run_prints_commands_that_parse(script):
    printed = commands(script, "--config.seed=1")
    assert len(printed) == COUNTS[script]
    for words in printed:
        assert words[:3] == ["python", "-m", "jax_cl_bd"] and "--config.seed=1" in words
        config_of(words)
    assert not (ROOT / "runs" / "x").exists()


def test_every_script_is_tested():
    assert {path.name for path in (ROOT / "launch").glob("*.sh")} == set(COUNTS)


@pytest.mark.parametrize("script", sorted(COUNTS))
def test_every_run_has_a_control(script):
    """Its own, or that of an earlier run with the same settings but the attack's."""
    trained = {}  # folder -> config of the run that trains a control there
    for words in commands(script):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
        cfg = config_of(words)
        given = flags.get("config.control_from", "")
        if given:
            assert given in trained, words
            assert [cfg[name] for name in TWIN] == [trained[given][name] for name in TWIN]
        else:
            assert flags.get("config.control", str(cfg.control)) == "True", words
            trained[flags["workdir"]] = cfg
    assert trained
