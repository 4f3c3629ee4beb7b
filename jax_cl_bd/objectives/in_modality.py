"""Towers of image-text objectives, and the terms that compare a pair with its augmented self.

Fields of cfg.objective, shared by clip and siglip:
    in_modality: weight of L_SS (0.0: none, and the augmented views never run through a tower; 1.0
    is CleanCLIP's); in_modality_temperature: 0.0 shares the learned scale s of the pretraining
    loss (CleanCLIP), tau > 0 has the fixed scale 1 / tau instead (0.1 in other code: another
    method than CleanCLIP's).

L_SS = 1/2 [ CE(s I I~^T) + CE(s T T~^T) ] (Bansal et al. 2023, CleanCLIP, and its code). Rows are
the originals, columns the augmented views of the whole batch, so it goes one way and a row's
negatives are the augmented views of others. In pretraining it is the "MMCL + SSL" of Verma et al.
(arXiv 2311.14948), after which backdoors are harder to clean away. We found no formula of an
in-modality term of Noisy Alignment's own; its image-text runs take this one too.

Batch norm: originals and augmented views go through a tower in one pass, as in CleanCLIP's code
("MMCL + SSL" victims are made that way), so they share the statistics of 2 B examples. They are
interleaved, so a pair stays on its device and in its batch-norm group.
"""

import jax
import jax.numpy as jnp

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import pair
from jax_cl_bd.models.parts import forward
from jax_cl_bd.objectives.embeddings import EXACT, interleave, normalise


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """Returns the projections and the scale; none has batch norm, so bn_groups does nothing.

    Raises:
        UserError: in_modality settings below 0.
    """
    for name in ("in_modality", "in_modality_temperature"):
        if cfg[name] < 0:
            raise UserError(f"objective.{name} = {cfg[name]}; must be 0 (off) or more")
    return pair.heads(cfg)


def init_extra(cfg, variables, key) -> dict:
    """Image-text objectives keep nothing between steps."""
    return {}


def embed(cfg, variables: dict, batch: dict, apply_fns: dict, *, both: bool | None = None):
    """Runs both towers, with the second views only where the loss has use for them.

    Args:
        both: also the second views; None: with in_modality alone.
    Returns:
        z: {"image", "text"} and, with `both`, {"image2", "text2"}: float32 [B, E] unit rows.
        (scale, bias): s = exp(t'), float32 scalar, and the scale's bias or None.
        variables: with the new running statistics.

    Raises:
        UserError: the towers end in different widths.
    """
    image = ("encoder", "image_projection") if cfg.objective.image_projection else ("encoder",)
    both = cfg.objective.in_modality > 0 if both is None else both
    z = {}
    for name, parts, first, second in (
            ("image", image, "view1", "view2"),
            ("text", ("text", "text_projection"), "tokens", "tokens2")):
        x = interleave(batch[first], batch[second]) if both else batch[first]
        x, variables = forward(apply_fns, variables, parts, x)
        x = normalise(x)
        if both:
            pairs = x.reshape(-1, 2, x.shape[-1])
            z[name], z[name + "2"] = pairs[:, 0], pairs[:, 1]
        else:
            z[name] = x
    if z["image"].shape[1] != z["text"].shape[1]:
        raise UserError(f"the image tower ends in width {z['image'].shape[1]}, the text tower in "
                        f"objective.dim = {z['text'].shape[1]}; make them equal, or set "
                        "objective.image_projection = True")
    (log_scale, bias), variables = forward(apply_fns, variables, ("scale",), z["image"])
    return z, (jnp.exp(log_scale.astype(jnp.float32)), bias), variables


def term(cfg, z: dict, scale: jax.Array) -> jax.Array:
    """L_SS without its weight (top of the file); z and scale as `embed` gives them."""
    tau = cfg.objective.in_modality_temperature
    scale = 1 / tau if tau > 0 else scale
    return 0.5 * sum(cross_entropy(scale * similarity(z[name], z[name + "2"]))
                     for name in ("image", "text"))


def add(cfg, value: jax.Array, z: dict, scale: jax.Array):
    """Adds the weighted term to a loss, if there is one; gives (loss, its metrics)."""
    if cfg.objective.in_modality <= 0:
        return value, {}
    more = term(cfg, z, scale)
    return value + cfg.objective.in_modality * more, {"in_modality_loss": more}


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products of all rows, [N, D] and [M, D] -> float32 [N, M]."""
    return jnp.matmul(a, b.T, precision=EXACT)


def cross_entropy(logits: jax.Array) -> jax.Array:
    """CE(M): mean over rows of -log softmax of the diagonal; [N, N] -> scalar."""
    # Picked by a mask, since taking the diagonal of a matrix cut by rows would move it.
    own = jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0).sum(1)
    return (jax.nn.logsumexp(logits, axis=1) - own).mean()


def accuracy(logits: jax.Array) -> jax.Array:
    """Share of rows whose highest logit is on the diagonal; of equal ones the first counts."""
    return (logits.argmax(1) == jnp.arange(len(logits))).mean()
