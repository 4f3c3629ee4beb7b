"""A few numbers of PyTorch and transformers on record, so that they are checked without either.

Weights and inputs are drawn by NumPy from each array's name, so the file holds answers alone.
tests/golden/parity.json was made, with torch 2.13 and transformers 5.23 installed, by

    UPDATE_GOLDEN=1 python -m pytest tests/test_parity_numbers.py
"""

import json
import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from jax_cl_bd.models import clip_resnet, hub_clip, pair, parts, weights_file
from jax_cl_bd.triggers import warp
from tests.tiny_hub import made

PATH = Path(__file__).parent / "golden" / "parity.json"
TOLERANCE = dict(rtol=0, atol=1e-4)


def drawn(name, shape, centre=0.0):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return np.asarray(centre + 0.3 * rng.normal(size=shape), np.float32)


def check(name, ours, oracle):
    """Compares with the numbers on record, which UPDATE_GOLDEN=1 takes from the oracle anew."""
    record = json.loads(PATH.read_text()) if PATH.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        record[name] = np.round(np.asarray(oracle(), np.float64), 6).tolist()
        PATH.write_text(json.dumps(record, indent=None, sort_keys=True) + "\n")
    want = np.array(record[name])
    assert want.std() > 0.05 and want.shape == np.shape(ours)
    np.testing.assert_allclose(ours, want, **TOLERANCE)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_of_a_tiny_hugging_face_model(tmp_path, kind):
    described, variables = made(kind)
    hub_clip.save(tmp_path, described, variables)
    arrays, metadata = weights_file.read(epath.Path(tmp_path / "model.safetensors"))
    # Gains near 1, and a scale that makes differences of cosines visible.
    arrays = {name: drawn(name, a.shape, 1.0 if "norm" in name and name.endswith("weight") else
                          3.0 if name == "logit_scale" else 0.0) for name, a in arrays.items()}
    weights_file.write(epath.Path(tmp_path / "model.safetensors"), arrays, metadata)
    images = drawn("images", (2, 8, 8, 3), 0.5)
    tokens = np.array([[3, 7, 29, 0, 0], [28, 4, 5, 6, 29], [1, 29, 2, 29, 0]], np.int32)

    def oracle():
        import torch
        import transformers

        model = transformers.AutoModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(tokens).long(), pixel_values=torch.from_numpy(
                images).permute(0, 3, 1, 2)).logits_per_image.numpy()

    described, variables = hub_clip.load(tmp_path)
    cfg = ConfigDict(described)
    fns = parts.make_apply_fns(pair.modules_of(cfg))

    @jax.jit
    def logits(variables):
        x, t = images, tokens
        for name in ("encoder", "image_projection", "text", "text_projection"):
            if name in fns and "text" in name:
                t, _ = fns[name](variables, t, False)
            elif name in fns:
                x, _ = fns[name](variables, x, False)
        (scale, bias), _ = fns["scale"](variables, x, False)
        x, t = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (x, t))
        return jnp.exp(scale) * x @ t.T + (0 if bias is None else bias)

    check(f"logits_{kind}", logits(variables), oracle)


def test_warp_as_grid_sample():
    field = drawn("field", (4, 4, 2))
    images = np.clip(drawn("pictures", (1, 12, 12, 3), 0.5), 0, 1)
    params = {"field": field, "strength": np.float32(6.0)}

    def oracle():
        from tests.triggers.test_warp import torch_warped

        return torch_warped(field, 6.0, images)[0, ::3, ::3]

    out = jax.jit(warp.apply)(params, images, np.array([[0, 0, 12, 12]]), None)
    check("warp", np.asarray(out)[0, ::3, ::3], oracle)


def test_attention_pooling_of_clips_resnet():
    x = drawn("features", (2, 2, 3, 12))
    module = clip_resnet._Pool(3, jnp.float32)
    shapes = jax.eval_shape(lambda k: module.init(k, x), jax.random.key(0))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, a: drawn(jax.tree_util.keystr(path), a.shape), shapes)

    def oracle():
        from tests.models.test_clip_resnet import Torch

        torch = Torch({"params": {"pool": variables["params"]}})
        return torch.pool(torch.images(x), 3, "pool").numpy()

    check("attention_pooling", np.asarray(jax.jit(module.apply)(variables, x)), oracle)
