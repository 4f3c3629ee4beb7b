"""SimCLR (Chen et al. 2020): NT-Xent over the two views of a batch.

Fields of cfg.objective:
    name "simclr"; temperature (0.5); hidden, dim: widths of the two-layer projector (128, 128).

Recipe on CIFAR-10 and ImageNet-100 (settings of the Noisy Alignment comparison): ResNet-18,
SGD lr 0.5, momentum 0.9, weight decay 1e-4, cosine, batch 256, temperature 0.5, output 128.
The original paper uses LARS, batch 4096 and a projector as wide as the features, temperature 0.1
on ImageNet and 0.5 on CIFAR-10. Both views go through the network in one pass, so batch norm
sees 2 B images. Negatives are the whole global batch.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.models.heads import MLP
from jax_cl_bd.models.parts import forward
from jax_cl_bd.objectives.embeddings import EXACT, interleave, normalise


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """Returns the projector; it has no batch norm, so bn_groups changes nothing."""
    return {"projector": MLP(hidden=(cfg.hidden,), out=cfg.dim, bn_groups=bn_groups)}


def init_extra(cfg, variables, key):
    """SimCLR keeps nothing between steps."""
    return {}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """Mean over the 2 B views of -log softmax of their other view among all 2 B - 1 others.

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy": share of views whose nearest is their
        other view})).
    """
    x = interleave(batch["view1"], batch["view2"])
    z, variables = forward(apply_fns, variables, ("encoder", "projector"), x)
    z = normalise(z)  # [2B, D], views of one example in neighbouring rows
    pairs = z.reshape(-1, 2, z.shape[-1])
    positive = (pairs[:, 0] * pairs[:, 1]).sum(-1).repeat(2) / cfg.objective.temperature
    logits = jnp.matmul(z, z.T, precision=EXACT) / cfg.objective.temperature
    n = z.shape[0]
    logits = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, logits)
    value = (jax.nn.logsumexp(logits, axis=1) - positive).mean()
    hit = logits.argmax(1) == (jnp.arange(n) ^ 1)
    return value, (variables["batch_stats"], extra, {"pretext_accuracy": hit.mean()})


def after_update(cfg, variables, extra, step, total_steps):
    """Nothing follows the optimiser."""
    return extra
