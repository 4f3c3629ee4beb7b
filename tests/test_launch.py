"""The launch scripts print, with DRY_RUN=1, commands whose configs exist."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"layout_law.sh": 24, "cifar10_reduced.sh": 16, "clip_defenses.sh": 444}


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
    made = {}  # folder -> config of every victim
    for words in commands(script):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
        cfg = config_of(words)
        given, victim = flags.get("config.control_from", ""), flags.get("config.victim", "")
        if victim:  # of an earlier line, whose control the defense is measured against
            assert victim in made and flags["stages"] == "defend,report", words
            assert given in trained if given else victim in trained, words
            assert cfg.defense.name != "none" and flags["workdir"] not in made, words
            continue
        made[flags["workdir"]] = cfg
        if given:
            assert given in trained, words
            assert [cfg[name] for name in TWIN] == [trained[given][name] for name in TWIN]
        else:
            assert flags.get("config.control", str(cfg.control)) == "True", words
            trained[flags["workdir"]] = cfg
    assert trained


def test_the_parts_of_the_defenses_make_the_whole():
    whole = commands("clip_defenses.sh")
    parts = [commands("clip_defenses.sh", part)
             for part in ("victims", "repair", "baselines", "limits")]
    assert sum(parts, []) == whole and [len(part) for part in parts] == [24, 66, 312, 42]
    folders = [words[4] for words in whole]
    assert len(set(folders)) == len(folders)
    for words in whole:
        first = words[4].startswith("--workdir") and "_0-" in words[4]
        rates = [w for w in words if w.startswith("--config.defense.rates=")]
        config = config_of(words)
        assert rates == ([] if first or "rates" not in config.defense
                         else ["--config.defense.rates=(0.001,0.003)"]), words
        assert "--config.evals.other_test_split=shifted" in words
    poisons = [words for words in whole if "_1_" in words[4] and "--stages=defend,report" not in
               words]
    assert all("--config.attack.poisons=80" in words for words in poisons) and len(poisons) == 8
    clean = [words for words in whole if "/none_" in words[4] and "-" not in words[4][2:]]
    assert len({f for f in folders if "/badnets_4_" in f and "-" not in f[2:]}) + len(clean) >= 10


def test_an_unknown_part_is_refused():
    done = subprocess.run(["bash", "launch/clip_defenses.sh", "runs/x", "victim"], cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 2 and "unknown part victim" in done.stderr
