"""The PyTorch peers of the benchmark are the same models, and they train."""

import jax
import numpy as np
import pytest

from configs import cifar10, clip_pairs, clip_scenes, imagenet100, quickstart
from jax_cl_bd import optim, poison, pretrain
from jax_cl_bd.data import sources, texts
from jax_cl_bd.objectives import training
from tests import bench_torch


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
    "moco_50": lambda: small(bench_torch.for_gpu(
        imagenet100.get_config("attack=none,objective=moco"), 8, name="resnet50")),
    "clip_vit": lambda: small(bench_torch.for_gpu(
        clip_pairs.get_config("attack=none,tower=vit_b16"), 8))}


@pytest.mark.parametrize("case", CASES)
def test_a_peer_has_our_parameters_and_learns(case):
    torch = pytest.importorskip("torch")
    from tests import torch_peers

    torch.manual_seed(0)
    cfg = CASES[case]()
    cfg.data.image_size = 32
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
    bench_torch.pictures(tmp_path, 40, 300)
    chosen = bench_torch.cases(True, tmp_path)
    assert len(chosen) == 4
    for cfg in chosen.values():
        cfg.data.scenes_train = 600
        source = sources.load(cfg.data, "train")
        poison.check(cfg, sources.table(source), source.classes)
        pretrain.check(cfg, len(source))
        if cfg.text.name != "none":
            texts.check(cfg, source)
        assert cfg.model.dtype == "bfloat16" and cfg.mesh.data == -1


def test_the_table_leaves_out_what_nobody_measured():
    rows = [{"case": "a", "batch_size": 64, "ratio": 0.951, "images_per_second": 12345.6},
            {"case": "failed"}]
    assert bench_torch.table(rows).splitlines() == [
        "| case | batch | whole step, images/s | whole / fixed |", "| --- | --- | --- | --- |",
        "| a | 64 | 12,346 | 0.951 |", "| failed |  |  |  |"]


def test_views_of_the_reference_pipeline():
    pytest.importorskip("torchvision")
    from tests import torch_pipeline

    cfg = bench_torch.for_gpu(imagenet100.get_config("attack=none,objective=moco"), 8)
    cfg.data.image_size = 48
    one, two = torch_pipeline.Views(cfg)[3]
    assert one.shape == two.shape == (3, 48, 48) and not (one == two).all()
