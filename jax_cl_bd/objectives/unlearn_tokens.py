"""UBT's last step: unlearning of suspected pairs by their most important tokens.

Liang et al., arXiv 2403.16257 (long version: Liu et al., 2409.19526): suspected pairs are forgotten
by those tokens that matter. How is reconstructed from the abstracts; no formula or code was seen.
With c, b the clean-looking and the bad rows of a batch, z_i, t_i unit embeddings of image and text:

    L = CE_c - weight [ S_b > floor ] CE_b

CE_c is CLIP's loss of the clean-looking rows among themselves. CE_b is the loss of each bad row
with its own partner and the clean-looking rows of the batch, both ways; other bad rows are left
out, since they say the same and ascent would draw the row to them. It reaches the model only
through the `tokens` ordinary tokens of each bad caption whose embedding e has the largest
|d (z_i . t_i) / d e|: all else is held, the images, the clean-looking texts, the scale, the other
tokens, and with ascend "tokens" all weights but the token table. With ascend "model" images,
clean-looking texts and all weights move too, and only the scale and the other tokens of the bad
captions are held.

Ascent rests while S_b, the mean similarity of the bad pairs of the batch, is at most the floor:
"pairs": the mean similarity of the clean-looking pairs, as in the sketch that this follows;
"strangers": that of clean-looking images with the captions of other clean-looking rows.

Fields of cfg.objective besides CLIP's: first_bad (rows of the data set from this one on are bad),
weight (1.0), tokens (2), floor, ascend, special (ids of tokens that are no words). Batch norm sees
bad and clean-looking images together. For repairs (defenses/ubt.py); of CLIP models alone.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import text
from jax_cl_bd.objectives import clip, in_modality
from jax_cl_bd.objectives.embeddings import normalise

TEXT = True
constrain, after_update, init_extra = clip.constrain, clip.after_update, clip.init_extra
FLOORS = ("pairs", "strangers")
ASCENDS = ("tokens", "model")


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale. Raises UserError: a setting out of range, or an in-modality
    term."""
    if cfg.floor not in FLOORS:
        raise unknown("objective.floor", cfg.floor, FLOORS)
    if cfg.ascend not in ASCENDS:
        raise unknown("objective.ascend", cfg.ascend, ASCENDS)
    if cfg.tokens < 1 or cfg.weight < 0:
        raise UserError(f"objective.tokens = {cfg.tokens} must be at least 1 and weight = "
                        f"{cfg.weight} 0 or more")
    if cfg.in_modality > 0:
        raise UserError(f"objective.in_modality = {cfg.in_modality}; unlearning has no such term, "
                        "set 0")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """Descent on clean-looking rows and ascent on bad ones (top of the file).

    Returns:
        (loss, (batch_stats, extra, {CLIP's metrics, "clip_loss": CE_c, "bad_similarity": S_b,
        "floor", "ascending": 1 or 0})).
    """
    o = cfg.objective
    bad = batch["index"] >= o.first_bad
    z, (scale, _), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    logits = scale * in_modality.similarity(z["image"], z["text"])
    recover = _both_ways(logits, bad, of=~bad)
    s = jax.lax.stop_gradient(logits / scale)
    bad_mean, floor = _mean(jnp.diag(s), bad), floor_of(s, bad, o.floor)
    hold = jax.lax.stop_gradient if o.ascend == "tokens" else lambda tree: tree
    image = hold(z["image"])
    table = variables["params"]["text"]["token_embedding"]
    masked = only_through(cfg, table, hold(variables), apply_fns, batch["tokens"], image)
    mixed = jnp.where(bad[:, None], masked, hold(z["text"]))
    forget = _both_ways(jax.lax.stop_gradient(scale) * in_modality.similarity(image, mixed), bad,
                        of=bad)
    ascending = (bad_mean > floor) & bad.any()
    metrics = {"pretext_accuracy": in_modality.accuracy(logits), "logit_scale": scale,
               "clip_loss": recover, "bad_similarity": bad_mean, "floor": floor,
               "ascending": ascending.astype(jnp.float32)}
    return (recover - o.weight * jnp.where(ascending, forget, 0),
            (variables["batch_stats"], extra, metrics))


def only_through(cfg, table: jax.Array, variables: dict, apply_fns: dict, tokens: jax.Array,
                 image: jax.Array) -> jax.Array:
    """Unit text embeddings [B, E] whose gradient by the token table [V, width] comes by way of the
    most important tokens of each text alone. image: [B, E], unit rows."""
    embedded = jnp.take(table, tokens, axis=0)  # [B, T, width]
    a = importance(cfg, variables, apply_fns, tokens, image)
    best, at = jax.lax.top_k(a, min(cfg.objective.tokens, tokens.shape[1]))
    chosen = (jax.nn.one_hot(at, tokens.shape[1], dtype=bool) & (best >= 0)[..., None]).any(1)
    return _text(cfg, variables, apply_fns, tokens,
                 jnp.where(chosen[..., None], embedded, jax.lax.stop_gradient(embedded)))


def importance(cfg, variables: dict, apply_fns: dict, tokens: jax.Array,
               image: jax.Array) -> jax.Array:
    """|d (z_i . t_i) / d e| of every token, float32 [B, T], and -1 of those that are no words; a
    number, through which no gradient passes."""
    variables, image = jax.lax.stop_gradient((variables, image))
    embedded = jnp.take(variables["params"]["text"]["token_embedding"], tokens, axis=0)

    def similarity(e):
        return (image * _text(cfg, variables, apply_fns, tokens, e)).sum()  # rows do not mix

    a = jnp.linalg.norm(jax.grad(similarity)(embedded), axis=-1)
    special = jnp.isin(tokens, jnp.array(cfg.objective.special, jnp.int32))
    return jnp.where(special, -1, a)


def floor_of(s: jax.Array, bad: jax.Array, kind: str) -> jax.Array:
    """The similarity at which ascent rests (top of the file), of cosines s [B, B]."""
    if kind == "pairs":
        return _mean(jnp.diag(s), ~bad)
    strangers = ~bad[:, None] & ~bad[None] & ~jnp.eye(len(s), dtype=bool)
    return _mean(s, strangers)


def _text(cfg, variables, apply_fns, tokens, embeddings):
    x = text.build(cfg.text).apply({"params": variables["params"]["text"]}, tokens, train=True,
                                   embeddings=embeddings)
    x, _ = apply_fns["text_projection"](variables, x, True)
    return normalise(x)


def _both_ways(logits, bad, of):
    """CE over rows `of`, each among itself and the clean-looking ones; mean of both directions."""
    own = jnp.eye(len(logits), dtype=bool)
    value = 0
    for m in (logits, logits.T):
        among = jnp.where(own | ~bad[None], m, -jnp.inf)
        each = jax.nn.logsumexp(among, axis=1) - jnp.where(own, m, 0).sum(1)
        value += 0.5 * _mean(each, of)
    return value


def _mean(x, where):
    return jnp.where(where, x, 0).sum() / jnp.maximum(where.sum(), 1)
