"""BYOL (Grill et al. 2020) as the SSL backdoor papers run it, after the htdt implementation.

Fields of cfg.objective:
    name "byol"; tau: EMA decay at the start (0.99); hidden, dim: widths of projector and
    predictor, each linear, batch norm, ReLU, linear (1024, 128).

Recipe: ResNet-18, Adam lr 0.002 with coupled weight decay 1e-6, 500 steps of warm-up, x 0.2 at
50 and 25 epochs before the end, batch 512 and 200 epochs (SSL-Backdoor) or 128 and 300 (the Noisy
Alignment comparison), bicubic crops, grayscale 0.1. The original paper has LARS, batch 4096,
hidden 4096, dim 256, tau 0.996.

Batch norm: every view has its own pass through online and target network, so statistics never
mix views. The target is an EMA of the parameters alone; its batch norm runs in train mode and
keeps running statistics of its own.

EMA schedule: tau(e) = 1 - (1 - tau) (cos(pi e / E) + 1) / 2, with e the epoch of the update,
counted from 0, of E = train.epochs. When train.steps sets the length, e / E is step / total_steps.
"""

import jax
import jax.numpy as jnp
import optax

from jax_cl_bd.models.heads import MLP
from jax_cl_bd.models.parts import copied, forward
from jax_cl_bd.objectives.embeddings import cosine, output_std

_TARGET = ("encoder", "projector")


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """Returns projector and predictor."""
    head = {"hidden": (cfg.hidden,), "out": cfg.dim, "hidden_norm": True, "bn_groups": bn_groups}
    return {"projector": MLP(**head), "predictor": MLP(**head)}


def init_extra(cfg, variables, key):
    """The target: encoder and projector as they start."""
    return {"target": copied({kind: {part: variables[kind][part] for part in _TARGET}
                              for kind in ("params", "batch_stats")})}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """Mean over the batch of (2 - 2 cos(p1, t2)) + (2 - 2 cos(p2, t1)).

    p is the online prediction of a view, t the target's projection, without gradient.

    Returns:
        (loss, (batch_stats, extra, {"output_std": see embeddings.output_std, of the online
        projections of view 1})).
    """
    target = extra["target"]
    z1, variables = forward(apply_fns, variables, _TARGET, batch["view1"])
    p1, variables = forward(apply_fns, variables, ("predictor",), z1)
    z2, variables = forward(apply_fns, variables, _TARGET, batch["view2"])
    p2, variables = forward(apply_fns, variables, ("predictor",), z2)
    t1, target = forward(apply_fns, target, _TARGET, batch["view1"])
    t2, target = forward(apply_fns, target, _TARGET, batch["view2"])
    t1, t2 = jax.lax.stop_gradient((t1, t2))
    value = (4 - 2 * cosine(p1, t2) - 2 * cosine(p2, t1)).mean()
    return value, (variables["batch_stats"], {"target": target}, {"output_std": output_std(z1)})


def after_update(cfg, variables, extra, step, total_steps):
    """Moves the target's parameters: tau * old + (1 - tau) * new; `step` counts from 0."""
    target = dict(extra["target"])
    online = {part: variables["params"][part] for part in _TARGET}
    target["params"] = optax.incremental_update(online, target["params"],
                                                1 - decay(cfg, step, total_steps))
    return {**extra, "target": target}


def decay(cfg, step, total_steps: int) -> jax.Array:
    """tau of the update number `step`, see the top of the file."""
    step = jnp.asarray(step)
    if not cfg.train.steps:
        per_epoch = max(total_steps // cfg.train.epochs, 1)
        step = step // per_epoch * per_epoch
    return 1 - (1 - cfg.objective.tau) * (jnp.cos(jnp.pi * step / total_steps) + 1) / 2
