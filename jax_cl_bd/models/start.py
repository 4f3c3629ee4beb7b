"""Weights from elsewhere: to train on (config.init_from), or to be judged (config.victim).

The folder is one of Hugging Face's CLIP or SigLIP, one with a ResNet's model.safetensors, or a
finished run's (a control's or a defense's too). An image-text objective takes all parts, an image
objective the encoder alone; its heads are drawn.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import parallel, run_folder
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import pair

SHARED = ("dim", "image_projection", "text_bias", "scale_init", "bias_init")  # of the objective
OWN = ("dtype", "bn_groups")  # of model and text: how the experiment computes


def with_weights(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """With --config.init_from, takes what describes the model from that folder.

    That is model, text with its tokenizer, the objective's heads, and the normalisation and size
    of the images; not how the experiment computes (dtype, bn_groups).

    Raises:
        UserError: no weights there, weights of another kind than the objective, or no tokenizer.
    """
    if not cfg.init_from:
        return cfg
    theirs = described(cfg.init_from, "init_from")
    if cfg.text.name != "none":
        _check_kind(cfg, theirs)
    merged = _merged(cfg, theirs)
    if cfg.text.name != "none":
        merged["objective"] |= _heads(theirs)
        _check_tokenizer(merged, f"init_from={cfg.init_from!r}")
    return ml_collections.ConfigDict(merged).lock()


def of_victim(cfg: ml_collections.ConfigDict, *, needs_text: bool = True
              ) -> ml_collections.ConfigDict:
    """With a --config.victim of which there are weights alone, takes what describes the model from
    there, as `with_weights` does, and says that nothing is known of any attack on it.

    An image-text experiment takes the model's own kind of objective, and gets along without a text
    tower where there is none; an experiment on images takes the image tower alone. No trigger is
    tested, unless attack.trigger_from names one. `needs_text`: refuses a text tower without a
    tokenizer.

    Raises:
        UserError: no weights there, or no tokenizer.
    """
    theirs = described(cfg.victim, "victim")
    merged = _merged(cfg, theirs)
    if cfg.text.name != "none" and not _has_text(theirs):
        merged["text"] = {"name": "none"}
    elif cfg.text.name != "none":
        kept = {name: value for name, value in merged["objective"].items() if name not in SHARED}
        merged["objective"] = {"ring": False, **kept, "name": theirs["objective"]["name"],
                               **_heads(theirs)}
        if needs_text:
            _check_tokenizer(merged, f"victim={cfg.victim!r}")
    merged["attack"] |= {"name": "none", "poisons": 0}
    if not cfg.attack.trigger_from:
        merged["attack"]["trigger"]["name"] = "none"
        merged["attack"]["target"] = 0
    return ml_collections.ConfigDict(merged | {"init_from": ""}).lock()


def open_victim(cfg: ml_collections.ConfigDict, folder: epath.Path, mesh=None
                ) -> encoders.Encoder:
    """Loads a victim as its config takes it: of images alone, or with the tokenizer that the config
    names where the folder has none."""
    found = encoders.load(folder, mesh)
    if found.pair is None:
        return found
    if cfg.text.name == "none":
        return dataclasses.replace(found, pair=None)
    if found.pair.tokenizer is None and cfg.text.tokenizer:
        pair = dataclasses.replace(found.pair, tokenizer=tokenizers.load(cfg.text.tokenizer))
        return dataclasses.replace(found, pair=pair)
    return found


def fingerprint(encoder: encoders.Encoder) -> str:
    """SHA-256 of an encoder's weights and of how images come to it, whatever file they lay in."""
    variables = encoder.variables if encoder.pair is None else encoder.pair.variables
    digest = hashlib.sha256(repr((encoder.mean, encoder.std, encoder.image_size)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(variables)):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf, np.float32).tobytes())
    return digest.hexdigest()


def load(cfg: ml_collections.ConfigDict) -> dict:
    """The weights that training starts from, as host arrays: {"params": {part: ...},
    "batch_stats": {part: ...}} of the parts that are not drawn; none without init_from.

    Raises:
        UserError: no finished weights there, or not those of the config's model.
    """
    if not cfg.init_from:
        return {"params": {}, "batch_stats": {}}
    folder = epath.Path(cfg.init_from)
    if (folder / "pretrain").exists() and not run_folder.is_done(folder / "pretrain"):
        raise UserError(f"init_from={cfg.init_from!r} is a run that has not finished pretraining; "
                        "finish it first")
    opened = encoders.load(folder, parallel.one_device())
    if cfg.text.name != "none" and opened.pair is not None:
        variables = opened.pair.variables
    else:
        variables = {kind: {"encoder": opened.variables.get(kind, {})}
                     for kind in ("params", "batch_stats")}
    wanted = encoders.abstract_parts(cfg)
    for kind, parts in variables.items():
        if _shapes(parts) != _shapes(wanted[kind]):
            raise UserError(f"init_from={cfg.init_from!r} no longer holds the model that this "
                            "run's config describes; was the folder changed?")
    return jax.device_get(variables)


def placed(variables: dict, weights: dict) -> dict:
    """Variables as they are drawn, with the parts that `load` gave in their place."""
    return {kind: variables[kind] | jax.tree.map(jnp.copy, weights[kind])
            for kind in ("params", "batch_stats")}


def described(path: str, field: str) -> dict:
    """{"model", "text", "objective", "data"} of the model in a folder that a field of the config
    names, as dicts; of a ResNet without text and objective.

    Raises:
        UserError: the folder holds no model.
    """
    folder = epath.Path(path)
    if (folder / "model.safetensors").exists():
        from jax_cl_bd.models import hub, hub_clip_config  # read only when asked for

        if (folder / "config.json").exists():
            return hub_clip_config.read(folder)
        return hub.load_resnet(folder)[0]
    if not (folder / "config.json").exists():
        raise UserError(f"{field}={str(folder)!r} is neither a run folder (config.json and "
                        "checkpoints) nor a folder with model.safetensors")
    theirs = run_folder.read_config(folder)
    found = {group: theirs[group].to_dict() for group in ("model", "text", "objective", "data")}
    if theirs.text.name != "none":
        found["text"]["tokenizer"] = str(encoders.tokenizer_file(folder))
    return found


def _merged(cfg, theirs):
    """The config with a model's own description, its text tower where the config has one."""
    merged = cfg.to_dict()
    merged["model"] = _taken(theirs["model"], merged["model"])
    merged["data"] |= {name: theirs["data"][name] for name in ("mean", "std", "image_size")}
    if cfg.text.name != "none" and _has_text(theirs):
        merged["text"] = _taken(theirs["text"], merged["text"])
        merged["text"]["tokenizer"] = theirs["text"]["tokenizer"] or cfg.text.tokenizer
    return merged


def _heads(theirs):
    return {name: theirs["objective"][name] for name in SHARED if name in theirs["objective"]}


def _has_text(theirs):
    return theirs.get("text", {"name": "none"})["name"] != "none"


def _check_tokenizer(merged, said):
    if not merged["text"]["tokenizer"]:
        raise UserError(f"{said} has no tokenizer.json, so nothing says which ids its text tower "
                        "knows; put the model's own there, or name it: "
                        "--config.text.tokenizer=FILE")


def _taken(theirs: dict, own: dict) -> dict:
    return theirs | {name: own[name] for name in OWN if name in own}


def _check_kind(cfg, theirs):
    if not _has_text(theirs):
        raise UserError(f"init_from={cfg.init_from!r} holds an image encoder alone, and objective "
                        f"{cfg.objective.name!r} trains a text tower too; name an image-text model")
    found, wanted = pair.kind(theirs["objective"]), pair.kind(cfg.objective)
    if found != wanted:
        raise UserError(f"init_from={cfg.init_from!r} holds a {found} model, and objective.name is "
                        f"{cfg.objective.name!r}; choose objective={found} after the colon of "
                        "--config, or other weights")


def _shapes(tree):
    return {jax.tree_util.keystr(path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
