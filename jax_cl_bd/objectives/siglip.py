"""SigLIP (Zhai et al. 2023): every image-caption pair of the batch is a yes or no of its own.

Fields of cfg.objective:
    name "siglip"; dim: width of the shared space; image_projection: a linear map without bias
    after the image tower (False, as published: the tower's pooling head ends in `dim`); text_bias:
    bias of the text projection (True, as published); scale_init: start of t', s = exp(t')
    (ln 10 = 2.3026); bias_init: start of b (-10.0); ring: go round the devices with one block of
    texts at a time (ring.py: same loss and gradient, memory of a block of logits instead of
    B x B; off by default, as it pays with many devices and large batches);
    in_modality, in_modality_temperature: see in_modality.py (0.0, 0.0). No paper has an
    in-modality term beside this loss: ours is CleanCLIP's softmax with this loss's s, without b,
    and its B x B similarities do not go round the ring.

The loss is summed over captions and averaged over images, as in big_vision's trainer. t' and b are
free: nothing clamps them. b = -10 makes the start say "no" to all pairs, most of which are
negative (big_vision's COCO recipe has -2.71).
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.objectives import in_modality, ring

TEXT = True  # needs captions and a text tower
heads, init_extra = in_modality.heads, in_modality.init_extra


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """-mean_i sum_j log sigmoid(z_ij (s <x_i, y_j> + b)), z_ii = 1, else -1; and in-modality.

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy": share of images whose own caption is the
        nearest of the batch, "logit_scale": s, "logit_bias": b, "in_modality_loss": where it is
        on})).
    """
    z, (scale, bias), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    form = ring.sigmoid_loss if cfg.objective.ring else full
    value, accuracy = form(z["image"], z["text"], scale, bias)
    value, more = in_modality.add(cfg, value, z, scale)
    metrics = {"pretext_accuracy": accuracy, "logit_scale": scale, "logit_bias": bias, **more}
    return value, (variables["batch_stats"], extra, metrics)


def full(images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array):
    """What `ring.sigmoid_loss` computes, from the whole matrix of logits."""
    logits = scale * in_modality.similarity(images, texts) + bias  # [B, B], float32
    sign = jnp.where(jnp.eye(len(logits), dtype=bool), 1.0, -1.0)
    value = -jax.nn.log_sigmoid(sign * logits).sum(1).mean()
    return value, in_modality.accuracy(logits)


def after_update(cfg, variables, extra, step, total_steps):
    """Nothing follows the optimiser."""
    return extra
