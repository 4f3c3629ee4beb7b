"""The input pipeline of the reference codes: worker processes augment PIL images (torchvision).

For benchmarks alone. The recipe is that of cfg.augment.view1 in torchvision's own transforms, with
PIL's Gaussian blur as MoCo's code has it. Rows are random pixels of the config's image size, held
in memory, since only the work counts; reading and decoding, which those codes do too, is left out.
JAX is not imported here, so that no worker imports it; each draws its rows itself, from a seed.
"""

import functools
import os
import random
import shutil
import time

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as t

ROWS = 256
WORKERS = 16  # at most; one a core
PREFETCH = 1  # parts that a worker makes ahead
PART = 32  # images, at most; small parts come evenly and need little of /dev/shm
TIMEOUT = 120  # seconds for the first parts, or the workers are taken to hang


class Blur:
    """PIL's Gaussian filter, its radius drawn from a range."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


class Views(torch.utils.data.Dataset):
    """Two views of each image."""

    def __init__(self, cfg):
        self.side, view, steps = cfg.data.image_size, cfg.augment.view1, []
        steps.append(t.RandomResizedCrop(self.side, view.crop_scale, view.crop_ratio))
        if view.flip:
            steps.append(t.RandomHorizontalFlip(view.flip))
        if view.jitter:
            jitter = t.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
            steps.append(t.RandomApply([jitter], view.jitter))
        if view.grayscale:
            steps.append(t.RandomGrayscale(view.grayscale))
        if view.blur:
            steps.append(t.RandomApply([Blur(*view.blur_sigma)], view.blur))
        self.augment = t.Compose([*steps, t.ToTensor(),
                                  t.Normalize(cfg.data.mean, cfg.data.std)])

    @functools.cached_property
    def images(self):
        """Drawn at the first look, which is a worker's."""
        return np.random.default_rng(0).integers(0, 256, (ROWS, self.side, self.side, 3), np.uint8)

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.augment(image), self.augment(image)


def worker_count() -> int:
    """A worker for each core that this process may use, up to 16."""
    return min(WORKERS, len(os.sched_getaffinity(0)))


def part_size(batch_size: int, side: int, workers: int, free: int) -> int:
    """How many images a worker hands over at once: a divisor of the batch, at most 32, such that
    all that is under way fills at most half of the `free` bytes of /dev/shm.

    Raises:
        ValueError: not even single images fit.
    """
    image = 2 * 3 * side**2 * 4  # bytes of two float32 views
    under_way = workers * (PREFETCH + 1) + 2  # waiting, being made, and in the hands of the loader
    room = min(PART, free // (2 * under_way * image))
    if not room:
        raise ValueError(f"/dev/shm has {free:,} bytes left, too few for {workers} workers with "
                         f"images of {side} px")
    return max(n for n in range(1, room + 1) if batch_size % n == 0)


def loader(cfg, workers: int, part: int):
    """Endless parts of two views."""
    data = Views(cfg)
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that PyTorch is imported once, not by each
    endless = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**9)
    return torch.utils.data.DataLoader(
        data, part, sampler=endless, num_workers=workers, prefetch_factor=PREFETCH, drop_last=True,
        pin_memory=torch.cuda.is_available(), timeout=TIMEOUT, multiprocessing_context=context)


def to_device(parts, device):
    """One batch of both views of its parts, channels last."""
    return [torch.cat([view.to(device, non_blocking=True) for view in views])
            .contiguous(memory_format=torch.channels_last) for views in zip(*parts)]


def rate(cfg, step, seconds: float) -> float:
    """Images per second of `step` (torch_peers.Step) on batches that CPU workers augment.

    A steady state is timed: before the clock starts, the step has run, and as many parts have been
    taken and dropped as the workers can have made ahead (workers * (prefetch + 1)). Those that lie
    ready when the clock stops do not count; the last step has ended by then.
    """
    workers = worker_count()
    part = part_size(cfg.train.batch_size, cfg.data.image_size, workers,
                     shutil.disk_usage("/dev/shm").free)
    parts = iter(loader(cfg, workers, part))

    def train():
        taken = [next(parts) for _ in range(cfg.train.batch_size // part)]
        return step(*to_device(taken, step.device))

    train().block_until_ready()
    for _ in range(workers * (PREFETCH + 1)):
        next(parts)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        train()
        count += 1
    step.block_until_ready()
    return count * cfg.train.batch_size / (time.perf_counter() - begun)
