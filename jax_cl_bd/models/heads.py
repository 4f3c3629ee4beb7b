"""Projection and prediction heads: small perceptrons on top of the features."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cl_bd.models.norm import BatchNorm

# torch.nn.Linear draws weights and biases from U(-1/sqrt(inputs), 1/sqrt(inputs)).
TORCH_LINEAR = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
CLIP_PROJECTION = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class MLP(nn.Module):
    """Linear layers with ReLU between them, in float32; [N, D] -> [N, out].

    A layer followed by batch norm has no bias, since the norm takes it away again.

    Attributes:
        hidden: widths of the hidden layers.
        out: width of the output.
        hidden_norm: batch norm after every hidden layer, before its ReLU.
        out_norm: batch norm without scale and bias after the last layer.
        bn_groups: see `norm.BatchNorm`.
    """

    hidden: tuple[int, ...]
    out: int
    hidden_norm: bool = False
    out_norm: bool = False
    bn_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i, width in enumerate(self.hidden, start=1):
            x = _linear(x, width, bias=not self.hidden_norm, name=f"linear{i}")
            if self.hidden_norm:
                x = BatchNorm(groups=self.bn_groups, name=f"bn{i}")(x, train)
            x = nn.relu(x)
        last = len(self.hidden) + 1
        x = _linear(x, self.out, bias=not self.out_norm, name=f"linear{last}")
        if self.out_norm:
            x = BatchNorm(groups=self.bn_groups, affine=False, name=f"bn{last}")(x, train)
        return x


class Projection(nn.Module):
    """One linear layer into the shared space of images and texts, float32; [N, D] -> [N, dim].

    First weights N(0, D^-1/2), as in CLIP's release (Radford et al. 2021); bias zero.
    """

    dim: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.Dense(self.dim, use_bias=self.use_bias, kernel_init=CLIP_PROJECTION,
                        name="dense")(x)


class LogitScale(nn.Module):
    """The learned logarithm of the logits' scale, and for SigLIP their bias; float32 scalars.

    Its call takes any input and gives (logit_scale, logit_bias or None).

    Attributes:
        scale_init: first logarithm, e.g. ln(1 / 0.07). (A field called `init` would hide linen's
            method of that name.)
        bias_init: first bias; None for no bias.
    """

    scale_init: float
    bias_init: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array | None]:
        constant = nn.initializers.constant
        scale = self.param("logit_scale", constant(self.scale_init), (), jnp.float32)
        if self.bias_init is None:
            return scale, None
        return scale, self.param("logit_bias", constant(self.bias_init), (), jnp.float32)


def _linear(x, width, *, bias, name):
    bound = 1 / math.sqrt(x.shape[-1])

    def bias_init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, use_bias=bias, kernel_init=TORCH_LINEAR, bias_init=bias_init,
                    name=name)(x)
