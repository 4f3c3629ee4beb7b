"""Image and caption of each pair are drawn together, and nothing is pushed apart.

    L = 1 - mean_b z_b . t_b,   z, t the unit embeddings of image and caption

Ours, for overfitting a copy of a suspect (defenses/ubt.py), never for a model that is kept: all
pairs come closer, those that share a shortcut fastest. CLIP's loss has the other captions of the
batch as negatives; where many rows are poisons with captions of one class it drives these apart.
"""

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, in_modality

TEXT = True
constrain, after_update, init_extra = clip.constrain, clip.after_update, clip.init_extra


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale, which does not train. Raises UserError: an in-modality term."""
    if cfg.in_modality > 0:
        raise UserError(f"objective.in_modality = {cfg.in_modality}; pull_together has no such "
                        "term, set 0")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """1 - mean similarity; gives (loss, (batch_stats, extra, {"similarity": the mean}))."""
    z, _, variables = in_modality.embed(cfg, variables, batch, apply_fns)
    similarity = (z["image"] * z["text"]).sum(1).mean()
    return 1 - similarity, (variables["batch_stats"], extra, {"similarity": similarity})
