"""ABD, Adversarial Backdoor Defense: CLIP's loss with adversarial images as the augmented view.

Kuang et al., "Adversarial Backdoor Defense in CLIP", arXiv 2409.15968: adversarial examples of a
poisoned model lie near its triggered images in feature space, so a model that keeps them beside
their clean originals unlearns the trigger. The text view is EDA's (data/captions.py). No code and
no full text were read; the form is reconstructed from what is said of it:

    x_adv = x + d, |d|_inf <= budget, projected gradient ascent of 1 - cos(f(x + d), f(x))
    L = L_CLIP + lambda 1/2 [ CE(s I I_adv^T) + CE(s T T~^T) ]

Fields of cfg.objective besides CLIP's: in_modality is lambda, budget (8/255; in units of [0, 1],
before the normalisation), pgd_steps (10), pgd_rate: length of one step as a share of the budget
(0.25, so ten steps cross it), all of them unverified. f is the image tower with its projection in
test mode, d starts uniform in the budget (at d = 0 the gradient is zero), steps go by the sign of
the gradient, x + d stays in [0, 1], and no gradient passes through x_adv. Originals and adversarial
images share the batch norm of their pass (in_modality.py). For repairs (defenses/abd.py), of CLIP
models alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import clip, in_modality
from jax_cl_bd.objectives.embeddings import cosine

TEXT = True
init_extra, after_update, constrain = clip.init_extra, clip.after_update, clip.constrain


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale.

    Raises:
        UserError: lambda is 0, or a budget, a number or a length of steps out of range.
    """
    if cfg.in_modality <= 0:
        raise UserError(f"objective.in_modality = {cfg.in_modality}; it is the weight of ABD's "
                        "views and must be above 0")
    if not 0 < cfg.budget <= 1:
        raise UserError(f"objective.budget = {cfg.budget}; must lie in (0, 1], units of pixels in "
                        "[0, 1]")
    if cfg.pgd_steps < 1 or cfg.pgd_rate <= 0:
        raise UserError(f"objective.pgd_steps = {cfg.pgd_steps} must be at least 1 and pgd_rate = "
                        f"{cfg.pgd_rate} positive, a share of the budget")
    return in_modality.heads(cfg, bn_groups=bn_groups)


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """The loss at the top of the file.

    Returns:
        (loss, (batch_stats, extra, {CLIP's metrics, "adversarial_cosine": mean cos(f(x_adv), f(x))
        in test mode})).
    """
    view, reached = adversarial(cfg, variables, batch["view1"], apply_fns, key)
    value, (stats, extra, metrics) = clip.loss(cfg, variables, extra, {**batch, "view2": view},
                                               apply_fns, key, step)
    return value, (stats, extra, metrics | {"adversarial_cosine": reached})


def adversarial(cfg, variables: dict, x: jax.Array, apply_fns: dict, key: jax.Array):
    """Adversarial views of normalised images [B, S, S, 3], and their mean cosine to them."""
    o = cfg.objective
    mean, std = np.float32(cfg.data.mean), np.float32(cfg.data.std)
    frozen = jax.lax.stop_gradient(variables)

    def embed(pixels):
        z = (pixels - mean) / std
        for name in ("encoder", "image_projection"):
            if name in apply_fns:
                z, _ = apply_fns[name](frozen, z, False)
        return z

    pixels = jax.lax.stop_gradient(x) * std + mean
    origin = embed(pixels)

    def ascend(_, d):
        grad = jax.grad(lambda d: -cosine(embed(pixels + d), origin).sum())(d)
        return within(d + o.pgd_rate * o.budget * jnp.sign(grad))

    def within(d):
        return jnp.clip(pixels + jnp.clip(d, -o.budget, o.budget), 0.0, 1.0) - pixels

    first = within(jax.random.uniform(key, x.shape, minval=-o.budget, maxval=o.budget))
    # Backward convolutions inside a loop are slow on a CPU, so there the steps are written out.
    unroll = jax.default_backend() == "cpu"
    d = jax.lax.fori_loop(0, o.pgd_steps, ascend, first, unroll=unroll)
    shown = jax.lax.stop_gradient(pixels + d)
    return (shown - mean) / std, cosine(embed(shown), origin).mean()
