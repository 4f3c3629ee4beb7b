"""The input pipeline of the reference codes: worker processes augment PIL images (torchvision).

For benchmarks alone. Rows are random pixels of the config's image size, since only the work counts;
the recipe is that of cfg.augment.view1 in torchvision's own transforms.
"""

import os

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as t


class Views(torch.utils.data.Dataset):
    """Two views of each image."""

    def __init__(self, cfg):
        side, rows = cfg.data.image_size, 1024
        self.images = np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), np.uint8)
        view, steps = cfg.augment.view1, []
        steps.append(t.RandomResizedCrop(side, view.crop_scale, view.crop_ratio))
        if view.flip:
            steps.append(t.RandomHorizontalFlip(view.flip))
        if view.jitter:
            jitter = t.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
            steps.append(t.RandomApply([jitter], view.jitter))
        if view.grayscale:
            steps.append(t.RandomGrayscale(view.grayscale))
        if view.blur:
            size = 2 * round(0.05 * side) + 1  # a tenth of the side, as SimCLR has it
            steps.append(t.RandomApply([t.GaussianBlur(size, (0.1, 2.0))], view.blur))
        self.augment = t.Compose([*steps, t.ToTensor(),
                                  t.Normalize(cfg.data.mean, cfg.data.std)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.augment(image), self.augment(image)


def loader(cfg):
    """Endless batches of two views, with a worker for each core."""
    data = Views(cfg)
    endless = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**9)
    return torch.utils.data.DataLoader(
        data, cfg.train.batch_size, sampler=endless, num_workers=os.cpu_count(), drop_last=True,
        pin_memory=torch.cuda.is_available(), persistent_workers=True,
        multiprocessing_context="forkserver")


def to_device(batch, device):
    """Both views, channels last."""
    return [view.to(device, non_blocking=True, memory_format=torch.channels_last)
            for view in batch]
