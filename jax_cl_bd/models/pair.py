"""An image-text model: two towers, their projections into a shared space, and a logit scale.

Its parts, in this order: "encoder" (image tower), "image_projection" (not where the tower's pooling
already ends in the shared space), "text", "text_projection", "scale".
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd import parallel
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, parts, text
from jax_cl_bd.models.heads import LogitScale, Projection


def heads(cfg) -> dict:
    """{part: linen module} of what lies on top of the towers, of cfg = config.objective.

    Reads dim, image_projection, scale_init, and SigLIP's own text_bias and bias_init.
    """
    image = {"image_projection": Projection(cfg.dim)} if cfg.image_projection else {}
    return {**image, "text_projection": Projection(cfg.dim, use_bias=cfg.get("text_bias", False)),
            "scale": LogitScale(cfg.scale_init, cfg.get("bias_init", None))}


def kind(cfg) -> str:
    """"siglip" of a model whose scale has a bias, else "clip", whatever loss trained it; cfg as
    above, or the same as a dict."""
    return "clip" if cfg.get("bias_init", None) is None else "siglip"


def modules_of(cfg) -> dict:
    """{part: linen module} of the whole config, in the order of the data."""
    top = heads(cfg.objective)
    image = {name: top.pop(name) for name in ("image_projection",) if name in top}
    return {"encoder": build.build(cfg.model), **image, "text": text.build(cfg.text), **top}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A frozen image-text model, beside the encoder that is its image tower.

    Attributes:
        modules: (part, linen module) pairs; hashable, so that models of one config share a compile.
        variables: {"params": {part: ...}, "batch_stats": {part: ...}} of all parts.
        tokenizer, context: how captions become tokens.
    """

    modules: tuple
    variables: Any
    tokenizer: Any
    context: int
    batch_size: int = 512

    def text(self, captions: list[str]) -> np.ndarray:
        """Encodes captions: float32 [N, E], unit vectors. The last batch is padded, not cut."""
        if self.tokenizer is None:
            raise UserError("this image-text model came without a tokenizer.json; put one beside "
                            "its model.safetensors")
        out = []
        for start in range(0, len(captions), self.batch_size):
            block = list(captions[start:start + self.batch_size])
            size = min(self.batch_size, 1 << (len(block) - 1).bit_length())  # few shapes to compile
            tokens = self.tokenizer.encode(block + [""] * (size - len(block)), self.context)
            z = _unit(self.modules, ("text", "text_projection"), self.variables, tokens)
            out.append(parallel.to_host(z)[:len(block)])
        return np.concatenate(out)

    def project(self, features: np.ndarray) -> np.ndarray:
        """Takes image features [N, D] into the shared space: float32 [N, E], unit vectors."""
        names = tuple(name for name, _ in self.modules if name == "image_projection")
        return parallel.to_host(_unit(self.modules, names, self.variables, np.asarray(features)))

    def image_embedding(self, x: jax.Array) -> jax.Array:
        """Embeds normalised images [N, S, S, 3] in the shared space, [N, E], not of unit length; a
        traceable function, to differentiate through."""
        apply_fns = parts.make_apply_fns(dict(self.modules))
        for name in ("encoder", "image_projection"):
            if name in apply_fns:
                x, _ = apply_fns[name](self.variables, x, False)
        return x

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with."""
        return float(np.exp(self.variables["params"]["scale"]["logit_scale"]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unit(modules, names, variables, x):
    """Runs the named parts one after another in test mode; the result in unit length."""
    apply_fns = parts.make_apply_fns(dict(modules))
    for name in names:
        x, _ = apply_fns[name](variables, x, False)
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
