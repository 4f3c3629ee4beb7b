"""Residual networks: torchvision's ResNet-18 and -50, and a small one for CPUs.

He et al. 2016; ResNet-50 is the common "v1.5" with the stride on the 3x3 convolution. Padding is
explicit and symmetric as in PyTorch (XLA's "SAME" pads strided convolutions on one side only), so
torchvision's weights give torchvision's features (`hub.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cl_bd.models.norm import BatchNorm

# torchvision: kaiming_normal_(mode="fan_out", nonlinearity="relu")
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features, size, stride, dtype, name):
    """A convolution without bias, padded by size // 2 on every side."""
    pad = size // 2
    return nn.Conv(features, (size, size), (stride, stride), padding=((pad, pad), (pad, pad)),
                   use_bias=False, dtype=dtype, kernel_init=KAIMING, name=name)


class Block(nn.Module):
    """A residual block: 3x3, 3x3 (basic), or 1x1, 3x3, 1x1 four times as wide (bottleneck)."""

    width: int
    stride: int
    bottleneck: bool
    bn_groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(BatchNorm, groups=self.bn_groups, dtype=self.dtype)
        wide = 4 * self.width
        if self.bottleneck:
            convs = [(self.width, 1, 1), (self.width, 3, self.stride), (wide, 1, 1)]
        else:
            convs = [(self.width, 3, self.stride), (self.width, 3, 1)]
        y = x
        for i, (features, size, stride) in enumerate(convs, start=1):
            y = conv(features, size, stride, self.dtype, f"conv{i}")(y)
            y = norm(name=f"bn{i}")(y, train)
            if i < len(convs):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.stride, self.dtype, "downsample_conv")(x)
            x = norm(name="downsample_bn")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images [N, H, W, 3] (any float) to features float32 [N, D], D the last stage's channels.

    Attributes:
        depths: blocks of every stage.
        widths: channels of every stage (a quarter of its output in a bottleneck network).
        bottleneck: kind of block.
        stem: "cifar" = 3x3 convolution; "imagenet" = 7x7, stride 2, then 3x3 max-pooling, stride 2.
        stem_width: channels of the stem.
        stem_stride: stride of the cifar stem.
        first_stride: stride of the first stage; the later ones have 2.
        bn_groups: see `norm.BatchNorm`.
        dtype: of the computation; parameters and features stay float32.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem_width: int
    bottleneck: bool = False
    stem: str = "cifar"
    stem_stride: int = 1
    first_stride: int = 1
    bn_groups: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.astype(self.dtype)
        large = self.stem == "imagenet"
        size, stride = (7, 2) if large else (3, self.stem_stride)
        x = conv(self.stem_width, size, stride, self.dtype, "conv1")(x)
        x = BatchNorm(groups=self.bn_groups, dtype=self.dtype, name="bn1")(x, train)
        x = nn.relu(x)
        if large:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for i in range(depth):
                stride = 1 if i else 2 if stage else self.first_stride
                x = Block(width, stride, self.bottleneck, self.bn_groups, self.dtype,
                          name=f"layer{stage + 1}_{i}")(x, train)
        return x.astype(jnp.float32).mean((1, 2))


def resnet18(cfg) -> ResNet:
    """ResNet-18 with cfg.width channels in the first stage (64 = torchvision's), D = 8 width."""
    return _classic(cfg, (2, 2, 2, 2), bottleneck=False)


def resnet50(cfg) -> ResNet:
    """ResNet-50 with cfg.width channels in the first stage (64 = torchvision's), D = 32 width."""
    return _classic(cfg, (3, 4, 6, 3), bottleneck=True)


def small_resnet(cfg) -> ResNet:
    """A stem of cfg.width channels, then one basic block per entry of cfg.stages, for CPUs.

    XLA's CPU convolutions get slow on maps under 4x4 (512 maps of 2x2x256 took 390 ms, 4x4x128
    took 9 ms), and weight gradients of wide maps with few channels are slow too, so choose
    stem_stride and first_stride (1 or 2) to be down at 8x8 soon and to end at 4x4.
    """
    return ResNet(depths=(1,) * len(cfg.stages), widths=tuple(cfg.stages), stem_width=cfg.width,
                  stem="cifar", stem_stride=cfg.stem_stride, first_stride=cfg.first_stride,
                  **_shared(cfg))


def _classic(cfg, depths, *, bottleneck):
    widths = tuple(cfg.width * 2**i for i in range(4))
    return ResNet(depths=depths, widths=widths, stem_width=cfg.width,
                  bottleneck=bottleneck, stem=cfg.stem,
                  **_shared(cfg))


def _shared(cfg):
    return {"bn_groups": cfg.bn_groups, "dtype": jnp.dtype(cfg.dtype)}
