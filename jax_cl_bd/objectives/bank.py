"""Rings of past embeddings in which neighbours are looked up (RoCLIP, SafeCLIP).

A ring is [slots, B, D], to be named "queue" in `extra`: then it is cut on B (parallel.py), and
writing the batch of a step into one slot needs no communication.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.objectives.embeddings import EXACT, normalise


def draw(key: jax.Array, slots: int, batch_size: int, dim: int) -> jax.Array:
    """The first content: random unit vectors, as in the memory bank of the published codes."""
    return normalise(jax.random.normal(key, (slots, batch_size, dim)))


def nearest(queue: jax.Array, z: jax.Array) -> jax.Array:
    """The ring's entry of highest cosine to each row of z [N, D]; constants, [N, D].

    Of equal ones the first in the ring counts.
    """
    s = jnp.einsum("nd,sbd->nsb", z, queue, precision=EXACT).reshape(len(z), -1)
    return jax.lax.stop_gradient(queue.reshape(-1, queue.shape[-1])[s.argmax(1)])


def write(queue: jax.Array, z: jax.Array, slot: jax.Array, rows: jax.Array) -> jax.Array:
    """Puts `rows` (bool [B], or one for all) of z [B, D] into a slot; others keep what is there."""
    old = jax.lax.dynamic_index_in_dim(queue, slot, axis=0, keepdims=False)
    new = jnp.where(jnp.reshape(rows, (-1, 1)), jax.lax.stop_gradient(z), old)
    return jax.lax.dynamic_update_index_in_dim(queue, new, slot, axis=0)
