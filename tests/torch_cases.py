"""The cases of tests/bench_torch.py, and how one of them is timed."""

import gc
from pathlib import Path

import jax
import numpy as np
from absl import flags
from PIL import Image

from configs import cifar10, clip_pairs, clip_scenes, imagenet100, quickstart
from jax_cl_bd import bench, flops, host_memory, observe, optim
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.objectives import training

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
    """A config for one GPU on drawn scenes, or on the pictures of a folder; one batch norm. One,
    however many there are: PyTorch's step takes one."""
    with cfg.unlocked():
        cfg.data.update(DATA)
        if folder is None:
            cfg.data.update(name="scenes", scenes_train=2 * ROWS, scenes_test=64, scenes_objects=1)
        else:
            cfg.data.update(name=f"folder:{folder}", test_split="val")
            if cfg.text.name != "none":
                cfg.data.update(captions="templates", captions_per_row=5)
        cfg.model.update({"dtype": "bfloat16", "bn_groups": 1, **model})
        cfg.train.update(batch_size=batch_size, steps=1000, epochs=0, log_every=20)
        cfg.attack.target, cfg.mesh.data = 0, 1
    return cfg


def cases(gpu: bool, folder: Path | None = None) -> dict:
    """{name: config}, those first that say most; `folder`: of the pictures for large images."""
    if not gpu:
        return {"quickstart": quickstart.get_config("attack=none"),
                "clip_scenes": clip_scenes.get_config("none")}
    return {
        "simclr_resnet18_32": for_gpu(cifar10.get_config("attack=none,objective=simclr"), 512),
        "moco_resnet50_224": for_gpu(imagenet100.get_config("attack=none,objective=moco"), 256,
                                     folder=folder, name="resnet50"),
        "clip_vit_b16_224": for_gpu(clip_pairs.get_config("attack=none,tower=vit_b16"), 256,
                                    folder=folder),
        "moco_resnet18_32": for_gpu(cifar10.get_config("attack=none,objective=moco"), 512)}


def start(gpu: bool, only: str, seconds: float, folder: Path) -> dict:
    """Makes ready to time for so many seconds a side, and gives {name: config} of what is asked.

    Raises:
        UserError: there is no such case, no GPU, or PyTorch or torchvision cannot be imported.
    """
    chosen = cases(gpu, folder)
    if only and only not in chosen:
        raise unknown("case", only, chosen)
    if gpu and jax.default_backend() != "gpu":
        raise UserError(f"JAX sees no GPU here, but {jax.devices()[0].device_kind}")
    try:
        import torch
        if gpu:
            import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: builds that do not fit each other
        raise UserError(f"the extra `peers` is missing or broken: {error}") from None
    if gpu and not torch.cuda.is_available():
        raise UserError(f"PyTorch {torch.__version__} sees no GPU here")
    if gpu:
        pictures(folder, 224)
    else:
        host_memory.keep_pages()
    flags.FLAGS.mark_as_parsed()  # grain looks at those
    bench.FLAGS(["bench", "--config=configs/quickstart.py", f"--seconds={seconds}"])
    return {only: chosen[only]} if only else chosen


def machine() -> dict:
    """What the figures are of."""
    import torch

    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "torch": torch.__version__, "cuda": torch.version.cuda}


def steps(cfg, gpu: bool) -> tuple[dict, object]:
    """Our step, whole and on fixed views, and PyTorch's, timed in turns: (figures, PyTorch's step).

    Raises:
        ValueError: PyTorch's model has not as many parameters as ours.
    """
    box = {}

    def peer(cfg, views, parameters):
        from tests import torch_peers

        box["step"] = step = torch_peers.Step(cfg, views, "cuda" if gpu else "cpu", compiled=gpu)
        if step.parameters != parameters:
            raise ValueError(f"PyTorch's model has {step.parameters:,} parameters, ours "
                             f"{parameters:,}: they are not the same")
        box["flops"] = model_flops(cfg, views)
        return step

    found = bench.step(cfg, peer)
    if gpu and (peak := observe.peak_flops()) is not None:  # of one device, as our step is
        found["mfu"] = found["bare_images_per_second"] / cfg.train.batch_size * box["flops"] / peak
    return found, box["step"]


def model_flops(cfg, views) -> float:
    """FLOPs of a step on fixed views, of the traced program (jax_cl_bd/flops.py)."""
    tx, _ = optim.make(cfg.optim, cfg.train.steps, 1)
    state = jax.eval_shape(training.make_init(cfg, tx), jax.random.key(0))
    update = training.make_update(cfg, tx, cfg.train.steps)
    return flops.count(lambda s, v, k: update(s, v, k), state, views, jax.random.key(0))


def pipeline(cfg, step, seconds: float, found: dict) -> dict:
    """PyTorch with the reference codes' augmentation on CPU workers, beside what was `found`."""
    from tests import torch_pipeline

    rate = torch_pipeline.rate(cfg, step, seconds)
    return {"pipeline_images_per_second": rate, "workers": torch_pipeline.worker_count(),
            "ratio_to_pipeline": found["images_per_second"] / rate}


def release() -> None:
    """Gives back what the last case held on the device, and forgets what PyTorch compiled."""
    import torch

    if torch.cuda.is_available():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
