"""The in-modality term of CleanCLIP alone: each tower against its own augmented views.

L_SS of objectives/in_modality.py without the loss between images and captions: the cleaning loss
"SSL" of Verma et al. (arXiv 2311.14948), a repair and no way to pretrain. Scale and bias stay as
they are where in_modality_temperature fixes the scale; else L_SS moves the scale too.
"""

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, in_modality

TEXT = True
init_extra, constrain, after_update = in_modality.init_extra, clip.constrain, clip.after_update


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """The projections and the scale. Raises UserError: no in-modality term is asked for."""
    if cfg.in_modality <= 0:
        raise UserError(f"objective.in_modality = {cfg.in_modality}; the in-modality term is all "
                        "that 'unimodal' has, so set it above 0")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """in_modality * L_SS.

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy" between images and captions,
        "logit_scale", "in_modality_loss"})).
    """
    z, (scale, _), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    value, more = in_modality.add(cfg, 0.0, z, scale)
    logits = scale * in_modality.similarity(z["image"], z["text"])
    return value, (variables["batch_stats"], extra,
                   {"pretext_accuracy": in_modality.accuracy(logits), "logit_scale": scale, **more})
