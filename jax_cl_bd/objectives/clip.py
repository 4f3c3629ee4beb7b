"""CLIP (Radford et al. 2021): symmetric InfoNCE between images and captions of the global batch.

Fields of cfg.objective:
    name "clip"; dim: width of the shared space (512; CLIP's ResNet-50 has 1024); image_projection:
    a linear map without bias after the image tower (False: the tower itself ends in `dim`);
    scale_init: start of the logit scale parameter t', s = exp(t') (ln(1/0.07) = 2.6593);
    in_modality, in_modality_temperature: see in_modality.py (0.0, 0.0).

Recipe from scratch (CleanCLIP's victims, CC3M): ResNet-50, AdamW lr 5e-4, betas (0.9, 0.999),
weight decay 0.1 but none on norms, biases and the logit scale, 10,000 steps of warm-up, cosine to
0, 64 epochs, batch 128, images not augmented. Image-only views (view 2) and second captions are
used by the in-modality term alone. The negatives are the whole global batch, and both sides of
the similarity carry gradient.

The logit scale is clamped to [0, ln 100] by `constrain`, after the optimiser's update. Clamped in
the forward pass, it would lose its gradient at the bound and never come back.
"""

import math

import jax.numpy as jnp

from jax_cl_bd.objectives import in_modality

TEXT = True  # needs captions and a text tower
heads, init_extra = in_modality.heads, in_modality.init_extra
MAX_LOG_SCALE = math.log(100)


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """1/2 [ CE(s I T^T) + CE(s T I^T) ], and the in-modality term if there is one.

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy": share of images whose own caption is the
        nearest of the batch, "logit_scale": s, "in_modality_loss": where it is on})).
    """
    z, (scale, _), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    logits = scale * in_modality.similarity(z["image"], z["text"])  # [B, B], float32
    value = 0.5 * (in_modality.cross_entropy(logits) + in_modality.cross_entropy(logits.T))
    value, more = in_modality.add(cfg, value, z, scale)
    metrics = {"pretext_accuracy": in_modality.accuracy(logits), "logit_scale": scale, **more}
    return value, (variables["batch_stats"], extra, metrics)


def after_update(cfg, variables, extra, step, total_steps):
    """Nothing else follows the optimiser than `constrain`."""
    return extra


def constrain(params: dict) -> dict:
    """Clamps the logit scale parameter to [0, ln 100]; for the parameters after an update."""
    kept = jnp.clip(params["scale"]["logit_scale"], 0, MAX_LOG_SCALE)
    return {**params, "scale": {**params["scale"], "logit_scale": kept}}
