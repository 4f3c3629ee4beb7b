"""Regions of an image by a Segment Anything model in everything-mode.

Kirillov et al., "Segment Anything", ICCV 2023, arXiv 2304.02643; Ravi et al., "SAM 2", arXiv
2408.00714. EftCLIP (arXiv 2511.13545) has FastSAM in this place. The model, the grid of prompt
points and the filters of its masks (predicted quality above 0.88, stability above 0.95) are those
of transformers' mask-generation pipeline. Its last step, which makes the masks and needs
torchvision, is left out: only boxes are wanted, and those that overlap a better one by more than
0.7 are dropped here, as there. The model is read from a local folder and nothing is downloaded;
torch runs it, on a GPU if torch sees one.
"""

import importlib.util
import json
from collections.abc import Callable

import numpy as np
from etils import epath
from PIL import Image

from jax_cl_bd.errors import UserError, unknown

MODELS = {"sam": ("torch", "transformers"), "sam2": ("torch", "torchvision", "transformers"),
          "sam2_video": ("torch", "torchvision", "transformers")}  # SAM 2 is published as the last
_FILES = (("config.json",), ("model.safetensors",),
          ("preprocessor_config.json", "processor_config.json"))  # one of each
_OVERLAP = 0.7  # intersection over union from which on the worse of two boxes is left out


def check(oracle) -> None:
    """Refuses a folder that holds no such model, and a missing extra, without importing torch.

    Raises:
        UserError: naming defense.oracle.segmenter_folder, the number of points or the extra.
    """
    if oracle.segmenter_points < 1:
        raise UserError(f"defense.oracle.segmenter_points={oracle.segmenter_points} must be at "
                        "least 1: prompt points along a side of the image")
    folder = epath.Path(oracle.segmenter_folder).expanduser()
    named = f"defense.oracle.segmenter_folder={oracle.segmenter_folder!r}"
    if not oracle.segmenter_folder:
        raise UserError("defense.oracle.segmenter='sam' needs defense.oracle.segmenter_folder, a "
                        "local folder of a SAM or SAM 2 model as Hugging Face has them")
    for names in _FILES:
        if not any((folder / name).exists() for name in names):
            raise UserError(f"{named} has no {' or '.join(names)}; it must be the local folder of "
                            "a model as Hugging Face has them")
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (json.JSONDecodeError, AttributeError):
        raise UserError(f"{named}: its config.json is not that of a model") from None
    if kind not in MODELS:
        raise unknown(f"model_type of {named}", str(kind), MODELS)
    missing = [name for name in MODELS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"defense.oracle.segmenter='sam' needs {missing[0]}, which is not "
                        "installed: pip install -e '.[sam]'")


def make(folder: str, points: int, **filters: float) -> Callable[[np.ndarray], set]:
    """Loads the model; gives a function of an image uint8 [H, W, 3] to its boxes.

    Args:
        points: prompt points along a side, points**2 in all.
        filters: other thresholds of the pipeline, such as pred_iou_thresh.
    Returns:
        image -> {(y, x, height, width)} in its pixels, of any size.
    """
    import torch  # in the extra `sam`, which nothing else needs
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    segment = transformers.pipeline("mask-generation", device=device, dtype=torch.float32,
                                    model=str(epath.Path(folder).expanduser()))

    def of(image):
        found, scores = [], []
        for batch in segment.preprocess(Image.fromarray(image), points_per_crop=points):
            part = segment.forward(batch, **filters)
            found.append(part["boxes"].cpu().numpy().reshape(-1, 4))
            scores.append(part["iou_scores"].cpu().numpy().reshape(-1))
        return distinct(np.concatenate(found), np.concatenate(scores))

    return of


def distinct(corners: np.ndarray, scores: np.ndarray) -> set[tuple[int, int, int, int]]:
    """Boxes (y, x, height, width) of corners [R, 4] (left, top, right, bottom; the last pixels
    inside), without those that overlap a box of higher score by more than _OVERLAP."""
    left, top, right, bottom = np.rint(corners).astype(int).T
    height, width = bottom - top + 1, right - left + 1
    order, kept = list(np.argsort(-scores, kind="stable")), []
    while order:
        i, rest = order[0], np.array(order[1:], int)
        kept.append(i)
        high = np.minimum(bottom[i], bottom[rest]) - np.maximum(top[i], top[rest]) + 1
        wide = np.minimum(right[i], right[rest]) - np.maximum(left[i], left[rest]) + 1
        both = np.maximum(high, 0) * np.maximum(wide, 0)
        union = height[i] * width[i] + height[rest] * width[rest] - both
        order = list(rest[both <= _OVERLAP * union])
    return {(int(top[i]), int(left[i]), int(height[i]), int(width[i])) for i in kept}
