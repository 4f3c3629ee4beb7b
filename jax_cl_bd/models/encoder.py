"""An encoder as evaluations and defenses see it: uint8 images in, features out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import checkpoint, parallel, run_folder
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build


@functools.partial(jax.jit, static_argnums=(0,))
def _features(module, variables, images, mean, std):
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    return module.apply(variables, x, train=False).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen encoder with the preprocessing that it was trained with.

    Attributes:
        module: linen module; `__call__(x, train)` gives features before any head.
        variables: {"params", "batch_stats"} of the module.
        mean, std: per-channel normalisation, of images in [0, 1].
        image_size: side of the square input, pixels.
        text, logit_scale: None unless the encoder is half of an image-text model.
    """

    module: Any
    variables: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    mesh: jax.sharding.Mesh
    batch_size: int = 512
    text: Callable | None = None
    logit_scale: float | None = None

    def image(self, images: np.ndarray) -> np.ndarray:
        """Encodes uint8 [N, S, S, 3]; gives float32 [N, D]. The last batch is padded, not cut."""
        size = min(self.batch_size, -(-len(images) // self.mesh.size) * self.mesh.size)
        size = max(size // self.mesh.size, 1) * self.mesh.size
        mean, std = np.float32(self.mean), np.float32(self.std)
        out = []
        with jax.set_mesh(self.mesh):
            for start in range(0, len(images), size):
                block = images[start:start + size]
                padded = np.zeros((size, *images.shape[1:]), np.uint8)
                padded[:len(block)] = block
                rows = parallel.put_rows(self.mesh, padded)
                out.append((_features(self.module, self.variables, rows, mean, std), len(block)))
        return np.concatenate([np.asarray(z)[:n] for z, n in out])


def make(cfg: ml_collections.ConfigDict, variables, mesh) -> Encoder:
    """Wraps {"params", "batch_stats"} of the encoder that a config describes."""
    return Encoder(build.build(cfg.model), variables, tuple(cfg.data.mean), tuple(cfg.data.std),
                   cfg.data.image_size, mesh, cfg.evals.batch_size)


def abstract_variables(cfg: ml_collections.ConfigDict):
    """Gives the shapes of an encoder's {"params", "batch_stats"}, without making them."""
    side = cfg.data.image_size
    image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    module = build.build(cfg.model)
    shapes = jax.eval_shape(lambda key, x: module.init(key, x, train=False),
                            jax.random.key(0), image)
    return {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}


def load(path, mesh=None) -> Encoder:
    """Opens the encoder of a run folder, of a defense's folder or of a hub folder.

    Raises:
        UserError: the folder has no config.json, or no good checkpoint, or no weights.
    """
    folder = epath.Path(path)
    if mesh is None:
        mesh = parallel.make_mesh(ml_collections.ConfigDict({"data": -1, "fsdp": 1}))
    if (folder / "model.safetensors").exists():
        return _load_hub(folder, mesh)
    cfg = run_folder.read_config(folder)
    step = checkpoint.newest_good_step(folder / "checkpoints")
    if step is None:
        raise UserError(f"{folder} holds no good checkpoint: run the pretrain stage first")
    shapes = abstract_variables(cfg)
    sharding = parallel.replicated(mesh)
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                        {name: {"encoder": shapes[name]} for name in shapes})
    state = checkpoint.restore_part(folder / "checkpoints", step, item)
    return make(cfg, {name: state[name]["encoder"] for name in shapes}, mesh)


def _load_hub(folder: epath.Path, mesh) -> Encoder:
    from jax_cl_bd.models import hub  # safetensors are read only when asked for

    described, variables = hub.load_resnet(folder)
    cfg = ml_collections.ConfigDict(described)
    return Encoder(build.build(cfg.model), parallel.put_replicated(mesh, variables),
                   tuple(cfg.data.mean), tuple(cfg.data.std), cfg.data.image_size, mesh)
