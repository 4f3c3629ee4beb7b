"""SAM as the region back-end: its plumbing with random weights, and what is refused before it."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import clip_scenes
from jax_cl_bd.defenses import _find_trigger, _regions, _regions_sam, oracle_finetune
from jax_cl_bd.errors import UserError

SIDE = 64  # what the tiny model sees
ALL = dict(pred_iou_thresh=-1.0, stability_score_thresh=-1.0)  # random weights are sure of nothing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A SAM of a few thousand random weights, as Hugging Face would have it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.SamModel(transformers.SamConfig(
        vision_config=dict(hidden_size=16, output_channels=16, num_hidden_layers=1,
                           num_attention_heads=2, image_size=SIDE, patch_size=8, window_size=2,
                           global_attn_indexes=[0], mlp_dim=16, num_pos_feats=8),
        prompt_encoder_config=dict(hidden_size=16, image_size=SIDE, patch_size=8,
                                   mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1,
                                 num_attention_heads=2, iou_head_hidden_dim=16,
                                 iou_head_depth=2)))
    place = tmp_path_factory.mktemp("sam")
    model.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps(dict(
        image_processor_type="SamImageProcessor", size={"longest_edge": SIDE},
        pad_size={"height": SIDE, "width": SIDE}, mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16})))
    return place


def oracle(**changes):
    found = clip_scenes.get_config("debug,defense=oracle_finetune").defense.oracle
    found.update(changes)
    return found


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)


def test_boxes_come_back_at_the_images_own_scale_and_within_the_bounds(folder, image, monkeypatch):
    settings = oracle(segmenter="sam", segmenter_folder=str(folder), segmenter_points=4)
    _regions.check(settings)
    found = _regions_sam.make(str(folder), 4, **ALL)(image)
    assert found
    for y, x, height, width in found:
        assert 0 <= y < y + height <= 24 and 0 <= x < x + width <= 40
    assert max(x + width for _, x, _, width in found) > 24  # not the model's scale, nor transposed
    loaded = _regions_sam.make
    monkeypatch.setattr(_regions_sam, "make", lambda *given: loaded(*given, **ALL))
    regions = _regions.make(settings)
    boxes = regions(image)
    share = boxes[:, 2] * boxes[:, 3] / image[..., 0].size
    allowed = [box for box in found if min(box[2:]) >= 2 and _regions.SMALLEST
               <= box[2] * box[3] / image[..., 0].size <= _regions.LARGEST]
    assert boxes.dtype == np.int64 and boxes.shape[1] == 4
    np.testing.assert_array_equal(boxes, np.array(sorted(allowed), np.int64).reshape(-1, 4))
    assert (share <= _regions.LARGEST).all()
    np.testing.assert_array_equal(boxes, regions(image))


def test_boxes_are_those_of_the_masks(folder, image):
    """Run-length encoded masks (columns first, runs of 0 and 1 in turn) decoded by hand."""
    transformers = pytest.importorskip("transformers")
    pipeline = transformers.pipeline("mask-generation", model=str(folder))
    expected = set()
    for batch in pipeline.preprocess(Image.fromarray(image), points_per_crop=3):
        for code in pipeline.forward(batch, **ALL)["masks"]:
            runs = np.repeat(np.arange(len(code["counts"])) % 2, code["counts"])
            y, x = np.nonzero(runs.reshape(40, 24).T)
            if len(y):
                expected.add((y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1))
    found = _regions_sam.make(str(folder), 3, **ALL)(image) - {(0, 0, 1, 1)}  # an empty mask's
    assert found and found <= expected


def test_more_points_ask_more_often(folder, image, monkeypatch):
    """The grid has the given number of points along a side."""
    transformers = pytest.importorskip("transformers")
    asked, forward = [], transformers.SamModel.forward

    def counted(self, *args, **kwargs):
        asked.append(kwargs["input_points"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.SamModel, "forward", counted)
    for points in (2, 10):
        asked.clear()
        _regions_sam.make(str(folder), points)(image)
        assert sum(asked) == points**2


def test_an_image_in_which_nothing_is_sure_has_no_regions(folder, image):
    found = _regions_sam.make(str(folder), 2, pred_iou_thresh=1e9)(image)
    assert found == set()
    suspect = _find_trigger.Suspect(lambda x: np.ones((len(x), 2)) / 2, 24)
    assert _find_trigger.in_image(suspect, image, np.array([0]), np.ones(2), (None, None), sure=0.5,
                                  confident=0.5, evidence="crop",
                                  regions=lambda _: np.zeros((0, 4), np.int64)) == []


def test_boxes_that_overlap_a_better_one_are_left_out():
    corners = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 4, 22, 4], [0, 0, 9, 2]], np.float32)
    scores = np.array([0.5, 0.9, 0.1, 0.2])
    assert _regions_sam.distinct(corners, scores) == {(0, 0, 9, 10), (4, 20, 1, 3), (0, 0, 3, 10)}
    assert _regions_sam.distinct(np.zeros((0, 4)), np.zeros(0)) == set()


def test_bad_settings_are_refused(tmp_path, monkeypatch):
    """Before torch is imported, and also where it is not there."""
    for changes, says in (
            ({"segmenter": "fastsam"}, "fastsam"), ({"segmenter": "sam"}, "needs .*_folder"),
            ({"segmenter_folder": "here"}, "for the segmenter 'sam'"),
            ({"segmenter": "sam", "segmenter_folder": str(tmp_path)}, "no config.json"),
            ({"segmenter": "sam", "segmenter_points": 0}, "segmenter_points=0")):
        with pytest.raises(UserError, match=says):
            _regions.check(oracle(**changes))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_text("{}")
    given = oracle(segmenter="sam", segmenter_folder=str(tmp_path))
    with pytest.raises(UserError, match="model_type"):
        _regions.check(given)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match="not that of a model"):
        _regions.check(given)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    monkeypatch.setattr(_regions_sam.importlib.util, "find_spec", lambda name: None)
    cfg = clip_scenes.get_config("debug,defense=oracle_finetune")
    cfg.defense.oracle = ConfigDict(given.to_dict())
    cfg.mesh.data = 1
    with pytest.raises(UserError, match="needs torch.*sam"):
        oracle_finetune.check(cfg, 100)
