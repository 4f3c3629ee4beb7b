"""make bench-torch, make bench-gpu: our training step against PyTorch's of the same model.

    python -m tests.bench_torch [--gpu] [--only=CASE] [--seconds=N] [--json=FILE]

Each case times, in turns in one process, our whole step (feed, augmentation, update), our step on
fixed views, and PyTorch's step on the same views (tests/torch_peers.py), eager on a CPU, with
channels-last, bfloat16 autocast and torch.compile on a GPU; there also the pipeline of the
reference codes, whose workers augment on the CPU (torchvision) while the GPU trains. Data are
drawn scenes at 32 px and random pixels at 224, no attack; only shapes matter. Model FLOP
utilisation is of our step on fixed views.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from PIL import Image  # noqa: E402

from configs import cifar10, clip_pairs, clip_scenes, imagenet100, quickstart  # noqa: E402
from jax_cl_bd import bench, flops, host_memory, observe, optim  # noqa: E402
from jax_cl_bd.objectives import training  # noqa: E402

ROWS = 1024
DATA = dict(feed="resident", classes_file="", center_crop=False, captions="", train_split="train")


def pictures(folder: Path, side: int, rows: int = ROWS) -> None:
    """Random pixels as a labelled folder of two classes."""
    rng = np.random.default_rng(0)
    for i in range(rows + 2):
        place = folder / ("val" if i < 2 else "train") / ("cat", "dog")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        image.save(place / f"{i}.jpeg")


def for_gpu(cfg, batch_size, *, folder=None, **model):
    """A config for GPUs on drawn scenes, or on the pictures of a folder; one global batch norm."""
    with cfg.unlocked():
        cfg.data.update(DATA)
        if folder is None:
            cfg.data.update(name="scenes", scenes_train=2 * ROWS, scenes_test=64, scenes_objects=1)
        else:
            cfg.data.update(name=f"folder:{folder}", test_split="val")
            if cfg.text.name != "none":
                cfg.data.update(captions="templates", captions_per_row=5)
        cfg.model.update({"dtype": "bfloat16", "bn_groups": 1, **model})
        cfg.train.update(batch_size=batch_size, steps=1000, log_every=20)
        cfg.attack.target = 0
    return cfg


def cases(gpu: bool, folder: Path | None = None) -> dict:
    """{name: config}; `folder`: of the pictures for those with large images."""
    if not gpu:
        return {"quickstart": quickstart.get_config("attack=none"),
                "clip_scenes": clip_scenes.get_config("none")}
    return {
        "simclr_resnet18_32": for_gpu(cifar10.get_config("attack=none,objective=simclr"), 512),
        "moco_resnet18_32": for_gpu(cifar10.get_config("attack=none,objective=moco"), 512),
        "moco_resnet50_224": for_gpu(imagenet100.get_config("attack=none,objective=moco"), 256,
                                     folder=folder, name="resnet50"),
        "clip_vit_b16_224": for_gpu(clip_pairs.get_config("attack=none,tower=vit_b16"), 256,
                                    folder=folder)}


def peer_of(gpu: bool, box: dict):
    """What bench.step calls to make the rival."""
    def make(cfg, views, parameters):
        from tests import torch_peers

        step = torch_peers.Step(cfg, views, "cuda" if gpu else "cpu", compiled=gpu)
        if step.parameters != parameters:
            raise SystemExit(f"the peer has {step.parameters:,} parameters, our model has "
                             f"{parameters:,}: they are not the same")
        box["step"], box["flops"] = step, model_flops(cfg, views)
        return step
    return make


def model_flops(cfg, views) -> float:
    """FLOPs of a step on fixed views, of the traced program (jax_cl_bd/flops.py)."""
    tx, _ = optim.make(cfg.optim, cfg.train.steps, 1)
    state = jax.eval_shape(training.make_init(cfg, tx), jax.random.key(0))
    update = training.make_update(cfg, tx, cfg.train.steps)
    return flops.count(lambda s, v, k: update(s, v, k), state, views, jax.random.key(0))


def pipeline_rate(cfg, step, seconds: float) -> float:
    """Images per second of PyTorch with the reference codes' augmentation, on CPU workers."""
    from tests import torch_pipeline

    loader = torch_pipeline.loader(cfg)
    batches = iter(loader)
    step(*torch_pipeline.to_device(next(batches), step.device)).block_until_ready()
    count, begun = 0, time.perf_counter()
    for batch in batches:
        step(*torch_pipeline.to_device(batch, step.device))
        count += 1
        if time.perf_counter() - begun > seconds:
            break
    step.block_until_ready()
    return count * cfg.train.batch_size / (time.perf_counter() - begun)


def run(name, cfg, gpu, seconds) -> dict:
    """One row of the table."""
    box = {}
    found = {"case": name, **bench.step(cfg, peer_of(gpu, box))}
    if gpu:
        if (peak := observe.peak_flops()) is not None:
            rate = found["bare_images_per_second"] / cfg.train.batch_size
            found["mfu"] = rate * box["flops"] / peak
        if cfg.text.name == "none":  # CLIP's own image pipeline crops and no more
            found["pipeline_images_per_second"] = pipeline_rate(cfg, box["step"], seconds)
            found["ratio_to_pipeline"] = (found["images_per_second"]
                                          / found["pipeline_images_per_second"])
    return found


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = (("case", "case"), ("batch_size", "batch"),
               ("images_per_second", "whole step, images/s"),
               ("bare_images_per_second", "step on fixed views"), ("ratio", "whole / fixed"),
               ("peer_images_per_second", "PyTorch, fixed views"),
               ("ratio_to_peer", "ours / PyTorch"), ("mfu", "MFU"),
               ("pipeline_images_per_second", "PyTorch, CPU augmentation"),
               ("ratio_to_pipeline", "whole / that"))
    shown = [(key, title) for key, title in columns if any(key in row for row in rows)]

    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
        return "" if value is None else str(value)

    lines = [" | ".join(title for _, title in shown), " | ".join("---" for _ in shown),
             *(" | ".join(cell(row.get(key)) for key, _ in shown) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", default="", help="one case, by name")
    parser.add_argument("--seconds", type=float, default=10.0, help="of every side of a case")
    parser.add_argument("--json", default="", help="a file for all figures")
    args = parser.parse_args()
    folder = tempfile.TemporaryDirectory()
    chosen = cases(args.gpu, Path(folder.name))
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing; it comes with the extra `peers`")
    if args.only and args.only not in chosen:
        parser.error(f"unknown case {args.only!r}; one of {', '.join(chosen)}")
    if args.gpu and jax.default_backend() != "gpu":
        parser.error(f"JAX sees no GPU here, but {jax.devices()[0].device_kind}")
    if args.gpu:
        pictures(Path(folder.name), 224)
    flags.FLAGS.mark_as_parsed()  # grain looks at those
    bench.FLAGS(["bench", "--config=configs/quickstart.py", f"--seconds={args.seconds}"])
    host_memory.keep_pages()
    rows, failed = [], 0
    for name, cfg in chosen.items():
        if args.only in ("", name):
            begun = time.monotonic()
            try:
                rows.append(run(name, cfg, args.gpu, args.seconds))
            except Exception as error:  # one case must not take the others' figures along
                failed, rows = failed + 1, [*rows, {"case": name}]
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(rows, file, indent=2, default=np.ndarray.tolist)
    folder.cleanup()
    import torch
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}, torch "
          f"{torch.__version__}\n\n{table(rows)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
