"""An encoder as evaluations and defenses see it: images or captions in, features out."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import checkpoint, parallel, run_folder
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, parts
from jax_cl_bd.models.pair import Pair, modules_of

BATCH_SIZE = 512  # of encoders that no config describes


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
        pair: the image-text model that it is half of, else None.
        step: the training step of its weights, where it was read from a checkpoint.
        watchers: called with the number of images of every batch that `image` encodes.
    """

    module: Any
    variables: Any
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    mesh: jax.sharding.Mesh
    batch_size: int = BATCH_SIZE
    pair: Pair | None = None
    step: int | None = None
    watchers: list[Callable[[int], None]] = dataclasses.field(
        default_factory=list, repr=False, compare=False)

    @property
    def text(self) -> Callable[[list[str]], np.ndarray] | None:
        """Encodes captions into the shared space: list of str -> float32 [N, E], unit vectors.

        None of a model without a text tower, and so are `project` and `logit_scale`: ask before.
        """
        return self.pair and self.pair.text

    @property
    def project(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Takes image features [N, D] into the shared space: float32 [N, E], unit vectors."""
        return self.pair and self.pair.project

    @property
    def logit_scale(self) -> float | None:
        """What cosines are multiplied with."""
        return self.pair and self.pair.logit_scale

    def image(self, images: np.ndarray) -> np.ndarray:
        """Encodes uint8 [N, S, S, 3]; gives float32 [N, D]. The last batch is padded, not cut.

        Raises:
            UserError: images of another type or size.
        """
        self._check(images)
        size = min(self.batch_size, -(-len(images) // self.mesh.size) * self.mesh.size)
        size = max(size // self.mesh.size, 1) * self.mesh.size
        mean, std = np.float32(self.mean), np.float32(self.std)
        out = []
        with jax.set_mesh(self.mesh):
            for start in range(0, len(images), size):
                block = images[start:start + size]
                padded = np.zeros((size, *images.shape[1:]), np.uint8)
                padded[:len(block)] = block
                rows = parallel.share_rows(self.mesh, padded)
                out.append((_features(self.module, self.variables, rows, mean, std), len(block)))
                for watcher in self.watchers:
                    watcher(len(block))
        return np.concatenate([parallel.to_host(z)[:n] for z, n in out])


    def _check(self, images):
        side, shape = self.image_size, np.shape(images)
        dtype = getattr(images, "dtype", type(images).__name__)
        if dtype != np.uint8:
            raise UserError(f"images are {dtype}; an encoder takes uint8, 0 to 255, and normalises "
                            "them itself")
        if len(shape) != 4 or not len(images) or shape[1:] != (side, side, 3):
            raise UserError(f"images have shape {list(shape)}; this encoder takes [N, {side}, "
                            f"{side}, 3] with N at least 1")


def of_parts(cfg: ml_collections.ConfigDict, variables, mesh, tokenizer=None) -> Encoder:
    """Wraps the variables of a whole model, {"params": {part: ...}, "batch_stats": {part: ...}}.

    Heads of image objectives are left out; of an image-text model both towers are kept, and the
    tokenizer is needed.
    """
    encoder = make(cfg, {name: variables[name]["encoder"] for name in variables}, mesh)
    if cfg.text.name == "none":
        return encoder
    whole = Pair(tuple(modules_of(cfg).items()), variables, tokenizer, cfg.text.context,
                 cfg.evals.batch_size)
    return dataclasses.replace(encoder, pair=whole)


def make(cfg: ml_collections.ConfigDict, variables, mesh) -> Encoder:
    """Wraps {"params", "batch_stats"} of the image encoder that a config describes."""
    return Encoder(build.build(cfg.model), variables, tuple(cfg.data.mean), tuple(cfg.data.std),
                   cfg.data.image_size, mesh, cfg.evals.batch_size)


def abstract_parts(cfg: ml_collections.ConfigDict) -> dict:
    """Gives the shapes of {"params": {part: ...}, "batch_stats": {part: ...}} without making them:
    the encoder's alone, or all of an image-text model."""
    side = cfg.data.image_size
    whole = cfg.text.name != "none"
    modules = modules_of(cfg) if whole else {"encoder": build.build(cfg.model)}
    return jax.eval_shape(
        lambda key: parts.init_variables(modules, key, (side, side, 3), whole and cfg.text.context),
        jax.random.key(0))


def load(path, mesh=None) -> Encoder:
    """Opens the encoder of a run folder, of a defense's folder or of a hub folder.

    A run that is not complete gives its newest good checkpoint, and a warning.

    Raises:
        UserError: the folder has no config.json, or no good checkpoint, or no weights; or it is of
            a complete run whose last checkpoint is damaged.
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
    last = run_folder.last_step(folder)
    if last is not None and step != last:
        raise UserError(f"{folder} was trained to step {last}, but its newest good checkpoint is "
                        f"that of step {step}: train the rest again with --stages=pretrain")
    if run_folder.is_begun(folder):
        print(f"warning: the training of {folder} is not complete; this is its encoder of step "
              f"{step}", file=sys.stderr)
    sharding = parallel.replicated(mesh)
    item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                        abstract_parts(cfg))
    state = checkpoint.restore_part(folder / "checkpoints", step, item)
    found = of_parts(cfg, {name: state[name] for name in item}, mesh, _tokenizer(cfg, folder))
    return dataclasses.replace(found, step=step)


def tokenizer_file(folder: epath.Path) -> epath.Path:
    """Of a defense's folder or a run folder; a control's tokenizer lies in the folder around it."""
    places = (folder, folder / "poison", folder.parent / "poison")
    found = [place / "tokenizer.json" for place in places if (place / "tokenizer.json").exists()]
    return found[0] if found else folder / "poison" / "tokenizer.json"


def _tokenizer(cfg, folder):
    return None if cfg.text.name == "none" else tokenizers.load(tokenizer_file(folder))


def _load_hub(folder: epath.Path, mesh) -> Encoder:
    from jax_cl_bd.models import hub, hub_clip  # safetensors are read only when asked for

    if (folder / "config.json").exists():  # Hugging Face's; a ResNet has none
        described, variables = hub_clip.load(folder)
        cfg = ml_collections.ConfigDict(described | {"evals": {"batch_size": BATCH_SIZE}})
        tokenizer = tokenizers.load(cfg.text.tokenizer) if cfg.text.tokenizer else None
        return of_parts(cfg, parallel.put_replicated(mesh, variables), mesh, tokenizer)
    described, variables = hub.load_resnet(folder)
    cfg = ml_collections.ConfigDict(described)
    return Encoder(build.build(cfg.model), parallel.put_replicated(mesh, variables),
                   tuple(cfg.data.mean), tuple(cfg.data.std), cfg.data.image_size, mesh)
