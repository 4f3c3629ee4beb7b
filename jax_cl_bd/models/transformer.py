"""Pre-LN transformer blocks that the image and the text towers share.

Radford et al. 2021 (CLIP), section 2.4, with the initial values of their released model: attention
N(0, w^-1/2), the last layer of each residual branch N(0, w^-1/2 (2 layers)^-1/2), the first layer
of the perceptron N(0, (2 w)^-1/2), w being the width; biases zero. They draw so in the text tower
alone; here, as in Hugging Face's CLIP, in the image tower too, and in SigLIP's pooling head.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cl_bd.errors import UserError, unknown


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), the approximation of GELU in OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTS = {"quick_gelu": quick_gelu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


def check(cfg, group: str) -> None:
    """Checks the fields that every transformer has; `group` is their place in the config.

    Raises:
        UserError: naming the field.
    """
    if cfg.act not in ACTS:
        raise unknown(f"{group}.act", cfg.act, ACTS)
    if cfg.dtype not in ("float32", "bfloat16"):
        raise unknown(f"{group}.dtype", cfg.dtype, ("float32", "bfloat16"))
    for name in ("width", "layers", "heads"):
        if cfg[name] < 1:
            raise UserError(f"{group}.{name} = {cfg[name]}; must be at least 1")
    if cfg.width % cfg.heads:
        raise UserError(f"{group}.heads = {cfg.heads} does not divide {group}.width = "
                        f"{cfg.width}; a head of 64 channels is usual")
    for name in ("mlp_ratio", "eps"):
        if cfg[name] <= 0:
            raise UserError(f"{group}.{name} = {cfg[name]}; must be positive")


def layer_norm(eps, dtype, name):
    """Layer norm whose statistics are float32, by the two-pass formula."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def position_embedding(module: nn.Module, count: int, width: int, std: float) -> jax.Array:
    """Gives the parameter `position_embedding` [count, width] of a module.

    Raises:
        UserError: the module's parameters were made for another count.
    """
    name = "position_embedding"
    if module.has_variable("params", name):
        made = module.get_variable("params", name).shape[0]
        if made != count:
            raise UserError(f"images of {count} positions (patches, and one more for the pooled "
                            f"token if there is one), but the model was made for {made}; give "
                            "images of the size it was made for")
    return module.param(name, nn.initializers.normal(std), (count, width), jnp.float32)


class Attention(nn.Module):
    """Multi-head attention of [N, Q, D] to [N, T, D]; gives [N, Q, D]. Softmax in float32.

    Attributes:
        heads: number of heads; divides D.
        out_std: deviation of the output layer's first weights; None leaves that layer out.
    """

    heads: int
    out_std: float | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, queries: jax.Array, x: jax.Array, *, causal: bool = False) -> jax.Array:
        width = queries.shape[-1]
        std = width**-0.5

        def heads(inputs, name):
            y = dense(width, std, self.dtype, name)(inputs)
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        y = jax.nn.dot_product_attention(heads(queries, "query"), heads(x, "key"),
                                         heads(x, "value"), is_causal=causal)
        y = y.reshape(queries.shape)
        return y if self.out_std is None else dense(width, self.out_std, self.dtype, "out")(y)


class Perceptron(nn.Module):
    """Two layers with an activation between them, the first `ratio` times as wide."""

    ratio: float
    act: str
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = dense(round(self.ratio * width), (2 * width)**-0.5, self.dtype, "fc1")(x)
        return dense(width, self.out_std, self.dtype, "fc2")(ACTS[self.act](x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    heads: int
    mlp_ratio: float
    act: str
    eps: float
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        y = layer_norm(self.eps, self.dtype, "ln1")(x)
        x = x + Attention(self.heads, self.out_std, self.dtype, name="attention")(
            y, y, causal=causal)
        y = layer_norm(self.eps, self.dtype, "ln2")(x)
        return x + Perceptron(self.mlp_ratio, self.act, self.out_std, self.dtype, name="mlp")(y)


def blocks(x: jax.Array, module: nn.Module, *, causal: bool) -> jax.Array:
    """Runs the blocks block0, block1, ... of a tower, from inside its compact method.

    Args:
        x: [N, T, D].
        module: has the attributes layers, heads, mlp_ratio, act, eps and dtype.
    """
    out_std = x.shape[-1]**-0.5 * (2 * module.layers)**-0.5
    for i in range(module.layers):
        x = Block(module.heads, module.mlp_ratio, module.act, module.eps, out_std, module.dtype,
                  name=f"block{i}")(x, causal)
    return x


def dense(width, std, dtype, name):
    """A linear layer with bias, its first weights N(0, std)."""
    return nn.Dense(width, dtype=dtype, kernel_init=nn.initializers.normal(std), name=name)
