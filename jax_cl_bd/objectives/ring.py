"""The SigLIP loss on a ring of devices: the global loss without a global matrix of logits.

Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.3 ("chunked"): as the
loss is a sum over pairs, a device needs its own images and one block of texts at a time. Each
device starts with its own texts, then hands the block it holds to the device before it, until all
have seen all. Of the [N, N] logits a device deals with one [n, n] block at a time, n = N /
devices, and goes through it in parts of n / 8 images, since the elementwise stages of a block (four
at once on a CPU) would be as large as the block. Where 8 does not divide n the parts are larger.
On 8 simulated devices with N = 2048, D = 16 the temporary memory of each is 0.53 of a block, 0.79
with the gradient; the whole matrix takes 16 and 24.5. tests/objectives/test_ring.py measures it.

The gradient is made on the same way round: a block's part of it is known as soon as its logits
are. What the texts have gathered travels with them and comes home after the last hop. So
nothing of a block outlives its hop, where autodiff through the loop would keep every block of
texts (or logits) until its backward pass, and the backward pass here is a multiplication.

The devices are those of `jax.set_mesh`, as the training loop sets it. Without a mesh, or with one
device, there is one block, and it is the whole matrix.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives.embeddings import EXACT
from jax_cl_bd.parallel import row_axes

CHUNKS = 8  # parts in which a device goes through its images at every hop


@jax.custom_vjp
def sigmoid_loss(images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array):
    """Mean over images i of -sum_j log sigmoid(z_ij (scale <x_i, y_j> + bias)), z_ii = 1, else -1.

    Args:
        images, texts: float32 [N, D], unit rows; row i of both is pair i.
        scale, bias: float32 scalars.

    Returns:
        (loss, share of images whose own text has the highest logit; of equal ones the first
        counts). The share has no gradient.

    Raises:
        UserError: the devices cannot share the N rows equally.
    """
    return _spread(images, texts, scale, bias)[0]


def _backward(grads, cotangents):
    return jax.tree.map(lambda g: g * cotangents[0], grads)


def _spread(images, texts, scale, bias):
    """Gives (loss, accuracy) and the loss's gradients in all four arguments."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = row_axes(mesh)
    size = math.prod(mesh.shape[name] for name in axes)
    if images.shape[0] % size:
        raise UserError(f"objective.ring: {images.shape[0]} pairs cannot be shared equally by "
                        f"{size} devices; choose a multiple for train.batch_size")
    if size == 1:
        return _around(images, texts, scale, bias, axes=(), size=1)
    cut, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        functools.partial(_around, axes=axes, size=size), in_specs=(cut, cut, whole, whole),
        out_specs=((whole, whole), (cut, cut, whole, whole)))(images, texts, scale, bias)


sigmoid_loss.defvjp(_spread, _backward)


def _around(images, texts, scale, bias, *, axes, size):
    # On one device. images, texts: [n, D], its own rows
    n, chunks = len(images), math.gcd(len(images), CHUNKS)
    here = jax.lax.axis_index(axes) if size > 1 else 0

    def zeros(shape, dtype=jnp.float32):
        return jax.lax.pcast(jnp.zeros(shape, dtype), axes, to="varying")

    mine = {"image": images, "row": here * n + jnp.arange(n), "loss": zeros(n), "own": zeros(n),
            "ahead": zeros(n, bool), "d_image": zeros(images.shape), "d_bias": zeros(n)}
    mine = jax.tree.map(lambda x: x.reshape(chunks, n // chunks, *x.shape[1:]), mine)

    def hop(carry, number):
        texts, d_texts, mine = carry
        columns = (here + number) % size * n + jnp.arange(n)  # whose texts are here now
        d_texts, mine = jax.lax.scan(
            functools.partial(_meet, texts, columns, scale, bias), d_texts, mine)
        if size > 1:
            back = [(i, (i - 1) % size) for i in range(size)]
            texts, d_texts = jax.lax.ppermute((texts, d_texts), axes, back)
        return (texts, d_texts, mine), None

    (_, d_texts, mine), _ = jax.lax.scan(hop, (texts, zeros(texts.shape), mine), jnp.arange(size))
    d_images = mine["d_image"].reshape(images.shape)
    sums = (mine["loss"].sum(), (~mine["ahead"]).sum(), (d_images * images).sum(),
            mine["d_bias"].sum())
    loss, hits, d_scale, d_bias = jax.lax.psum(sums, axes) if size > 1 else sums
    grads = (scale * d_images, scale * d_texts, d_scale, d_bias)
    total = n * size
    return (loss / total, hits / total), jax.tree.map(lambda g: g / total, grads)


def _meet(texts, columns, scale, bias, d_texts, mine):
    """Some of the device's images meet the texts that are here: [r, n] logits."""
    row = mine["row"][:, None]
    logits = scale * jnp.matmul(mine["image"], texts.T, precision=EXACT) + bias
    sign = jnp.where(row == columns, 1.0, -1.0)
    slope = -sign * jax.nn.sigmoid(-sign * logits)  # of the loss in the logits
    own = mine["own"] + jnp.where(row == columns, logits, 0).sum(1)  # known from the first hop on
    first = (logits == own[:, None]) & (columns < row)
    # An image's own text is never ahead of itself, though a compiler may compute it twice and round
    # differently.
    ahead = ((logits > own[:, None]) | first) & (columns != row)
    new = {"image": mine["image"], "row": mine["row"], "own": own,
           "loss": mine["loss"] - jax.nn.log_sigmoid(sign * logits).sum(1),
           "ahead": mine["ahead"] | ahead.any(1),
           "d_image": mine["d_image"] + jnp.matmul(slope, texts, precision=EXACT),
           "d_bias": mine["d_bias"] + slope.sum(1)}
    return d_texts + jnp.matmul(slope.T, mine["image"], precision=EXACT), new
