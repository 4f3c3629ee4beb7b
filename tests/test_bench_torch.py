"""The PyTorch peers are the same models, they train, and no figure of a benchmark gets lost."""

import json
import pickle
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import cifar10, clip_pairs, clip_scenes, imagenet100, quickstart
from jax_cl_bd import optim, poison, pretrain
from jax_cl_bd.data import sources, texts
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import training
from tests import bench_torch, torch_cases


def small(cfg):
    """The same kinds of layers in the same order, narrow."""
    cfg.train.update(batch_size=8, steps=10)
    cfg.optim.warmup_steps = 0
    cfg.model.dtype = "float32"
    if cfg.model.name == "vit":
        cfg.model.update(width=32, layers=2, heads=2)
        cfg.text.update(width=32, layers=2, heads=2, vocab=50, context=8, dtype="float32")
    else:
        cfg.model.width = 8
    return cfg


CASES = {
    "quickstart": lambda: small(quickstart.get_config("attack=none")),
    "clip_scenes": lambda: small(clip_scenes.get_config("none")),
    "simclr_18": lambda: small(cifar10.get_config("attack=none,objective=simclr")),
    "moco_50": lambda: small(torch_cases.for_gpu(
        imagenet100.get_config("attack=none,objective=moco"), 8, name="resnet50")),
    "clip_vit": lambda: small(torch_cases.for_gpu(
        clip_pairs.get_config("attack=none,tower=vit_b16"), 8))}


@pytest.mark.parametrize("case", CASES)
def test_a_peer_has_our_parameters_and_learns(case):
    torch = pytest.importorskip("torch")
    from tests import torch_peers

    torch.manual_seed(0)
    cfg = CASES[case]()
    cfg.data.image_size = 32
    if case == "simclr_18":  # 0.5 is of large batches: here the loss would fall by luck
        cfg.optim.lr = 0.03
    tx, _ = optim.make(cfg.optim, 10, 1)
    state = jax.eval_shape(training.make_init(cfg, tx), jax.random.key(0))
    rng = np.random.default_rng(0)
    views = {name: rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
             for name in ("view1", "view2")}
    views["tokens"] = rng.integers(2, 20, (8, cfg.text.get("context", 8))).astype(np.int32)
    step = torch_peers.Step(cfg, views, "cpu", compiled=False)
    assert step.parameters == sum(x.size for x in jax.tree.leaves(state.params))
    if case.startswith("moco"):  # its keys become negatives: the loss need not fall at once
        queue, key = step.model.queue.clone(), next(step.model.keys.parameters()).clone()
        jax.block_until_ready(step())
        assert (step.model.queue != queue).any(1).sum() == 8
        assert (next(step.model.keys.parameters()) != key).any()
        return
    first = step.loss(*step.views).item()
    for _ in range(10):
        jax.block_until_ready(step())
    assert step.loss(*step.views).item() < first - 0.1


def test_the_cases_of_a_gpu_are_good_settings(tmp_path):
    torch_cases.pictures(tmp_path, 40, 300)
    chosen = torch_cases.cases(True, tmp_path)
    assert len(chosen) == 4
    for cfg in chosen.values():
        cfg.data.scenes_train = 600
        source = sources.load(cfg.data, "train")
        poison.check(cfg, sources.table(source), source.classes)
        pretrain.check(cfg, len(source))
        if cfg.text.name != "none":
            texts.check(cfg, source)
        assert cfg.model.dtype == "bfloat16" and cfg.mesh.data == cfg.mesh.fsdp == 1


def test_the_table_leaves_out_what_nobody_measured():
    rows = [{"case": "a", "batch_size": 64, "ratio": 0.951, "images_per_second": 12345.6},
            {"case": "failed"}]
    assert bench_torch.table(rows).splitlines() == [
        "| case | batch | whole step, images/s | whole / fixed |", "| --- | --- | --- | --- |",
        "| a | 64 | 12,346 | 0.951 |", "| failed |  |  |  |"]


def options(tmp_path, **changed):
    return types.SimpleNamespace(**{"gpu": True, "seconds": 1.0, "budget": 100.0,
                                    "json": str(tmp_path / "found.json"), **changed})


def captioned(name):
    return types.SimpleNamespace(text=types.SimpleNamespace(name=name))


CHOSEN = {"images": captioned("none"), "pairs": captioned("transformer")}


@pytest.fixture
def made_up(monkeypatch):
    """Cases that need neither PyTorch nor time."""
    monkeypatch.setattr(torch_cases, "release", lambda: None)
    monkeypatch.setattr(torch_cases, "steps", lambda cfg, gpu: ({"images_per_second": 6.0}, None))
    monkeypatch.setattr(torch_cases, "pipeline",
                        lambda cfg, step, seconds, found: {"ratio_to_pipeline": 3.0})


def test_a_row_is_printed_and_written_as_soon_as_it_is_there(tmp_path, made_up, capsys,
                                                             monkeypatch):
    seen = []

    def steps(cfg, gpu):
        found = tmp_path / "found.json"
        seen.append((json.loads(found.read_text())["rows"] if found.exists() else [],
                     len(capsys.readouterr().out.splitlines())))
        return {"images_per_second": 6.0}, None

    monkeypatch.setattr(torch_cases, "steps", steps)
    rows = bench_torch.run(CHOSEN, {"device": "x"}, options(tmp_path), time.monotonic())
    assert rows == [{"case": "images", "images_per_second": 6.0, "ratio_to_pipeline": 3.0},
                    {"case": "pairs", "images_per_second": 6.0}]
    assert seen == [([], 0), (rows[:1], 2)]  # one line before the pipeline, one with it
    assert json.loads((tmp_path / "found.json").read_text()) == {"device": "x", "rows": rows}


def test_an_error_leaves_the_figures_of_its_case_and_of_others(tmp_path, made_up, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch_cases, "pipeline", full)
    rows = bench_torch.run(CHOSEN, {}, options(tmp_path), time.monotonic())
    assert rows == [{"case": "images", "images_per_second": 6.0,
                     "error": "OSError: No space left on device"},
                    {"case": "pairs", "images_per_second": 6.0}]
    assert json.loads((tmp_path / "found.json").read_text()) == {"rows": rows}


def test_what_the_budget_leaves_out_is_named(tmp_path, made_up, monkeypatch):
    clock = [0.0]

    def steps(cfg, gpu):
        clock[0] += 60.0
        return {"images_per_second": 6.0}, None

    monkeypatch.setattr(bench_torch, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(torch_cases, "steps", steps)
    rows = bench_torch.run(CHOSEN, {}, options(tmp_path, budget=60.0), 0.0)
    assert rows == [{"case": "images", "images_per_second": 6.0, "skipped": "pipeline"},
                    {"case": "pairs", "skipped": "case"}]


def test_another_model_than_ours_is_an_error_of_its_case(monkeypatch):
    pytest.importorskip("torch")
    from tests import torch_peers

    monkeypatch.setattr(torch_peers, "Step", lambda *_, **__: types.SimpleNamespace(parameters=7))
    monkeypatch.setattr(torch_cases.bench, "step", lambda cfg, peer: peer(cfg, {}, 8))
    with pytest.raises(ValueError, match="has 7 parameters, ours 8"):
        torch_cases.steps(None, False)


@pytest.mark.parametrize("only, message", [("quikstart", "did you mean 'quickstart'"),
                                           ("", "sees no GPU here, but cpu")])
def test_what_cannot_be_timed_is_refused(only, message, tmp_path):
    with pytest.raises(UserError, match=message):
        torch_cases.start(not only, only, 1.0, tmp_path)


def test_workers_import_no_jax():
    """They import the main file and that of the pipeline."""
    files = ["tests.bench_torch"]
    if all(map(importable, ("torch", "torchvision"))):
        files.append("tests.torch_pipeline")
    code = f"import sys, {', '.join(files)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300,
                          cwd=Path(__file__).parents[1]).returncode == 0


def importable(name):
    try:
        __import__(name)
    except (ImportError, RuntimeError):
        return False
    return True


@pytest.fixture
def pipeline():
    if not importable("torch") or not importable("torchvision"):
        pytest.skip("no torchvision that fits")
    from tests import torch_pipeline

    return torch_pipeline


def views_of(side):
    cfg = torch_cases.for_gpu(imagenet100.get_config("attack=none,objective=moco"), 8)
    cfg.data.image_size = side
    return cfg


def test_views_of_the_reference_pipeline(pipeline):
    views = pipeline.Views(views_of(48))
    assert len(pickle.dumps(views)) < 10_000  # what a worker is sent
    one, two = views[3]
    assert one.shape == two.shape == (3, 48, 48) and not (one == two).all()


def test_the_pipeline_is_timed_when_it_has_settled(pipeline, monkeypatch):
    """What workers make before the clock starts is dropped; every batch reaches the step whole."""
    taken, steps = [], []
    size = (4, 3, 24, 24)

    def parts():
        while True:
            taken.append(1)
            yield pipeline.torch.zeros(size), pipeline.torch.ones(size)

    class Step:
        device = "cpu"

        def __call__(self, view1, view2):
            assert view1.shape == view2.shape == (8, *size[1:])
            assert view1.is_contiguous(memory_format=pipeline.torch.channels_last)
            assert not view1.any() and view2.all()
            steps.append(len(taken))
            time.sleep(0.05)
            return self

        def block_until_ready(self):
            pass

    monkeypatch.setattr(pipeline, "worker_count", lambda: 3)
    monkeypatch.setattr(pipeline, "part_size", lambda *_: 4)
    monkeypatch.setattr(pipeline, "loader", lambda cfg, workers, part: parts())
    found = pipeline.rate(views_of(24), Step(), 0.3)
    assert steps[:3] == [2, 2 + 3 * 2 + 2, 2 + 3 * 2 + 4]
    assert 0 < found <= 8 / 0.05


@pytest.mark.parametrize("batch, free, part", [(256, 2**40, 32), (100, 2**40, 25),
                                               (256, 500 * 2**20, 4), (6, 2**40, 6)])
def test_parts_that_fit_shared_memory(pipeline, batch, free, part):
    assert pipeline.part_size(batch, 224, 16, free) == part


def test_shared_memory_that_holds_nothing_is_an_error(pipeline):
    with pytest.raises(ValueError, match="/dev/shm has 1,000 bytes left"):
        pipeline.part_size(256, 224, 16, 1000)


def test_jax_and_pytorch_share_one_cuda():
    root = Path(__file__).parents[1]
    assert '"jax[cuda13]' in (root / "pyproject.toml").read_text()
    assert "cu12" not in (pins := (root / "constraints.txt").read_text())
    assert "cuda12" not in pins and "\nnvidia-cudnn-cu13==" in pins
