"""CLIP's loss with the suspect held where it is right: embeddings of untouched pairs stay put.

For the oracle-guided repair (defenses/oracle_finetune.py), and reconstructed: no loss of EftCLIP's
is public. With f, g the towers in training and f_P, g_P the suspect's, frozen, all of unit length,
and U the rows of the batch whose image is as somebody took it (no trigger pasted, no poison):

    L = L_CLIP + in_modality L_SS
        + preserve / 2 ( mean_U |f(x) - f_P(x)|^2 + mean |g(t) - g_P(t)|^2 )

The last is over all rows, since captions carry no trigger. InverTune holds features in the same
way (objectives/invertune.py). Fields of cfg.objective besides CLIP's: preserve; untouched, the
number of rows of the set that belong to U, its first ones. The suspect is what training starts
from; it lies in `extra`, in test mode.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, in_modality
from jax_cl_bd.objectives.embeddings import normalise

TEXT = True
constrain, after_update = clip.constrain, clip.after_update


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale. Raises UserError: preserve not above 0."""
    if cfg.preserve <= 0:
        raise UserError(f"objective.preserve = {cfg.preserve}; must be above 0, or use 'clip'")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def init_extra(cfg, variables, key) -> dict:
    """The suspect: a copy of the variables that training starts from."""
    return {"suspect": jax.tree.map(jnp.copy, variables)}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """CLIP's loss and what holds the suspect (top of the file).

    Returns:
        (loss, (batch_stats, extra, {CLIP's metrics, "moved_image", "moved_text": the two means})).
    """
    z, (scale, _), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    logits = scale * in_modality.similarity(z["image"], z["text"])
    value = 0.5 * (in_modality.cross_entropy(logits) + in_modality.cross_entropy(logits.T))
    value, more = in_modality.add(cfg, value, z, scale)
    untouched = batch["index"] < cfg.objective.untouched
    moved = {}
    for name, x, parts, rows in (
            ("image", batch["view1"], ("encoder", "image_projection"), untouched),
            ("text", batch["tokens"], ("text", "text_projection"), jnp.ones_like(untouched))):
        for part in parts:
            if part in apply_fns:
                x, _ = apply_fns[part](extra["suspect"], x, False)
        distance = ((z[name] - normalise(x)) ** 2).sum(1)
        moved[name] = jnp.where(rows, distance, 0).sum() / jnp.maximum(rows.sum(), 1)
    value += cfg.objective.preserve * 0.5 * (moved["image"] + moved["text"])
    metrics = {"pretext_accuracy": in_modality.accuracy(logits), "logit_scale": scale, **more,
               "moved_image": moved["image"], "moved_text": moved["text"]}
    return value, (variables["batch_stats"], extra, metrics)
