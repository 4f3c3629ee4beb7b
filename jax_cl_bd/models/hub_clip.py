"""CLIP (ViT) and SigLIP weights from and to Hugging Face folders: config.json, model.safetensors.

Arrays: linear weights [O, I] there, [I, O] here; the patch embedding [O, I, H, W] there,
[H, W, I, O] here; the pooling attention of SigLIP holds query, key and value in one array there.
`hub_clip_config` translates the settings.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, heads, hub_clip_config, text, weights_file

# Constants that older versions of transformers stored.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
TOWERS = {"encoder": "vision_model", "text": "text_model"}
MODULES = {
    "patch_embedding": "embeddings.patch_embedding",
    "class_embedding": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "token_embedding": "embeddings.token_embedding.weight", "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm", "ln_final": "final_layer_norm", "pool": "head"}
INNER = {"attention": "self_attn", "ln1": "layer_norm1", "ln2": "layer_norm2", "query": "q_proj",
         "key": "k_proj", "value": "v_proj", "out": "out_proj", "kernel": "weight",
         "scale": "weight"}
JOINED = "vision_model.head.attention"


def load(path) -> tuple[dict, dict]:
    """Reads a folder with config.json, model.safetensors and perhaps preprocessor_config.json.

    Returns:
        {"model": what `build.build` takes, "text": what `text.build` takes, "objective": {"name":
        "clip" or "siglip", "dim", "image_projection", "scale_init" and, for SigLIP, "text_bias" and
        "bias_init"}, "data": {"mean", "std", "image_size"}} and {"params": {part: ...},
        "batch_stats": {part: {}}} in float32, the parts being encoder, image_projection (CLIP
        alone), text, text_projection and scale. A folder that does not say how images are
        normalised is taken to do it as its model's default; a warning says so. text.tokenizer is
        the folder if it holds tokenizer.json.

    Raises:
        UserError: no such files, another kind of model, a missing or an unknown array, a wrong
            shape, a setting that is not supported.
    """
    folder = epath.Path(path)
    described = hub_clip_config.read(folder)
    path = weights_file.find(folder)
    arrays, _ = weights_file.read(path)
    arrays = {name: array for name, array in arrays.items() if name not in BUFFERS}
    shapes = _shapes(described)
    expected = _theirs({place: np.broadcast_to(np.float32(0), shape)
                        for place, shape in shapes.items()}, described)
    missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or extra:
        told = [f"missing: {', '.join(missing)}"] * bool(missing)
        told += [f"unknown: {', '.join(extra)}"] * bool(extra)
        raise UserError(f"{path} does not hold the {described['objective']['name']} model of its "
                        f"config.json; {'; '.join(told)}")
    for name, array in expected.items():
        if arrays[name].shape != array.shape:
            raise UserError(f"{path}: {name} has shape {arrays[name].shape}; config.json asks "
                            f"for {array.shape}")
    params = traverse_util.unflatten_dict(_ours(arrays, shapes, described))
    return described, {"params": params, "batch_stats": {part: {} for part in params}}


def save(path, described: dict, variables: dict) -> None:
    """Writes config.json, model.safetensors and preprocessor_config.json into a folder.

    The processor takes the central square of an image, its shorter side resized (bicubic), as
    training without augmentation does.

    Args:
        path: the folder; made if it is not there.
        described: as `load` gives it; further settings in its groups are not looked at.
        variables: {"params": {part: ...}, ...} with the parts that `load` gives.

    Raises:
        UserError: a model that the format cannot hold, or variables that are not this model's.
    """
    configs = hub_clip_config.translate(described)
    flat = traverse_util.flatten_dict(dict(variables["params"]))
    shapes = _shapes(described)
    wrong = [place for place in set(shapes) | set(flat)
             if shapes.get(place) != getattr(flat.get(place), "shape", None)]
    if wrong:
        raise UserError("these variables are not of the model described; missing, unknown or of "
                        f"another shape: {', '.join(sorted('/'.join(p) for p in wrong))}")
    arrays = _theirs({place: np.asarray(jax.device_get(array), np.float32)
                      for place, array in flat.items()}, described)
    folder = epath.Path(path)
    weights_file.write(folder / "model.safetensors", arrays, {})
    hub_clip_config.write(folder, configs)


def _shapes(described):
    """Gives {place in our parameters: shape}."""
    model, texts, objective = (ml_collections.ConfigDict(described[group])
                               for group in ("model", "text", "objective"))
    side = described["data"]["image_size"]
    siglip = objective.name == "siglip"
    text_bias = objective.get("text_bias", False)
    parts = {
        "encoder": (build.build(model), (1, side, side, 3), jnp.float32),
        "text": (text.build(texts), (1, texts.context), jnp.int32),
        "text_projection": (heads.Projection(objective.dim, use_bias=text_bias),
                            (1, texts.width), jnp.float32),
        "scale": (heads.LogitScale(0.0, 0.0 if siglip else None), (), jnp.float32)}
    if objective.image_projection:
        parts["image_projection"] = (heads.Projection(objective.dim), (1, model.width),
                                     jnp.float32)
    order = ("encoder", "image_projection", "text", "text_projection", "scale")
    shapes = {part: jax.eval_shape(
        lambda key, x, module=parts[part][0]: module.init(key, x, train=False)["params"],
        jax.random.key(0), jax.ShapeDtypeStruct(*parts[part][1:]))
        for part in order if part in parts}
    return {place: leaf.shape for place, leaf in traverse_util.flatten_dict(shapes).items()}


def _name(place, kind):
    """("encoder", "block0", "ln1", "scale") -> "vision_model.encoder.layers.0.layer_norm1.weight".

    The pooling attention's query, key and value get names of their own here.
    """
    part, *rest = place
    if part == "scale":
        return rest[0]
    leaf = INNER.get(rest[-1], rest[-1])
    if part == "image_projection":
        return f"visual_projection.{leaf}"
    if part == "text_projection":
        return f"text_projection.{leaf}" if kind == "clip" else f"text_model.head.{leaf}"
    module, *inner = rest
    if module == "pool":
        inner = [{"attention": "attention", "ln": "layernorm"}.get(n, INNER.get(n, n))
                 for n in inner]
    else:
        inner = [INNER.get(n, n) for n in inner]
    module = MODULES.get(module) or f"encoder.layers.{module.removeprefix('block')}"
    return ".".join([TOWERS[part], module, *inner])


def _theirs(flat, described):
    """Gives {their name: their array} of {our place: our array}."""
    kind = described["objective"]["name"]
    arrays = {_name(place, kind): _turned(place, array, kind) for place, array in flat.items()}
    for leaf in ("weight", "bias"):
        names = [f"{JOINED}.{n}_proj.{leaf}" for n in "qkv"]
        if names[0] in arrays:
            arrays[f"{JOINED}.in_proj_{leaf}"] = np.concatenate([arrays.pop(n) for n in names])
    return arrays


def _ours(arrays, shapes, described):
    """Gives {our place: our array} of {their name: their array}; names and shapes are right."""
    kind, arrays = described["objective"]["name"], dict(arrays)
    for leaf in ("weight", "bias"):
        if f"{JOINED}.in_proj_{leaf}" in arrays:
            parts = np.split(arrays.pop(f"{JOINED}.in_proj_{leaf}"), 3)
            arrays |= {f"{JOINED}.{n}_proj.{leaf}": part
                       for n, part in zip("qkv", parts, strict=True)}
    flat = {}
    for place, shape in shapes.items():
        array = np.asarray(arrays[_name(place, kind)], np.float32)
        if place[-1] == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        flat[place] = np.ascontiguousarray(array).reshape(shape)
    return flat


def _turned(place, array, kind):
    if place[-1] == "kernel":
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    if place[-1] == "probe":
        return array.reshape(1, 1, -1)
    return array.reshape(1) if place[0] == "scale" and kind == "siglip" else array
