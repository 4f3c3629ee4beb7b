"""PAR, Perturb and Recover: fine-tuning that moves a poisoned CLIP away from itself.

Singh, Croce and Hein, arXiv 2412.00727. With phi, psi the towers in training and phi_P, psi_P the
suspect's, frozen, all of unit length:

    S_img = mean_b |phi(x_b) - phi_P(x_b)|^2, S_txt likewise, each in [0, 4]
    L = L_CLIP - 1/2 ( [S_img <= tau] S_img + [S_txt <= tau] S_txt )

Once a tower has moved farther than tau its term is zero and L_CLIP alone recovers the accuracy.
Field of cfg.objective besides CLIP's: tau (2.15, chosen once by the authors). The suspect is what
training starts from; it lies in `extra`, in test mode. For repairs (defenses/par.py); of CLIP
models alone. Where we differ: no image augmentation (the authors: Gaussian noise and small CutOut),
and the schedule is the sweep's.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, in_modality
from jax_cl_bd.objectives.embeddings import normalise

TEXT = True
constrain, after_update = clip.constrain, clip.after_update


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale. Raises UserError: tau outside (0, 4], or an in-modality term.
    """
    if not 0 < cfg.tau <= 4:
        raise UserError(f"objective.tau = {cfg.tau}; a squared distance of unit vectors, so it "
                        "must lie in (0, 4]")
    if cfg.in_modality > 0:
        raise UserError(f"objective.in_modality = {cfg.in_modality}; PAR has no such term, set 0")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def init_extra(cfg, variables, key) -> dict:
    """The suspect: a copy of the variables that training starts from."""
    return {"suspect": jax.tree.map(jnp.copy, variables)}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """L_CLIP minus the perturbation (top of the file).

    Returns:
        (loss, (batch_stats, extra, {CLIP's metrics, "clip_loss", "moved_image": S_img,
        "moved_text": S_txt})).
    """
    z, (scale, _), variables = in_modality.embed(cfg, variables, batch, apply_fns)
    logits = scale * in_modality.similarity(z["image"], z["text"])
    recover = 0.5 * (in_modality.cross_entropy(logits) + in_modality.cross_entropy(logits.T))
    moved = {}
    for name, x, parts in (
            ("image", batch["view1"], ("encoder", "image_projection")),
            ("text", batch["tokens"], ("text", "text_projection"))):
        for part in parts:
            if part in apply_fns:
                x, _ = apply_fns[part](extra["suspect"], x, False)
        moved[name] = ((z[name] - normalise(x)) ** 2).sum(1).mean()
    perturb = 0.5 * sum(jnp.where(s <= cfg.objective.tau, s, 0.0) for s in moved.values())
    metrics = {"pretext_accuracy": in_modality.accuracy(logits), "logit_scale": scale,
               "clip_loss": recover, "moved_image": moved["image"], "moved_text": moved["text"]}
    return recover - perturb, (variables["batch_stats"], extra, metrics)
