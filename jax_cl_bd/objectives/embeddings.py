"""What several contrastive losses share."""

import jax
import jax.numpy as jnp

# Similarities decide a softmax at temperature 0.1: never let TPUs or TF32 round their inputs.
EXACT = jax.lax.Precision.HIGHEST


def normalise(z: jax.Array) -> jax.Array:
    """Scales rows to unit length in float32; rows shorter than 1e-12 are divided by 1e-12."""
    z = z.astype(jnp.float32)
    squared = jnp.square(z).sum(-1, keepdims=True)
    return z * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine similarity of rows, float32 [N]."""
    return (normalise(a) * normalise(b)).sum(-1)


def output_std(z: jax.Array) -> jax.Array:
    """Standard deviation over rows of the unit vectors, mean over the D columns.

    Near 0 is collapse, near 1 / sqrt(D) healthy (Chen & He 2021, section 4.1).
    """
    return normalise(jax.lax.stop_gradient(z)).std(0).mean()


def interleave(view1: jax.Array, view2: jax.Array) -> jax.Array:
    """Joins two [B, ...] to [2B, ...] as row 0 of each, row 1 of each, and so on.

    Both views of an example stay on the device that holds it (a concatenation would move half
    of them), and in the same batch-norm group.
    """
    both = jnp.stack([view1, view2], axis=1)
    return both.reshape(-1, *view1.shape[1:])
