"""What .ci/run asserts of the quickstart's results, on results that were made up."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / ".ci"
SPEC = importlib.util.spec_from_file_location("check_quickstart", CI / "check_quickstart.py")
check_quickstart = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_quickstart)


def rows(clean, rate, centre, excess):
    """An encoder's two rows of the linear probe."""
    found = {"linear_probe": {"clean_accuracy": clean, "attack_success_rate": rate,
                              "excess": excess},
             "linear_probe:center": {"clean_accuracy": clean, "attack_success_rate": centre,
                                     "excess": excess}}
    for row in found.values():
        row["intervals"] = {name: [value - 0.05, value + 0.05] for name, value in row.items()}
    return found


def results(*victim):
    other = rows(0.97, 0.01, 0.02, -0.01)
    distill = copy.deepcopy(other) | {"verdict": {}, "control": copy.deepcopy(other)}
    return {"victim": rows(*victim), "control": other, "untrained": copy.deepcopy(other),
            "defenses": {"distill": distill}}


GOOD = (0.966, 0.558, 0.949, 0.415)


def test_good_results_pass(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(*GOOD)))
    done = subprocess.run([sys.executable, CI / "check_quickstart.py", path], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout == "the quickstart shows what it must\n"
    path.write_text(json.dumps(results(0.966, 0.558, 0.14, 0.415)))
    assert subprocess.run([sys.executable, CI / "check_quickstart.py", path]).returncode == 1


@pytest.mark.parametrize("victim, fault", [
    ((0.89, 0.558, 0.949, 0.415), "clean accuracy is 0.890"),
    ((0.966, 0.1, 0.949, 0.01), "excess at random places is 0.010"),
    ((0.966, 0.558, 0.14, 0.415), "rate at the centre is 0.140")])
def test_a_figure_that_is_too_small_is_named(victim, fault):
    found = check_quickstart.faults(results(*victim))
    assert len(found) == 1 and fault in found[0]


@pytest.mark.parametrize("path", [
    ("victim",), ("control",), ("untrained",), ("defenses",), ("defenses", "distill"),
    ("defenses", "distill", "control"), ("victim", "linear_probe:center"),
    ("control", "linear_probe", "intervals"),
    ("defenses", "distill", "linear_probe", "intervals", "excess")])
def test_what_is_missing_is_named(path):
    broken = results(*GOOD)
    place = broken
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    assert check_quickstart.faults(broken)


def test_ci_runs_the_check_and_the_linter():
    text = (CI / "run").read_text()
    assert ".ci/check_quickstart.py runs/quickstart/results.json" in text and "make lint" in text
