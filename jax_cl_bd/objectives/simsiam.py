"""SimSiam (Chen & He 2021): predict one view from the other, with a stop-gradient.

Fields of cfg.objective:
    name "simsiam"; layers of the projector (3; the paper's CIFAR runs have 2); hidden, dim:
    widths of its hidden layers and its output (2048, 2048); bottleneck: of the predictor (512).

Projector: linear and batch norm in every layer, ReLU after all but the last, whose norm has no
scale and bias. Predictor: linear, batch norm, ReLU, linear. Give the predictor a constant rate
with optim.constant_lr_modules = ("predictor",). Every view has its own pass (own statistics).

Recipe of the Noisy Alignment comparison: SGD lr 0.1, batch 256, weight decay 1e-4, cosine. The
paper has lr 0.05 * batch / 256; on CIFAR 0.03 * batch / 256 with weight decay 5e-4 and no blur.
"""

import jax

from jax_cl_bd.errors import UserError
from jax_cl_bd.models.heads import MLP
from jax_cl_bd.models.parts import forward
from jax_cl_bd.objectives.embeddings import cosine, output_std


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """Returns projector and predictor. Raises UserError on a projector without layers."""
    if cfg.layers < 1:
        raise UserError(f"objective.layers = {cfg.layers}; must be at least 1 (3, on CIFAR 2)")
    return {
        "projector": MLP(hidden=(cfg.hidden,) * (cfg.layers - 1), out=cfg.dim, hidden_norm=True,
                         out_norm=True, bn_groups=bn_groups),
        "predictor": MLP(hidden=(cfg.bottleneck,), out=cfg.dim, hidden_norm=True,
                         bn_groups=bn_groups)}


def init_extra(cfg, variables, key):
    """SimSiam keeps nothing between steps."""
    return {}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """Mean over the batch of -(cos(p1, z2) + cos(p2, z1)) / 2, no gradient through z (eq. 4).

    Returns:
        (loss, (batch_stats, extra, {"output_std": see embeddings.output_std, of view 1})).
    """
    base = ("encoder", "projector")
    z1, variables = forward(apply_fns, variables, base, batch["view1"])
    p1, variables = forward(apply_fns, variables, ("predictor",), z1)
    z2, variables = forward(apply_fns, variables, base, batch["view2"])
    p2, variables = forward(apply_fns, variables, ("predictor",), z2)
    t1, t2 = jax.lax.stop_gradient((z1, z2))
    value = -0.5 * (cosine(p1, t2) + cosine(p2, t1)).mean()
    return value, (variables["batch_stats"], extra, {"output_std": output_std(z1)})


def after_update(cfg, variables, extra, step, total_steps):
    """Nothing follows the optimiser."""
    return extra
