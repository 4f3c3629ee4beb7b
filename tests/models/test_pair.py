"""Both towers as evaluations see them, and a hub folder opened through the public face."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import jax_cl_bd
from configs import clip_scenes
from jax_cl_bd import parallel
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder, hub_clip, pair, parts
from jax_cl_bd.objectives import training

CAPTIONS = ["a red star", "a blue heart on green", "one", "", "a photo of a star"]


@pytest.fixture(scope="module")
def model():
    cfg = clip_scenes.get_config("debug")
    tokenizer = tokenizers.train(CAPTIONS, cfg.text.vocab)
    variables = training.first_variables(cfg)
    mesh = parallel.make_mesh(ConfigDict({"data": 1, "fsdp": 1}))
    return cfg, variables, encoder.of_parts(cfg, variables, mesh, tokenizer)


def test_text_and_images_end_as_unit_vectors_of_one_space(model):
    cfg, _, opened = model
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    z, t = opened.project(opened.image(images)), opened.text(CAPTIONS)
    assert z.shape == (3, cfg.objective.dim) and t.shape == (5, cfg.objective.dim)
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([z, t]), axis=1), 1, rtol=1e-5)
    assert opened.logit_scale == pytest.approx(1 / 0.07)


def test_a_caption_does_not_depend_on_its_batch(model):
    _, _, opened = model
    together = opened.text(CAPTIONS * 3)
    for i in (0, 4, 9):
        np.testing.assert_allclose(opened.text([(CAPTIONS * 3)[i]])[0], together[i], atol=1e-6)


def test_projection_is_the_heads_own(model):
    cfg, variables, opened = model
    features = np.random.default_rng(1).normal(size=(4, cfg.model.stages[-1])).astype(np.float32)
    kernel = np.asarray(variables["params"]["image_projection"]["dense"]["kernel"])
    z = features @ kernel
    np.testing.assert_allclose(opened.project(features),
                               z / np.linalg.norm(z, axis=1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_image_embedding_is_differentiable_and_the_same(model):
    cfg, _, opened = model
    images = np.random.default_rng(2).integers(0, 256, (2, 32, 32, 3), np.uint8)
    x = (images / np.float32(255) - np.float32(cfg.data.mean)) / np.float32(cfg.data.std)
    z = opened.pair.image_embedding(jnp.asarray(x))
    np.testing.assert_allclose(z / jnp.linalg.norm(z, axis=1, keepdims=True),
                               opened.project(opened.image(images)), atol=1e-5)
    grad = jax.grad(lambda x: opened.pair.image_embedding(x).sum())(jnp.asarray(x))
    assert np.abs(grad).max() > 0


def test_an_image_encoder_has_no_text():
    cfg = clip_scenes.get_config("debug")
    cfg.text.name = "none"
    cfg.objective = ConfigDict({"name": "simclr", "temperature": 0.5, "hidden": 8, "dim": 8})
    mesh = parallel.make_mesh(ConfigDict({"data": 1, "fsdp": 1}))
    opened = encoder.of_parts(cfg, training.first_variables(cfg), mesh)
    assert opened.text is None and opened.project is None and opened.logit_scale is None


@pytest.fixture
def hub_folder(tmp_path):
    """A CLIP of random weights, as Hugging Face stores them, with a tokenizer.json."""
    described = {
        "model": dict(name="vit", width=16, layers=1, heads=2, patch=4, mlp_ratio=2, pool="cls",
                      act="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False,
                      dtype="float32", bn_groups=1),
        "text": dict(name="transformer", width=16, layers=1, heads=2, context=12, vocab=300, end=1,
                     causal=True, pool="end", mlp_ratio=2, act="quick_gelu", eps=1e-5,
                     dtype="float32", tokenizer=""),
        "objective": dict(name="clip", dim=8, image_projection=True, scale_init=2.0),
        "data": dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), image_size=8)}
    cfg = ConfigDict(described)
    variables = parts.init_variables(pair.modules_of(cfg), jax.random.key(0), (8, 8, 3), 12)
    hub_clip.save(tmp_path, described, jax.device_get(variables))
    return tmp_path, described, variables


def test_hub_folder_opens_as_both_towers(hub_folder):
    folder, described, variables = hub_folder
    tokenizer = tokenizers.train(CAPTIONS, 300)
    tokenizer.save(folder / "tokenizer.json")
    opened = jax_cl_bd.load_encoder(folder)
    mesh = parallel.make_mesh(ConfigDict({"data": 1, "fsdp": 1}))
    cfg = ConfigDict(described | {"evals": {"batch_size": 512}})
    mine = encoder.of_parts(cfg, variables, mesh, tokenizer)
    np.testing.assert_allclose(opened.text(CAPTIONS), mine.text(CAPTIONS), atol=1e-6)
    images = np.random.default_rng(3).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(opened.project(opened.image(images)),
                               mine.project(mine.image(images)), atol=1e-6)
    assert opened.image_size == 8 and opened.mean == (0.5, 0.4, 0.3)


def test_hub_folder_without_a_tokenizer_says_so(hub_folder):
    opened = jax_cl_bd.load_encoder(hub_folder[0])
    with pytest.raises(UserError, match="tokenizer.json"):
        opened.text(["a"])
