"""What a run says while it works."""

import sys
import types

from etils import epath

from jax_cl_bd import metrics


def test_tensorboard_is_told_which_steps_come_again(tmp_path, monkeypatch):
    opened = []
    fake = types.SimpleNamespace(SummaryWriter=lambda folder, **given: opened.append(given))
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    metrics.Writer(epath.Path(tmp_path), 40)
    assert opened == [{"purge_step": 41}]


def test_progress_has_no_rate_before_the_first_step(capsys):
    progress = metrics.Progress("evaluate", 3, seconds=0)
    progress.update(0, "knn, 512 images encoded")
    progress.update(1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "evaluate: 0/3  knn, 512 images encoded"
    assert second.startswith("evaluate: 1/3 (") and "left)" in second
