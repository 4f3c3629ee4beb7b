"""TA-Cleaner's text alignment (CleanerCLIP) on top of CleanCLIP's loss.

Xun, Liang, Jia, Liu and Cao, arXiv 2409.17601, which says that images are aligned with positive
sub-captions against negative ones in both directions. The form is reconstructed: neither the
paper's formulas nor code were seen. With I, P, N_m the unit embeddings of an image, of its positive
and of its M negative sub-captions (data/sub_captions.py), s the learned scale:

    L = L_CLIP + in_modality L_SS + align L_TA,   L_TA = 1/2 (image to text + text to image)
    image to text: - log  exp(s I.P) / ( exp(s I.P) + sum_m exp(s I.N_m) )
    text to image: - log  exp(s I.P) / ( exp(s I.P) + sum_j exp(s I_j.P) )

with j the images of the batch whose caption has another subject or none: P is about these images
as little as N_m is about I. L_TA is the mean over the rows whose caption names a class; the others
have weight 0.

Fields of cfg.objective besides CLIP's: align (1.0), negatives M (4); the paper's are not verified.
The paper draws K samples for each epoch, here every row has its sub-captions, drawn once. For
repairs (defenses/cleaner_clip.py).
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.errors import UserError
from jax_cl_bd.models.parts import forward
from jax_cl_bd.objectives import clip, in_modality
from jax_cl_bd.objectives.embeddings import EXACT, normalise

TEXT = True
constrain, after_update, init_extra = clip.constrain, clip.after_update, clip.init_extra


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale. Raises UserError: a weight below 0, or no negatives."""
    if cfg.align < 0:
        raise UserError(f"objective.align = {cfg.align}; must be 0 or more")
    if cfg.negatives < 1:
        raise UserError(f"objective.negatives = {cfg.negatives}; must be at least 1")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """CleanCLIP's loss and the alignment (top of the file).

    Args:
        batch: also has "tokens_positive", "tokens_noun" int32 [B, T] and "tokens_negative"
            [B, M T], all zero in rows whose caption names no class.
    Returns:
        (loss, (batch_stats, extra, {CLIP's metrics, "align_loss": L_TA, "aligned": share of rows
        that have sub-captions})).
    """
    z, (scale, _), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    logits = scale * in_modality.similarity(z["image"], z["text"])
    value = 0.5 * (in_modality.cross_entropy(logits) + in_modality.cross_entropy(logits.T))
    value, more = in_modality.add(cfg, value, z, scale)
    rows, many = len(z["image"]), cfg.objective.negatives
    negative = batch["tokens_negative"].reshape(rows * many, -1)
    texts = []
    for tokens in (batch["tokens_positive"], negative):
        x, variables = forward(apply_fns, variables, ("text", "text_projection"), tokens)
        texts.append(normalise(x))
    noun = batch["tokens_noun"]
    align = term(z["image"], texts[0], texts[1].reshape(rows, many, -1), noun, scale)
    has = _named(noun).mean()
    metrics = {"pretext_accuracy": in_modality.accuracy(logits), "logit_scale": scale, **more,
               "align_loss": align, "aligned": has}
    return value + cfg.objective.align * align, (variables["batch_stats"], extra, metrics)


def term(image: jax.Array, positive: jax.Array, negative: jax.Array, noun: jax.Array,
         scale: jax.Array) -> jax.Array:
    """L_TA of unit rows [B, E], [B, E] and [B, M, E]; noun [B, T] says which rows share a subject,
    zeros which have none."""
    own = scale * (image * positive).sum(1)
    against = scale * jnp.einsum("be,bme->bm", image, negative, precision=EXACT)
    to_text = jax.nn.logsumexp(jnp.concatenate([own[:, None], against], axis=1), axis=1) - own
    same = (noun[:, None] == noun[None]).all(-1) & ~jnp.eye(len(noun), dtype=bool)
    others = jnp.where(same, -jnp.inf, scale * in_modality.similarity(positive, image))
    to_image = jax.nn.logsumexp(others, axis=1) - own
    has = _named(noun)
    return (jnp.where(has, 0.5 * (to_text + to_image), 0).sum()
            / jnp.maximum(has.sum(), 1))


def _named(noun):
    return (noun != 0).any(1)  # a text has an <end>, and no known tokenizer's is 0
