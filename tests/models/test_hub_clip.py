"""Hugging Face folders; the oracle for features and logits is `transformers` on random weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, heads, hub_clip, text
from tests.tiny_hub import made

VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 60, "max_position_embeddings": 9,
        "bos_token_id": None, "pad_token_id": None}
IMAGES = np.random.default_rng(0).normal(size=(3, 24, 24, 3)).astype(np.float32)
# Ends (59 for CLIP) in different places, one text with two, padded with zeros.
TOKENS = np.random.default_rng(1).integers(3, 58, (4, 9)).astype(np.int32)
for _row, _end in enumerate((3, 8, 5, 1)):
    TOKENS[_row, _end], TOKENS[_row, _end + 1:] = 59, 0
TOKENS[2, 7] = 59


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder of a random model that transformers wrote}, and what that model answers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = {}
    for kind, end in (("clip", 59), ("legacy", 2), ("siglip", 1)):
        texts = TEXT | {"eos_token_id": end}
        if kind == "siglip":
            config = transformers.SiglipConfig(text_config=texts | {"projection_size": 48},
                                               vision_config=VISION)
            model = transformers.SiglipModel(config)
        else:
            config = transformers.CLIPConfig(text_config=texts, vision_config=VISION,
                                             projection_dim=20)
            model = transformers.CLIPModel(config)
        with torch.no_grad():  # first values are too small or too equal to show a swap
            for name, p in model.named_parameters():
                gain = "norm" in name and name.endswith("weight")
                p.copy_(torch.randn_like(p) * 0.2 + gain)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        made[kind] = folder, answers(folder)
    return made


def answers(folder):
    """What transformers computes from a folder."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = torch.from_numpy(TOKENS).long()
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=images)
        # Of the towers themselves: CLIPModel overwrites `pooler_output` by its projection.
        x, t = model.vision_model(pixel_values=images), model.text_model(input_ids=tokens)
    return {"image": x.pooler_output, "image_unit": out.image_embeds, "text": t.pooler_output,
            "text_unit": out.text_embeds, "logits": out.logits_per_image}


def ours(described, variables):
    """The same from our modules."""
    cfg = ConfigDict(described)
    params = variables["params"]
    image = build.build(cfg.model)
    texts = text.build(cfg.text)

    @jax.jit
    def run(params):
        def project(part, x, bias):
            if part not in params:
                return x
            return heads.Projection(cfg.objective.dim, use_bias=bias).apply(
                {"params": params[part]}, x, train=False)

        def unit(x):
            return x / jnp.linalg.norm(x, axis=1, keepdims=True)

        x = image.apply({"params": params["encoder"]}, IMAGES, train=False)
        t = texts.apply({"params": params["text"]}, TOKENS, train=False)
        bias = cfg.objective.get("text_bias", False)
        zx, zt = project("image_projection", x, False), project("text_projection", t, bias)
        scale = heads.LogitScale(0.0, 0.0 if cfg.objective.name == "siglip" else None)
        s, b = scale.apply({"params": params["scale"]}, zx, train=False)
        logits = jnp.exp(s) * unit(zx) @ unit(zt).T
        return {"image": x, "image_unit": unit(zx), "text": zt if bias else t,
                "text_unit": unit(zt), "logits": logits if b is None else logits + b}

    return run(params)


@pytest.mark.filterwarnings("ignore:.*no preprocessor_config")
@pytest.mark.parametrize("kind", ["clip", "legacy", "siglip"])
def test_parity_with_transformers_in_and_out(folders, kind, tmp_path):
    folder, want = folders[kind]
    described, variables = hub_clip.load(folder)
    got = ours(described, variables)
    for name in want:
        value = want[name].numpy()
        assert got[name].shape == value.shape and value.std() > 0.05
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-4, err_msg=name)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {np.dtype("float32")}
    hub_clip.save(tmp_path / "out", described, variables)
    back = answers(tmp_path / "out")
    for name in want:
        np.testing.assert_array_equal(back[name].numpy(), want[name].numpy(), err_msg=name)
    again, read = hub_clip.load(tmp_path / "out")
    assert again == described
    assert jax.tree.structure(read) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, read, variables)


def test_the_image_processor_keeps_the_normalisation(tmp_path):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    described, variables = made("clip")
    hub_clip.save(tmp_path, described, variables)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    got = module.CLIPImageProcessorPil.from_pretrained(tmp_path)(image)["pixel_values"][0]
    want = (image / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.2, 0.1)
    np.testing.assert_allclose(np.asarray(got).transpose(1, 2, 0), want, rtol=0, atol=1e-5)


@pytest.fixture(params=["clip", "siglip"])
def saved(request, tmp_path):
    described, variables = made(request.param)
    hub_clip.save(tmp_path, described, variables)
    return request.param, tmp_path, described, variables


def test_round_trip_without_transformers(saved):
    kind, folder, described, variables = saved
    assert all((folder / name).exists() for name in
               ("config.json", "model.safetensors", "preprocessor_config.json"))
    (folder / "tokenizer.json").write_text("{}")
    again, read = hub_clip.load(folder)
    assert again.pop("text") == described["text"] | {"tokenizer": str(folder)}
    assert again == {key: described[key] for key in ("model", "objective", "data")}
    jax.tree.map(np.testing.assert_array_equal, read, variables)
    parts = ["encoder", "image_projection", "text", "text_projection", "scale"]
    assert list(read["params"]) == [p for p in parts if kind == "clip" or p != "image_projection"]


@pytest.mark.parametrize("change, told", [
    (lambda a: a.pop("text_model.encoder.layers.0.layer_norm2.bias"),
     "missing: text_model.encoder.layers.0.layer_norm2.bias"),
    (lambda a: a.pop("logit_scale"), "missing: logit_scale"),
    (lambda a: a.update({"vision_model.encoder.layers.1.mlp.fc1.bias": np.zeros(3)}),
     "unknown: vision_model.encoder.layers.1.mlp.fc1.bias"),
    (lambda a: a.update({"text_model.final_layer_norm.weight": np.zeros(5, np.float32)}),
     r"text_model.final_layer_norm.weight has shape \(5,\).*\(12,\)")])
def test_every_wrong_array_is_named(saved, change, told):
    _, folder, _, _ = saved
    path = folder / "model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    # Constants of older versions of transformers are no parameters.
    for tower in ("text", "vision"):
        arrays[f"{tower}_model.embeddings.position_ids"] = np.arange(5)[None]
    safetensors.numpy.save_file(arrays, path)
    hub_clip.load(folder)
    change(arrays)
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match=told):
        hub_clip.load(folder)


def test_joined_attention_of_the_pooling_head(tmp_path):
    described, variables = made("siglip")
    hub_clip.save(tmp_path, described, variables)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    joined = arrays["vision_model.head.attention.in_proj_weight"]
    key = variables["params"]["encoder"]["pool"]["attention"]["key"]["kernel"]
    np.testing.assert_array_equal(joined[16:32], key.T)
    assert arrays["vision_model.head.probe"].shape == (1, 1, 16)
    assert arrays["logit_scale"].shape == (1,)
    arrays.pop("vision_model.head.attention.in_proj_weight")
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="missing: vision_model.head.attention.in_proj_weight"):
        hub_clip.load(tmp_path)


@pytest.mark.parametrize("change, told", [
    (lambda c: c.update(model_type="blip"), "blip.*clip, siglip"),
    (lambda c: c["text_config"].update(hidden_act="relu"), "relu.*quick_gelu"),
    (lambda c: c["vision_config"].update(image_size=[8, 12]), r"image_size = \[8, 12\]"),
    (lambda c: c["vision_config"].update(num_channels=1), "num_channels"),
    (lambda c: c["text_config"].update(num_hidden_layers=2), "missing: text_model.encoder.layers")])
def test_config_json_that_does_not_fit(saved, change, told):
    _, folder, _, _ = saved
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        hub_clip.load(folder)


def test_published_configs_leave_out_defaults(tmp_path):
    """google/siglip-base-patch16-224 and openai/clip-vit-large-patch14, as they are written."""
    read = hub_clip.hub_clip_config.read
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "siglip", "text_config": {"model_type": "siglip_text_model"},
        "vision_config": {"model_type": "siglip_vision_model"}}))
    with pytest.warns(UserWarning, match="assumed siglip's mean"):
        got = read(tmp_path)
    assert (got["model"]["width"], got["model"]["patch"], got["model"]["eps"]) == (768, 16, 1e-6)
    assert (got["text"]["vocab"], got["text"]["context"], got["text"]["end"]) == (32000, 64, 1)
    assert got["objective"]["dim"] == 768
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "clip", "projection_dim": 768,
        "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                        "eos_token_id": 2},
        "text_config_dict": None,
        "vision_config": {"hidden_size": 1}, "vision_config_dict": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14}}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0, 0.1, 0.2]}))
    got = read(tmp_path)
    assert (got["model"]["width"], got["model"]["layers"], got["model"]["patch"]) == (1024, 24, 14)
    assert got["model"]["mlp_ratio"] == 4
    assert (got["text"]["pool"], got["text"]["end"]) == ("highest", 49407)
    assert got["data"]["mean"] == (0, 0.1, 0.2) and got["data"]["std"][0] == 0.26862954


@pytest.mark.parametrize("kind, group, change, told", [
    ("clip", "model", {"pool": "map"}, "clip has no place for model.pool = 'map'"),
    ("clip", "text", {"causal": False}, "text.causal"),
    ("clip", "text", {"end": 2}, "text.end = 2"),
    ("siglip", "objective", {"image_projection": True}, "objective.image_projection"),
    ("siglip", "objective", {"dim": 12}, "objective.dim = 12"),
    ("clip", "objective", {"name": "simclr"}, "simclr"),
    ("clip", "model", {"width": 18}, "encoder/class_embedding")])
def test_saving_what_the_format_cannot_hold(tmp_path, kind, group, change, told):
    described, variables = made(kind)
    described[group] |= change
    with pytest.raises(UserError, match=told):
        hub_clip.save(tmp_path / "out", described, variables)
    assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        hub_clip.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        hub_clip.load(tmp_path)


@pytest.mark.parametrize("change, told", [
    ({}, None), ({"do_rescale": False}, None), ({"rescale_factor": 1 / 127.5}, None),
    ({"size": 8, "crop_size": 8}, None),  # as older files have it
    ({"do_resize": False}, "do_resize = false"),
    ({"do_center_crop": False, "size": {"height": 8, "width": 8}}, "without do_center_crop squash"),
    ({"size": {"shortest_edge": 9}}, "shortest_edge': 9"),
    ({"crop_size": {"height": 6, "width": 6}}, "crop_size")])
def test_processors_are_honoured_or_told_apart(tmp_path, recwarn, change, told):
    described, variables = made("siglip")
    hub_clip.save(tmp_path, described, variables)
    path = tmp_path / "preprocessor_config.json"
    given = json.loads(path.read_text())
    assert given["size"] == {"shortest_edge": 8} and given["do_center_crop"]
    assert given["crop_size"] == {"height": 8, "width": 8} and given["resample"] == 3
    path.write_text(json.dumps(given | change))
    data = hub_clip.hub_clip_config.read(tmp_path)["data"]
    messages = [str(w.message) for w in recwarn]
    assert len(messages) == (told is not None) and all(told in m for m in messages)
    # A grey of 0.6 comes out as the processor would have it.
    factor = 255 * given["rescale_factor"] if "do_rescale" not in change else 255
    factor *= change.get("rescale_factor", 1 / 255) * 255
    want = (0.6 * factor - np.array((0.5, 0.4, 0.3))) / (0.2, 0.2, 0.1)
    np.testing.assert_allclose((0.6 - np.array(data["mean"])) / data["std"], want, rtol=1e-9)
