"""Reads and writes safetensors files, with errors that say what is wrong with the file."""

import json

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from jax_cl_bd.errors import UserError


def find(path) -> epath.Path:
    """Gives the path itself if it ends in .safetensors, else PATH/model.safetensors."""
    path = epath.Path(path)
    return path if path.suffix == ".safetensors" else path / "model.safetensors"


def read(path: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a file's arrays and its metadata.

    Raises:
        UserError: no such file, not safetensors, bfloat16 or float8.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give a .safetensors file or a folder that holds "
                        "model.safetensors")
    content = path.read_bytes()
    try:
        arrays = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or it is cut off: {error}") from None
    except KeyError as kind:  # safetensors' NumPy reader knows no bfloat16 or float8
        raise UserError(f"{path} holds arrays of type {kind}; convert them to float32 or "
                        "float16") from None
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    return arrays, header.get("__metadata__", {})


def write(path: epath.Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays under their names, as PyTorch's readers expect them; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) if array.ndim else array
              for name, array in arrays.items()}
    path.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"} | metadata))
