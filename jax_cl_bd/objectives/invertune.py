"""InverTune's activation tuning: the neurons that an inverted trigger moves are held still.

Sun et al., "InverTune", arXiv 2506.12411, and its code (ActivationTuning.py). With a_l the mean
over the batch of what stage l of the image tower puts out, M_l the critical neurons of it, x' the
triggered image, f^ and f^_P the unit embeddings of the model in training and of the frozen suspect:

    L = align * sum_l |M_l (a_l(x) - a_l(x'))|_2 / |M_l a_l(x)|_2 + preserve * |f^(x) - f^_P(x)|_2

the last norm over the whole batch, as in the code. Fields of cfg.objective besides CLIP's: align
(1.0), preserve (0.5), norm: "train" (the code: both passes are normalised by their own batch, and
move the running statistics) or "test" (the running statistics, which stay). `extra` holds
"suspect", and, given by the defense (defenses/invertune.py), "trigger" {"mask", "pattern"}, in
normalised units, and "neurons" {stage: M_l}. The text tower has no gradient. The code passes clean
images through the model, triggered ones, and the clean ones again for f^; here one clean pass gives
both, and the running statistics are brought to where three passes would leave them.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import activations, build
from jax_cl_bd.models.norm import BatchNorm
from jax_cl_bd.objectives import clip, in_modality
from jax_cl_bd.objectives.embeddings import normalise

TEXT = True
NORMS = ("train", "test")
after_update = clip.after_update


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """The projections and scale of the suspect.

    Raises:
        UserError: a weight below 0, both 0, an unknown norm, or an in-modality term.
    """
    if min(cfg.align, cfg.preserve) < 0 or cfg.align + cfg.preserve == 0:
        raise UserError(f"objective.align = {cfg.align} and preserve = {cfg.preserve} must not be "
                        "negative, nor both 0")
    if cfg.norm not in NORMS:
        raise unknown("objective.norm", cfg.norm, NORMS)
    if cfg.in_modality > 0:
        raise UserError(f"objective.in_modality = {cfg.in_modality}; InverTune has no such term, "
                        "set 0")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def init_extra(cfg, variables, key) -> dict:
    """The suspect: a copy of the variables that training starts from."""
    return {"suspect": jax.tree.map(jnp.copy, variables)}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """The loss at the top of the file.

    Returns:
        (loss, (batch_stats, extra, {"align", "preserve": the two terms without their weights})).
    """
    o, x, names = cfg.objective, batch["view1"], tuple(sorted(extra["neurons"]))
    module, train = build.build(cfg.model), o.norm == "train"

    def run(x):
        return activations.forward(module, variables, x, names, train=train)

    features, clean, after_clean = run(x)
    _, hit, after_hit = run(triggered(extra["trigger"], x))
    align = sum(relative(clean[name].mean(0), hit[name].mean(0), extra["neurons"][name])
                for name in names)
    before, _ = apply_fns["encoder"](extra["suspect"], x, False)
    if "image_projection" in apply_fns:
        features, _ = apply_fns["image_projection"](variables, features, False)
        before, _ = apply_fns["image_projection"](extra["suspect"], before, False)
    preserve = length(normalise(features) - normalise(before))
    value = o.align * align + o.preserve * preserve
    stats = variables["batch_stats"]
    if after_clean:
        stats = {**stats, "encoder": three_passes(stats["encoder"], after_clean, after_hit)}
    return value, (stats, extra, {"align": align, "preserve": preserve})


def three_passes(start: dict, after_clean: dict, after_hit: dict) -> dict:
    """Running statistics after a clean, a triggered and a clean pass, from those after either pass
    alone: every pass is r -> m r + (1 - m) b with statistics b of its batch."""
    m = BatchNorm.momentum

    def one(start, clean, hit):
        clean, hit = clean - m * start, hit - m * start  # (1 - m) b of either batch
        return m * (m * (m * start + clean) + hit) + clean

    return jax.tree.map(one, start, after_clean, after_hit)


def triggered(trigger: dict, x: jax.Array) -> jax.Array:
    """m t + (1 - m) x."""
    return trigger["mask"] * trigger["pattern"] + (1 - trigger["mask"]) * x


def relative(clean: jax.Array, hit: jax.Array, mask: jax.Array | float = 1.0) -> jax.Array:
    """|M (a - a')|_2 / |M a|_2."""
    clean, hit = clean.astype(jnp.float32), hit.astype(jnp.float32)
    return length(mask * (clean - hit)) / jnp.maximum(length(mask * clean), 1e-12)


def length(x: jax.Array) -> jax.Array:
    """The Euclidean norm of all entries; at 0 its gradient is 0."""
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(), 1e-24))
