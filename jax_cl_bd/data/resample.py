"""Image resampling as matrices: crops, resizes and placements are two small matrix products."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import unknown

KERNELS = ("bilinear", "bicubic")
_EDGE = 1e-3  # px; keeps rounding errors of a box from letting its neighbour pixel in


def weights(start: jax.Array, length: jax.Array, out_size: int, in_size: int,
            kernel: str = "bilinear") -> jax.Array:
    """Weights that resample the interval [start, start + length) of an axis to `out_size` pixels.

    Antialiased as in PIL: when shrinking, the kernel is widened by length / out_size. Pixel i
    covers [i, i + 1), centres are at halves. Pixels outside [floor(start), ceil(start + length))
    weigh 0, as if the interval had been cut out first (torchvision's crop, then resize). To place
    an image of n pixels into the box [y, y + h) of a canvas of H, swap the roles:
    `weights(-y * n / h, H * n / h, H, n)`.

    Args:
        start, length: broadcastable float arrays [...], in input pixels.
    Returns:
        float32 [..., out_size, in_size]. Rows sum to 1, except those with no pixel in reach (an
        output pixel that lies outside the input), which are 0.
    """
    start, length = jnp.broadcast_arrays(jnp.asarray(start, jnp.float32),
                                         jnp.asarray(length, jnp.float32))
    start, length = start[..., None, None], length[..., None, None]
    scale = length / out_size
    centre = start + (jnp.arange(out_size, dtype=jnp.float32)[:, None] + 0.5) * scale
    pixel = jnp.arange(in_size, dtype=jnp.float32)
    raw = _kernel((pixel + 0.5 - centre) / jnp.maximum(scale, 1.0), kernel)
    inside = (pixel + 1 > start + _EDGE) & (pixel < start + length - _EDGE)
    raw = jnp.where(inside, raw, 0.0)
    total = raw.sum(-1, keepdims=True)
    empty = jnp.abs(total) < 1e-6
    return jnp.where(empty, 0.0, raw / jnp.where(empty, 1.0, total))


def apply(planes: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Resamples planes [C, N, H, W] by rows [N, h, H] and columns [N, w, W] -> [C, N, h, w].

    float32 throughout: on accelerators the default precision would round pixels to bfloat16.
    """
    precision = jax.lax.Precision.HIGHEST
    planes = jnp.einsum("nhH,cnHW->cnhW", rows, planes, precision=precision)
    return jnp.einsum("nwW,cnhW->cnhw", columns, planes, precision=precision)


def check(kernel: str) -> None:
    """Raises UserError for a kernel that does not exist."""
    if kernel not in KERNELS:
        raise unknown("interpolation", kernel, KERNELS)


def _kernel(x: jax.Array, name: str) -> jax.Array:
    x = jnp.abs(x)
    if name == "bilinear":
        return jnp.maximum(1.0 - x, 0.0)
    check(name)
    # Keys' cubic convolution with a = -0.5, the one of PIL; the paper's eq. 4.
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


def blur_radius(sigma: float, side: int) -> int:
    """Half width of a truncated Gaussian: 3 sigma, at most what reflection at the edge allows."""
    return int(min(np.ceil(3.0 * sigma), side - 1))


def blur_weights(sigma: jax.Array, size: int, radius: int) -> jax.Array:
    """Banded matrices [..., size, size] of a Gaussian blur with reflected edges (no edge repeat).

    Args:
        sigma: float array [...] in pixels, > 0.
        radius: static half width of the kernel in pixels, < size.
    """
    offset = np.arange(-radius, radius + 1)
    taps = jnp.exp(-0.5 * (offset / sigma[..., None]) ** 2)  # [..., 2 radius + 1]
    taps = taps / taps.sum(-1, keepdims=True)
    # place[k, i, j] = 1 where tap k of output i reads input j; static, so a matrix product.
    at = np.arange(size)[None, :] + offset[:, None]
    at = np.abs(at)
    at = np.where(at >= size, 2 * (size - 1) - at, at)
    place = (at[:, :, None] == np.arange(size)).astype(np.float32)
    return jnp.einsum("...k,kij->...ij", taps, place, precision=jax.lax.Precision.HIGHEST)
