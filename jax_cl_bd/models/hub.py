"""ResNet-18 and -50 weights from and to torchvision's names, as safetensors.

Arrays: convolutions [O, I, H, W] there, [H, W, I, O] here; a norm's weight, bias, running_mean
and running_var are our scale, bias, mean and var. A classifier (fc.*) is no part of an encoder:
it is accepted, reported and dropped. num_batches_tracked may be there or not.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import build, weights_file

CLASSIFIER = ("fc.weight", "fc.bias")
# torchvision's transforms for its ImageNet weights.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SIDES = {"imagenet": 224, "cifar": 32}
LEAVES = {("params", "scale"): "weight", ("params", "bias"): "bias",
          ("batch_stats", "mean"): "running_mean", ("batch_stats", "var"): "running_var",
          ("params", "kernel"): "weight"}


def load_resnet(path) -> tuple[dict, dict]:
    """Reads a safetensors file, or model.safetensors in a folder.

    Returns:
        {"model": what `build.build` takes, "data": {"mean", "std", "image_size"}, "ignored": names
        of the classifier's arrays} and the encoder's {"params", "batch_stats"}, float32. `data`
        comes from the file's metadata if `save_resnet` wrote it, else it is ImageNet's mean and
        deviation and 224 or, with a 3x3 stem, 32 pixels; a warning says so.

    Raises:
        UserError: no such file, not safetensors, bfloat16, a missing or an unknown array, a wrong
            shape.
    """
    path = weights_file.find(path)
    arrays, metadata = weights_file.read(path)
    model = _describe(path, arrays)
    shapes = _shapes(model)
    ignored = sorted(set(arrays) & set(CLASSIFIER))
    if ignored:
        warnings.warn(f"{path}: ignored {', '.join(ignored)}; an encoder has no classifier",
                      stacklevel=2)
    missing = sorted(set(shapes) - set(arrays))
    extra = sorted(k for k in set(arrays) - set(shapes) - set(ignored)
                   if not _is_counter(k, shapes))
    if missing or extra:
        told = [f"missing: {', '.join(missing)}"] * bool(missing)
        told += [f"unknown: {', '.join(extra)}"] * bool(extra)
        raise UserError(f"{path} is no {model['name']} with torchvision's names; "
                        f"{'; '.join(told)}")
    flat = {}
    for name, (place, shape) in shapes.items():
        array = _ours(np.asarray(arrays[name], np.float32))
        if array.shape != shape:
            raise UserError(f"{path}: {name} has shape {arrays[name].shape}; {model['name']} "
                            f"of width {model['width']} needs {_theirs(np.empty(shape)).shape}")
        flat[place] = array
    return ({"model": model, "data": _data(path, metadata, model["stem"]), "ignored": ignored},
            traverse_util.unflatten_dict(flat))


def save_resnet(path, name: str, stem: str, variables: dict, *, data: dict | None = None) -> None:
    """Writes an encoder under torchvision's names, to a file or to FOLDER/model.safetensors.

    Args:
        path: a file that ends in .safetensors, or a folder.
        name, stem: as in config.model; only ResNet-18 and -50 have torchvision names.
        variables: the encoder's {"params", "batch_stats"}.
        data: {"mean", "std", "image_size"} it was trained with, kept as metadata.

    Raises:
        UserError: another model, or variables that are not this model's.
    """
    if name not in ("resnet18", "resnet50"):
        raise unknown("model with torchvision names", name, ("resnet18", "resnet50"))
    flat = traverse_util.flatten_dict({k: variables[k] for k in ("params", "batch_stats")})
    kernel = flat.get(("params", "conv1", "kernel"))
    if kernel is None:
        raise UserError("these variables are no ResNet: params/conv1/kernel is missing")
    shapes = _shapes(_model(name, stem, kernel.shape[-1]))
    places = {place: shape for place, shape in shapes.values()}
    wrong = [p for p in set(places) | set(flat) if places.get(p) != getattr(flat.get(p), "shape",
                                                                           None)]
    if wrong:
        raise UserError(f"these variables are no {name} with {stem} stem; missing, unknown or of "
                        f"another shape: {', '.join(sorted('/'.join(p) for p in wrong))}")
    arrays = {key: _theirs(np.asarray(jax.device_get(flat[place]), np.float32))
              for key, (place, _) in shapes.items()}
    # PyTorch counts batches only to average without momentum; torchvision's files hold the key.
    arrays |= {key.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
               for key in arrays if key.endswith("running_mean")}
    metadata = {}
    if data is not None:
        metadata["data"] = json.dumps({"mean": list(data["mean"]), "std": list(data["std"]),
                                       "image_size": int(data["image_size"])})
    weights_file.write(weights_file.find(path), arrays, metadata)


def _describe(path, arrays):
    stem = arrays.get("conv1.weight")
    if stem is None or stem.ndim != 4 or stem.shape[-1] not in (3, 7):
        seen = "is missing" if stem is None else f"has shape {stem.shape}"
        raise UserError(f"{path} is no ResNet with torchvision's names: conv1.weight {seen}; "
                        "it must be [width, 3, 7, 7] or, with a CIFAR stem, [width, 3, 3, 3]")
    name = "resnet50" if "layer1.0.conv3.weight" in arrays else "resnet18"
    return _model(name, "imagenet" if stem.shape[-1] == 7 else "cifar", stem.shape[0])


def _model(name, stem, width):
    return {"name": name, "stem": stem, "width": int(width), "stages": (), "stem_stride": 1,
            "first_stride": 1, "dtype": "float32", "bn_groups": 1}


def _shapes(model):
    """Gives {torchvision name: (place in our variables, our shape)}."""
    module = build.build(ml_collections.ConfigDict(model))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(lambda key, x: module.init(key, x, train=False),
                            jax.random.key(0), image)
    flat = traverse_util.flatten_dict({k: shapes[k] for k in ("params", "batch_stats")})
    return {_name(place): (place, leaf.shape) for place, leaf in flat.items()}


def _name(place):
    """("params", "layer1_0", "downsample_bn", "scale") -> "layer1.0.downsample.1.weight"."""
    kind, *parts, leaf = place
    parts = [p.replace("_", ".") if p.startswith("layer") else
             {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}.get(p, p)
             for p in parts]
    return ".".join([*parts, LEAVES[kind, leaf]])


def _is_counter(name, shapes):
    stem, _, leaf = name.rpartition(".")
    return leaf == "num_batches_tracked" and f"{stem}.running_mean" in shapes


def _ours(array):
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _theirs(array):
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array


def _data(path, metadata, stem):
    if "data" in metadata:
        data = json.loads(metadata["data"])
        return {"mean": tuple(data["mean"]), "std": tuple(data["std"]),
                "image_size": data["image_size"]}
    data = {**IMAGENET, "image_size": SIDES[stem]}
    warnings.warn(f"{path} does not say how its images were normalised; assumed ImageNet's mean "
                  f"{data['mean']}, deviation {data['std']} and {data['image_size']} pixels",
                  stacklevel=3)
    return data
