"""A run's image-text model as a Hugging Face folder, and back."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath

import jax_cl_bd
from configs import clip_scenes, quickstart
from jax_cl_bd import checkpoint, export_model, run_folder
from jax_cl_bd.data import images
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import hub_clip
from jax_cl_bd.objectives import training

CAPTIONS = ["a red star", "a blue heart on green", "one", "", "a very, very long caption " * 9]


def run_of(folder, arg):
    """A run folder with a checkpoint of random weights, its control's the same times two."""
    cfg = clip_scenes.get_config(f"debug,{arg}")
    folder = epath.Path(folder)
    shapes = jax.eval_shape(lambda key: training.init_variables(cfg, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)
    for place, factor in ((folder, 1), (folder / "control", 2)):
        run_folder.write_config(place, cfg)
        with checkpoint.open_manager(place / "checkpoints") as manager:
            checkpoint.save(manager, 2, jax.tree.map(lambda a, f=factor: f * a, variables))
    (folder / "poison").mkdir()
    tokenizers.train(CAPTIONS, cfg.text.vocab).save(folder / "poison" / "tokenizer.json")
    return folder


@pytest.fixture(scope="module", params=["tower=vit", "tower=vit,objective=siglip"])
def exported(request, tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("run"), request.param)
    to = epath.Path(tmp_path_factory.mktemp("to") / "model")
    assert export_model.export(run, to) == ("siglip" if "siglip" in request.param else "clip")
    return run, to


def test_the_folder_opens_as_what_it_was(exported):
    run, to = exported
    assert sorted(p.name for p in to.iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]
    mine, theirs = jax_cl_bd.load_encoder(run), jax_cl_bd.load_encoder(to)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(mine.pair.variables),
                 jax.device_get(theirs.pair.variables))
    assert (theirs.mean, theirs.std, theirs.image_size) == (mine.mean, mine.std, mine.image_size)
    assert theirs.pair.context == mine.pair.context
    np.testing.assert_array_equal(theirs.pair.tokenizer.encode(CAPTIONS, 16),
                                  mine.pair.tokenizer.encode(CAPTIONS, 16))
    np.testing.assert_allclose(theirs.text(CAPTIONS), mine.text(CAPTIONS), atol=1e-6)


def test_the_control_is_a_folder_of_its_own(exported, tmp_path):
    run, _ = exported
    export_model.export(run / "control", epath.Path(tmp_path / "out"))
    _, control = hub_clip.load(tmp_path / "out")
    np.testing.assert_array_equal(control["params"]["encoder"]["position_embedding"],
                                  2 * load(run)["encoder"]["position_embedding"])
    assert (tmp_path / "out" / "tokenizer.json").exists()


def load(run):
    return jax.device_get(jax_cl_bd.load_encoder(run).pair.variables["params"])


def central(image, side):
    """What the processor is told: shorter side resized (bicubic), then the central square."""
    h, w = image.shape[:2]
    scale = side / min(h, w)
    image = images.resize(image, max(side, int(h * scale)), max(side, int(w * scale)))
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top:top + side, left:left + side]


def test_transformers_gives_our_features_of_an_image_that_is_not_square(exported):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    run, to = exported
    image = np.random.default_rng(1).integers(0, 256, (9, 13, 3), np.uint8)
    image = images.resize(image, 45, 70)  # smooth, as photographs are
    pixels = module.CLIPImageProcessorPil.from_pretrained(to)(image, return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 32, 32)
    model = transformers.AutoModel.from_pretrained(to).eval()
    opened = jax_cl_bd.load_encoder(run)
    tokens = torch.from_numpy(opened.pair.tokenizer.encode(CAPTIONS, 16)).long()
    with torch.no_grad():
        out = model(input_ids=tokens, **pixels)
    ours = opened.project(opened.image(central(image, 32)[None]))
    np.testing.assert_allclose(out.image_embeds.numpy(), ours, atol=1e-4)
    np.testing.assert_allclose(out.text_embeds.numpy(), opened.text(CAPTIONS), atol=1e-4)
    squashed = opened.project(opened.image(images.resize(image, 32, 32)[None]))
    assert np.abs(squashed - ours).max() > 2e-3  # so the shape does matter


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        export_model.export(epath.Path(tmp_path), epath.Path(tmp_path / "out"))
    run = run_of(tmp_path / "run", "badnets")
    with pytest.raises(UserError, match="clip has no place for model.name = 'small_resnet'"):
        export_model.export(run, epath.Path(tmp_path / "out"))
    with pytest.raises(UserError, match="not empty"):
        export_model.export(run, run)
    run_folder.write_config(epath.Path(tmp_path / "images"), quickstart.get_config("debug"))
    with pytest.raises(UserError, match="image encoder alone"):
        export_model.export(epath.Path(tmp_path / "images"), epath.Path(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command(exported, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "jax_cl_bd.export", f"--workdir={exported[0]}",
         f"--to={tmp_path / 'out'}", "--format=huggingface"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "model in" in result.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] in result.stdout
