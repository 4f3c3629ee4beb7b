"""Settings of CLIP and SigLIP from and to Hugging Face's config.json.

Defaults are those of transformers' CLIPConfig and SiglipConfig, since a published file may leave
out what equals them.
"""

import json
import math
import warnings

from etils import epath

from jax_cl_bd.errors import UserError, unknown

TEXT = {
    "clip": {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048,
             "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
             "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407},
    "siglip": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072,
               "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 64,
               "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "eos_token_id": 49407,
               "projection_size": None}}
VISION = {
    "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 32,
             "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
               "num_attention_heads": 12, "num_channels": 3, "image_size": 224, "patch_size": 16,
               "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
               "vision_use_head": True}}
# What a format can hold; `save` refuses anything else.
FORMS = {
    "clip": {"model": {"name": ("vit",), "pool": ("cls",), "pre_norm": (True,),
                       "patch_bias": (False,)},
             "text": {"causal": (True,), "pool": ("end", "highest")},
             "objective": {"image_projection": (True,)}},
    "siglip": {"model": {"name": ("vit",), "pool": ("map",), "pre_norm": (False,),
                         "patch_bias": (True,)},
               "text": {"causal": (False,), "pool": ("last",)},
               "objective": {"image_projection": (False,), "text_bias": (True,)}}}
ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_new": "gelu_tanh"}
THEIR_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# What training from scratch would start from (Radford et al. 2021; Zhai et al. 2023).
STARTS = {"clip": {"scale_init": math.log(1 / 0.07)},
          "siglip": {"scale_init": math.log(10), "bias_init": -10.0}}
# transformers' image processors: OPENAI_CLIP_MEAN and _STD; SigLIP's halves.
NORMALISATION = {"clip": {"mean": (0.48145466, 0.4578275, 0.40821073),
                          "std": (0.26862954, 0.26130258, 0.27577711)},
                 "siglip": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}}
BICUBIC = 3  # PIL's number
# OpenAI's files say 2 where they mean "the highest id of a text"; transformers reads it so.
LEGACY_END = 2


def read(folder: epath.Path) -> dict:
    """Reads config.json and, if there, preprocessor_config.json; see `hub_clip.load`."""
    return _describe(folder, _read_json(folder / "config.json", required=True))


def translate(described: dict) -> dict[str, dict]:
    """Gives {file name: content} for settings of the form that `read` gives.

    Raises:
        UserError: the format has no place for a setting.
    """
    side = described["data"]["image_size"]
    config = _their_config(described)
    # CLIP's processor for SigLIP too: SigLIP's own squashes to a square, ours sees the central one.
    return {"config.json": config, "preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "do_center_crop": True, "do_rescale": True,
        "do_normalize": True, "rescale_factor": 1 / 255, "resample": BICUBIC,
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "image_mean": list(described["data"]["mean"]),
        "image_std": list(described["data"]["std"])}}


def write(folder: epath.Path, configs: dict[str, dict]) -> None:
    """Writes what `translate` gives."""
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _read_json(path, *, required):
    if not path.exists():
        if required:
            raise UserError(f"there is no {path}; a CLIP or SigLIP folder holds config.json and "
                            "model.safetensors")
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings, but {type(content).__name__}")
    return content


def _describe(folder, config):
    """Turns config.json into our settings."""
    path, kind = folder / "config.json", config.get("model_type")
    if kind not in FORMS:
        raise unknown(f"model_type in {path}:", str(kind), FORMS)
    clip, form = kind == "clip", {group: {key: values[0] for key, values in fields.items()}
                                  for group, fields in FORMS[kind].items()}
    texts, vision = (_group(config, name, table[kind])
                     for name, table in (("text", TEXT), ("vision", VISION)))
    if vision["num_channels"] != 3 or not vision.get("vision_use_head", True):
        raise UserError(f"{path}: an image tower needs num_channels = 3 and, for SigLIP, "
                        "vision_use_head = true")
    side, patch = (_square(path, vision, name) for name in ("image_size", "patch_size"))
    end = texts["eos_token_id"]
    pool = "highest" if clip and end == LEGACY_END else form["text"]["pool"]
    if clip and end == LEGACY_END:
        end = texts["vocab_size"] - 1
    elif not clip and not (isinstance(end, int) and 0 <= end < texts["vocab_size"]):
        end = 1  # published SigLIP configs inherit CLIP's id; their SentencePiece ends with 1
    tokenizer = str(folder) if (folder / "tokenizer.json").exists() else ""
    dim = config.get("projection_dim", 512) if clip else (
        texts["projection_size"] or texts["hidden_size"])
    if not clip and dim != vision["hidden_size"]:
        raise UserError(f"{path}: texts go to {dim} dimensions, images to "
                        f"{vision['hidden_size']}; SigLIP needs them equal")
    return {
        "model": form["model"] | _tower(path, vision) | {"patch": patch, "bn_groups": 1},
        "text": form["text"] | _tower(path, texts) | {
            "name": "transformer", "vocab": texts["vocab_size"],
            "context": texts["max_position_embeddings"], "end": end, "pool": pool,
            "tokenizer": tokenizer},
        "objective": {"name": kind, "dim": dim} | form["objective"] | STARTS[kind],
        "data": _data(folder, kind, side)}


def _group(config, name, defaults):
    # transformers lets the older NAME_config_dict, where there is one, replace NAME_config.
    given = config.get(f"{name}_config_dict") or config.get(f"{name}_config") or {}
    return defaults | given


def _square(path, settings, name):
    values = settings[name]
    values = list(values) if isinstance(values, list) else [values]
    if len(set(values)) != 1:
        raise UserError(f"{path}: {name} = {values}; only squares are supported")
    return values[0]


def _tower(path, settings):
    act = settings["hidden_act"]
    if act not in ACTS:
        raise unknown(f"hidden_act in {path}:", act, ACTS)
    width, wide = settings["hidden_size"], settings["intermediate_size"]
    return {"width": width, "layers": settings["num_hidden_layers"],
            "heads": settings["num_attention_heads"], "act": ACTS[act],
            "mlp_ratio": wide / width if wide % width else wide // width,
            "eps": settings["layer_norm_eps"], "dtype": "float32"}


def _data(folder, kind, side):
    path = folder / "preprocessor_config.json"
    given = _read_json(path, required=False)
    data = {**NORMALISATION[kind], "image_size": side}
    if given is None:
        warnings.warn(f"{folder} has no preprocessor_config.json; assumed {kind}'s mean "
                      f"{data['mean']} and deviation {data['std']}", stacklevel=4)
        return data
    for ours, name in (("mean", "image_mean"), ("std", "image_std")):
        if name in given:
            data[ours] = tuple(given[name])
    if given.get("do_normalize") is False:
        data |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    factor = 255 * given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 255
    if not math.isclose(factor, 1):  # ours are in [0, 1] before they are normalised
        data |= {name: tuple(value / factor for value in data[name]) for name in ("mean", "std")}
    if told := _not_reproduced(given, side):
        warnings.warn(f"{path}: {'; '.join(told)}; here an image is resized with its shape kept "
                      f"and the central {side} x {side} pixels are taken", stacklevel=4)
    return data


def _not_reproduced(given, side):
    """What a processor does with an image's shape that our pipeline does otherwise."""
    if given.get("do_resize") is False:
        return ["do_resize = false"]
    size, crop = (_height_and_width(given.get(name)) for name in ("size", "crop_size"))
    told = []
    if given.get("do_center_crop", crop is not None):
        if crop is not None and set(crop) != {side}:
            told.append(f"crop_size = {given['crop_size']}")
    elif size is not None and len(size) == 2:
        told.append(f"size = {given['size']} without do_center_crop squashes an image")
    if size is not None and set(size) != {side}:
        told.append(f"size = {given['size']}")
    return told


def _height_and_width(value):
    """(height, width) of a size, (side,) of a shortest edge; None if it says nothing."""
    if isinstance(value, dict):
        edges = [value[name] for name in ("height", "width", "shortest_edge") if name in value]
        return tuple(edges) or None
    return None if value is None else (value,)


def _their_config(described):
    """Turns our settings into config.json, or says what the format cannot hold."""
    kind = described["objective"]["name"]
    if kind not in FORMS:
        raise unknown("objective with a Hugging Face format", kind, FORMS)
    for group, fields in FORMS[kind].items():
        for name, allowed in fields.items():
            value = described[group].get(name)
            if value not in allowed:
                raise UserError(f"Hugging Face's {kind} has no place for {group}.{name} = "
                                f"{value!r}, only for {' or '.join(map(repr, allowed))}")
    model, texts, objective = (described[group] for group in ("model", "text", "objective"))
    end = LEGACY_END if texts["pool"] == "highest" else texts["end"]
    if texts["pool"] == "end" and end == LEGACY_END:
        raise UserError(f"Hugging Face's clip takes eos_token_id = {LEGACY_END} for 'the highest "
                        f"id of a text', so it cannot hold text.end = {end}; use a tokenizer "
                        "whose end token has another id")
    if kind == "siglip" and objective["dim"] != model["width"]:
        raise UserError(f"Hugging Face's siglip needs objective.dim = {objective['dim']} to be "
                        f"model.width = {model['width']}")
    config = {"model_type": kind, "architectures": [{"clip": "CLIPModel",
                                                     "siglip": "SiglipModel"}[kind]],
              "text_config": _their_tower(texts) | {
                  "model_type": f"{kind}_text_model", "vocab_size": texts["vocab"],
                  "max_position_embeddings": texts["context"], "eos_token_id": end},
              "vision_config": _their_tower(model) | {
                  "model_type": f"{kind}_vision_model", "patch_size": model["patch"],
                  "image_size": described["data"]["image_size"], "num_channels": 3}}
    if kind == "clip":
        config["projection_dim"] = objective["dim"]
        for name in ("text_config", "vision_config"):
            config[name]["projection_dim"] = objective["dim"]
    else:
        config["text_config"]["projection_size"] = objective["dim"]
    if texts["vocab"] != TEXT[kind]["vocab_size"]:  # the defaults would lie outside
        config["text_config"] |= {"bos_token_id": None, "pad_token_id": None}
    return config


def _their_tower(settings):
    width = settings["width"]
    return {"hidden_size": width, "intermediate_size": round(settings["mlp_ratio"] * width),
            "num_hidden_layers": settings["layers"], "num_attention_heads": settings["heads"],
            "hidden_act": THEIR_ACTS[settings["act"]], "layer_norm_eps": settings["eps"]}
