"""Regions of an image that may be objects or patches, as boxes.

EftCLIP (arXiv 2511.13545) has a segmentation model in everything-mode, FastSAM. The segmenters here
(defense.oracle.segmenter): "sam", a SAM or SAM 2 in a local folder (_regions_sam), and
"classical", the stand-in without a download: superpixels by Felzenszwalb and Huttenlocher's graph
segmentation (IJCV 2004) and by SLIC (Achanta et al., PAMI 2012), each at several scales, through
scikit-image; and square windows, for a patch without an edge that a segmenter sees. No ground truth
takes part: a true object mask knows nothing of the trigger.
"""

from collections.abc import Callable

import numpy as np
from skimage import segmentation

from jax_cl_bd.defenses import _regions_sam
from jax_cl_bd.errors import UserError, unknown

SEGMENTERS = ("classical", "sam")
SMALLEST, LARGEST = 0.001, 0.15  # share of the image's area
_SCALES = (20, 60, 150)  # of Felzenszwalb's segmentation
_SUPERPIXELS = (30, 80)  # of SLIC
_WINDOWS = (1 / 8, 3 / 16, 1 / 4)  # sides, as shares of the image's; they overlap by half


def check(oracle) -> None:
    """Refuses a segmenter of defense.oracle that does not exist, or cannot run here.

    Raises:
        UserError: also for a folder that is given and not used.
    """
    if oracle.segmenter not in SEGMENTERS:
        raise unknown("defense.oracle.segmenter", oracle.segmenter, SEGMENTERS)
    if oracle.segmenter == "sam":
        _regions_sam.check(oracle)
    elif oracle.segmenter_folder:
        raise UserError(f"defense.oracle.segmenter_folder={oracle.segmenter_folder!r} is for the "
                        "segmenter 'sam'; leave it empty, or set --config.defense.oracle."
                        "segmenter=sam")


def make(oracle) -> Callable[[np.ndarray], np.ndarray]:
    """The function of an image like `boxes` that defense.oracle names."""
    if oracle.segmenter == "classical":
        return boxes
    found = _regions_sam.make(oracle.segmenter_folder, oracle.segmenter_points)
    return lambda image: _allowed(found(image), *image.shape[:2])


def boxes(image: np.ndarray) -> np.ndarray:
    """Boxes int [R, 4] (y, x, height, width) in pixels of regions of a uint8 image [H, W, 3],
    ascending, each once."""
    height, width = image.shape[:2]
    found = set(_windows(height, width))
    smallest = max(4, round(0.008 * height * width))
    for scale in _SCALES:
        found |= _of_segments(segmentation.felzenszwalb(image, scale=scale, sigma=0.3,
                                                        min_size=smallest))
    for count in _SUPERPIXELS:
        found |= _of_segments(segmentation.slic(image, n_segments=count, compactness=10,
                                                start_label=0, channel_axis=-1))
    return _allowed(found, height, width)


def _allowed(found, height, width):
    """The boxes of sizes that are looked at, int [R, 4]."""
    allowed = sorted(box for box in found if min(box[2:]) >= 2
                     and SMALLEST <= box[2] * box[3] / (height * width) <= LARGEST)
    return np.array(allowed, np.int64).reshape(-1, 4)


def _of_segments(labels):
    found = set()
    for value in range(int(labels.max()) + 1):
        y, x = np.nonzero(labels == value)
        if len(y):
            found.add((int(y.min()), int(x.min()), int(np.ptp(y)) + 1, int(np.ptp(x)) + 1))
    return found


def _windows(height, width):
    for share in _WINDOWS:
        side = max(2, round(share * min(height, width)))
        for y in _starts(height, side):
            for x in _starts(width, side):
                yield y, x, side, side


def _starts(length, side):
    return sorted({*range(0, length - side + 1, max(1, side // 2)), length - side})
