"""CLIP's modified ResNet: three-convolution stem, blurred downsampling, attention pooling.

Radford et al. 2021, section 2.4, and their released `ModifiedResNet`: every stride above 1 is an
average pooling (before the last convolution of a block, and on its shortcut), and the pooling is
one attention of the mean position to all. The output layer of that attention is no part of the
features: it is the head `image_projection`. First values: convolutions as torch.nn.Conv2d, the
gain of each block's last norm zero, the attention N(0, D^-1/2), positions N(0, D^-1/2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import transformer
from jax_cl_bd.models.heads import TORCH_LINEAR
from jax_cl_bd.models.norm import BatchNorm


class ClipResNet(nn.Module):
    """Images [N, H, W, 3] (any float) to features float32 [N, D], D = 4 width 2^(stages - 1).

    The positional embedding is made for the images given at initialisation.

    Attributes:
        width: channels after the stem (64 in RN50).
        stages: blocks of every stage; (3, 4, 6, 3) is RN50. Strides: 4 in the stem, 1 in the
            first stage, 2 in every later one; their product must divide H and W.
        heads: of the attention pooling (32 in RN50); divides D.
        bn_groups: see `norm.BatchNorm`.
        dtype: of the computation; parameters and features stay float32.
    """

    width: int
    stages: tuple[int, ...]
    heads: int
    bn_groups: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stride = 4 * 2**(len(self.stages) - 1)
        if x.shape[1] % stride or x.shape[2] % stride:
            raise UserError(f"a clip_resnet of {len(self.stages)} stages needs sides divisible by "
                            f"{stride}, not {x.shape[1]} x {x.shape[2]} pixels; change the image "
                            "size or model.stages")
        x = x.astype(self.dtype)
        widths = (self.width // 2, self.width // 2, self.width)
        for i, width in enumerate(widths, start=1):
            x = _conv(width, 3, self.dtype, f"conv{i}", stride=2 if i == 1 else 1)(x)
            x = nn.relu(BatchNorm(groups=self.bn_groups, dtype=self.dtype, name=f"bn{i}")(x, train))
        x = _average(x, 2)
        for stage, depth in enumerate(self.stages):
            for i in range(depth):
                x = Bottleneck(self.width * 2**stage, 2 if stage and i == 0 else 1,
                               self.bn_groups, self.dtype,
                               name=f"layer{stage + 1}_{i}")(x, train)
        return _Pool(self.heads, self.dtype, name="pool")(x).astype(jnp.float32)


class Bottleneck(nn.Module):
    """1x1, 3x3, average pooling by the stride, 1x1 four times as wide; plus the shortcut."""

    width: int
    stride: int
    bn_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(BatchNorm, groups=self.bn_groups, dtype=self.dtype)
        conv = partial(_conv, dtype=self.dtype)
        y = nn.relu(norm(name="bn1")(conv(self.width, 1, name="conv1")(x), train))
        y = nn.relu(norm(name="bn2")(conv(self.width, 3, name="conv2")(y), train))
        y = conv(4 * self.width, 1, name="conv3")(_average(y, self.stride))
        y = _ZeroGainNorm(self.bn_groups, self.dtype, name="bn3")(y, train)
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = conv(y.shape[-1], 1, name="downsample_conv")(_average(x, self.stride))
            x = norm(name="downsample_bn")(x, train)
        return nn.relu(x + y)


class _ZeroGainNorm(nn.Module):
    """Batch norm whose scale starts at zero, so that a fresh block passes its shortcut on."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train):
        zeros, shape = nn.initializers.zeros, x.shape[-1:]
        x = BatchNorm(groups=self.groups, affine=False, dtype=jnp.float32, name="norm")(x, train)
        x = x * self.param("scale", zeros, shape, jnp.float32)
        return (x + self.param("bias", zeros, shape, jnp.float32)).astype(self.dtype)


class _Pool(nn.Module):
    """[N, H, W, D] -> [N, D]: the mean position attends to itself and to all others."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = x.reshape(len(x), -1, width)
        mean = x.astype(jnp.float32).mean(1, keepdims=True).astype(self.dtype)
        x = jnp.concatenate([mean, x], axis=1)
        places = transformer.position_embedding(self, x.shape[1], width, width**-0.5)
        x = x + places.astype(self.dtype)
        attention = transformer.Attention(self.heads, None, self.dtype, name="attention")
        return attention(x[:, :1], x)[:, 0]


def clip_resnet(cfg) -> ClipResNet:
    """Returns the modified ResNet of cfg = config.model.

    Raises:
        UserError: an odd width, no stages, or heads that do not divide the features.
    """
    if cfg.width % 2:
        raise UserError(f"model.width = {cfg.width}; must be even, the stem has half as many "
                        "channels")
    if not cfg.stages or min(cfg.stages) < 1:
        raise UserError(f"model.stages = {tuple(cfg.stages)}; needs one positive number of blocks "
                        "per stage, e.g. (3, 4, 6, 3)")
    features = 4 * cfg.width * 2**(len(cfg.stages) - 1)
    if cfg.heads < 1 or features % cfg.heads:
        raise UserError(f"model.heads = {cfg.heads} does not divide the {features} features; "
                        f"CLIP has one for 64 of them, here {max(features // 64, 1)}")
    return ClipResNet(cfg.width, tuple(cfg.stages), cfg.heads, cfg.bn_groups,
                      jnp.dtype(cfg.dtype))


def _conv(width, size, dtype, name, stride=1):
    pad = size // 2
    return nn.Conv(width, (size, size), (stride, stride), padding=((pad, pad), (pad, pad)),
                   use_bias=False, dtype=dtype, kernel_init=TORCH_LINEAR, name=name)


def _average(x, stride):
    return x if stride == 1 else nn.avg_pool(x, (stride, stride), (stride, stride))
