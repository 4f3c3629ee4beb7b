"""Kills and signals: what is finished is kept, and the same command goes on.

A full disk: test_full_disk.py.
"""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from jax_cl_bd import run_folder, stages
from jax_cl_bd.data.images import CorruptRow
from jax_cl_bd.errors import UserError
from jax_cl_bd.train import NonFinite
from tests.command_line import BASE, ROOT, command, quickstart


@pytest.mark.parametrize("error, ends", [
    (OSError("no route"), "the same command goes on where it stopped"),
    (CorruptRow(3, "a.png", "cut short"), "--config.data.skip_corrupt=True"),
    (NonFinite("lower optim.lr"), "lower optim.lr")])
def test_the_way_on_is_the_errors_own(error, ends):
    assert stages.explain(error).endswith(ends)


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_trained_again(tmp_path, capsys):
    folder = epath.Path(tmp_path / "run")
    cfg = quickstart(**{"defense.name": "none", "mesh.data": 1, "train.save_every": 1})
    stages.run(cfg, folder, ["poison", "pretrain", "evaluate"])
    results = run_folder.read_json(folder / "results.json")
    assert results["run"]["steps"] == {"victim": 2, "control": 2, "untrained": 0}
    assert results["run"]["control"] is None  # its own twin
    weights = weights_of(folder)
    (folder / "checkpoints" / "2" / "digests.json").unlink()
    with pytest.raises(UserError, match="to step 2.*of step 1.*--stages=pretrain"):
        weights_of(folder)
    cfg.evals.fraction = 0.5
    with pytest.raises(UserError, match="evaluate needs the pretrain stage"):
        stages.run(cfg, folder, ["evaluate"], "evaluate")
    assert "damaged" in capsys.readouterr().err
    weights_of(folder)
    assert "not complete; this is its encoder of step 1" in capsys.readouterr().err
    cfg.evals.fraction = 1.0
    stages.run(cfg, folder, ["pretrain", "evaluate"])
    for before, after in zip(weights, weights_of(folder)):
        np.testing.assert_array_equal(before, after)
    assert run_folder.read_json(folder / "results.json")["victim"] == results["victim"]


def test_sigterm_outside_training_says_how_to_go_on(tmp_path):
    code = ("import signal, sys, os, runpy, types; "
            "kill = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
            "sys.modules['jax_cl_bd.stages'] = types.SimpleNamespace("
            "with_victim=lambda cfg: cfg, check=lambda *_: None, run=kill); "
            f"sys.argv = ['jax_cl_bd', {BASE[0]!r}, '--workdir={tmp_path}', '--stages=report']; "
            "runpy.run_module('jax_cl_bd', run_name='__main__')")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                             timeout=120)
    assert process.returncode == 143, process.stderr
    assert process.stderr == "stopped by SIGTERM; the same command goes on where it stopped\n"


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_with_130(tmp_path):
    process = command(*LONG, f"--workdir={tmp_path}")
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in out, (out, err)
    assert "Traceback" not in err


LONG = [*BASE, "--stages=poison,pretrain,evaluate", "--config.control=False",
        "--config.train.steps=60", "--config.train.save_every=5", "--config.train.log_every=1",
        "--config.train.eval_every=20"]


def finish(folder):
    process = command(*LONG, f"--workdir={folder}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines_of(folder):
    lines = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "feed_wait")}
            for line in lines]


def weights_of(folder):
    from jax_cl_bd.models import encoder

    encoded = encoder.load(folder).variables
    import jax

    return jax.tree.leaves(encoded)


@pytest.mark.slow
def test_kill_9_then_the_same_command_gives_the_same_bits(tmp_path):
    finish(tmp_path / "whole")
    killed = command(*LONG, f"--workdir={tmp_path}/killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 22):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "pretrain" / "done.json").exists()
    assert "going on from step" in finish(tmp_path / "killed")

    for whole, resumed in zip(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")):
        np.testing.assert_array_equal(whole, resumed)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")
    results = [json.loads((tmp_path / run / "results.json").read_text())
               for run in ("whole", "killed")]
    for result in results:
        del result["run"]
    assert results[0] == results[1]
