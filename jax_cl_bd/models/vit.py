"""Vision transformers: CLIP's with a class token, SigLIP's with attention pooling.

Dosovitskiy et al. 2021; Radford et al. 2021, section 2.4 (a further norm before the blocks);
Zhai et al. 2023 (SigLIP: no class token, a bias in the patch embedding, the MAP head of Zhai et
al. 2022, "Scaling Vision Transformers"). First values: patch embedding as torch.nn.Conv2d; class
token, positions and probe N(0, width^-1/2); see `transformer` for the blocks.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import transformer
from jax_cl_bd.models.heads import TORCH_LINEAR


class ViT(nn.Module):
    """Images [N, H, W, 3] (any float) to features float32 [N, width], before any projection.

    The positional embedding is made for the images given at initialisation.

    Attributes:
        patch: side of a patch, pixels; must divide H and W.
        pool: "cls" = final norm of the class token; "map" = final norm of all, then one learned
            probe attends to them, followed by a perceptron.
        pre_norm: a norm between the embedding and the blocks (CLIP).
        patch_bias: the patch embedding has a bias (SigLIP).
        dtype: of the computation; parameters and features stay float32.
    """

    width: int
    layers: int
    heads: int
    patch: int
    mlp_ratio: float
    pool: str
    act: str
    eps: float
    pre_norm: bool
    patch_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(f"model.patch = {self.patch} does not divide images of "
                            f"{x.shape[1]} x {x.shape[2]} pixels; choose a divisor")
        std, size = self.width**-0.5, (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="VALID", use_bias=self.patch_bias,
                    dtype=self.dtype, kernel_init=TORCH_LINEAR, name="patch_embedding")(
                        x.astype(self.dtype))
        x = x.reshape(len(x), -1, self.width)  # [N, patches, width]
        normal = nn.initializers.normal(std)
        if self.pool == "cls":
            token = self.param("class_embedding", normal, (self.width,), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (len(x), 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        places = transformer.position_embedding(self, x.shape[1], self.width, std)
        x = x + places.astype(self.dtype)
        if self.pre_norm:
            x = transformer.layer_norm(self.eps, self.dtype, "ln_pre")(x)
        x = transformer.blocks(x, self, causal=False)
        norm = transformer.layer_norm(self.eps, self.dtype, "ln_post")
        if self.pool == "cls":
            return norm(x[:, 0]).astype(jnp.float32)
        pool = AttentionPool(self.heads, self.mlp_ratio, self.act, self.eps, self.dtype,
                             name="pool")
        return pool(norm(x)).astype(jnp.float32)


class AttentionPool(nn.Module):
    """[N, T, D] to [N, D]: y = attention(probe, x), then y + mlp(norm(y))."""

    heads: int
    mlp_ratio: float
    act: str
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        std = width**-0.5
        probe = self.param("probe", nn.initializers.normal(std), (width,), jnp.float32)
        probe = jnp.broadcast_to(probe.astype(self.dtype), (len(x), 1, width))
        y = transformer.Attention(self.heads, std, self.dtype, name="attention")(probe, x)
        z = transformer.layer_norm(self.eps, self.dtype, "ln")(y)
        mlp = transformer.Perceptron(self.mlp_ratio, self.act, std, self.dtype, name="mlp")
        return (y + mlp(z))[:, 0]


def vit(cfg) -> ViT:
    """Returns the vision transformer of cfg = config.model.

    Raises:
        UserError: an unknown pool or act, heads that do not divide the width, or a size that is
            not positive.
    """
    transformer.check(cfg, "model")
    if cfg.pool not in ("cls", "map"):
        raise unknown("model.pool", cfg.pool, ("cls", "map"))
    if cfg.patch < 1:
        raise UserError(f"model.patch = {cfg.patch}; must be at least 1 pixel")
    return ViT(width=cfg.width, layers=cfg.layers, heads=cfg.heads, patch=cfg.patch,
               mlp_ratio=cfg.mlp_ratio, pool=cfg.pool, act=cfg.act, eps=cfg.eps,
               pre_norm=cfg.pre_norm, patch_bias=cfg.patch_bias, dtype=jnp.dtype(cfg.dtype))
