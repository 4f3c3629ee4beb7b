"""Optimisers and learning-rate schedules with PyTorch's semantics.

Fields of cfg.optim: name "sgd" | "adam" | "adamw"; lr; momentum (sgd); b1, b2, eps (adamw);
weight_decay, *coupled* for sgd and adam: added to the gradient before momentum, on all parameters
including biases and batch norm, as torch.optim does; *decoupled* for adamw, and not on biases,
norms and the logit scale (CLIP); schedule "cosine" | "step" | "constant" | "warmup_cosine";
per_epoch: the schedule moves once per epoch; warmup_steps: the first steps are multiplied by (step
+ 1) / warmup_steps, without shifting the schedule but in "warmup_cosine", whose cosine begins after
them (CLIP's usual schedule); milestones: fractions of all steps at which "step" multiplies by
decay; constant_lr_modules: parts of the model whose rate is lr throughout (SimSiam's predictor);
clip_norm (optional): gradients longer than that, all parts together, are scaled down to it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jax_cl_bd.errors import UserError, unknown


def make(cfg, total_steps: int, steps_per_epoch: int
         ) -> tuple[optax.GradientTransformation, Callable]:
    """Builds the optimiser of cfg = config.optim.

    Returns:
        The transformation, whose `init` takes {part: parameters}, and schedule(step) -> learning
        rate of update number `step`, counted from 0.

    Raises:
        UserError: an unknown name or an impossible value; from `init`, a name in
            constant_lr_modules that the model does not have.
    """
    _check(cfg, total_steps, steps_per_epoch)
    return (build(cfg, total_steps, steps_per_epoch),
            make_schedule(cfg, total_steps, steps_per_epoch))


def build(cfg, total_steps: int, steps_per_epoch) -> optax.GradientTransformation:
    """The transformation of `make`, unchecked; steps_per_epoch may be a traced integer."""
    tx = _partitioned(cfg, make_schedule(cfg, total_steps, steps_per_epoch))
    if cfg.get("clip_norm"):
        tx = optax.chain(optax.clip_by_global_norm(cfg.clip_norm), tx)
    return tx


def _partitioned(cfg, schedule):
    if not cfg.constant_lr_modules:
        return _transform(cfg, schedule)
    constant = frozenset(cfg.constant_lr_modules)

    def labels(params):
        if not constant <= set(params):
            missing = sorted(constant - set(params))[0]
            raise unknown("part in optim.constant_lr_modules", missing, params)
        return {part: "constant" if part in constant else "scheduled" for part in params}

    parts = {"scheduled": _transform(cfg, schedule), "constant": _transform(cfg, cfg.lr)}
    return optax.partition(parts, labels)


def make_schedule(cfg, total_steps: int, steps_per_epoch: int) -> Callable:
    """Returns step -> learning rate (float32 scalar), for Python and traced integers."""
    boundaries = [round(fraction * total_steps) for fraction in cfg.milestones]

    def schedule(step):
        now = jnp.asarray(step)
        at = now // steps_per_epoch * steps_per_epoch if cfg.per_epoch else now
        if cfg.schedule == "warmup_cosine":
            share = (at - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
            factor = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0.0, 1.0)))
        elif cfg.schedule == "cosine":
            factor = 0.5 * (1 + jnp.cos(jnp.pi * at / total_steps))
        elif cfg.schedule == "step":
            passed = sum((at >= b).astype(jnp.float32) for b in boundaries)
            factor = cfg.decay**passed
        else:
            factor = 1.0
        if cfg.warmup_steps:
            factor = factor * jnp.minimum(1.0, (now + 1) / cfg.warmup_steps)
        return jnp.asarray(cfg.lr * factor, jnp.float32)

    return schedule


def decayed(params) -> dict:
    """Marks what adamw decays: all but biases, gains of norms, and logit scale and bias."""
    spared = ("bias", "scale", "logit_scale", "logit_bias")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in spared, params)


def _transform(cfg, rate):
    if cfg.name == "adamw":
        return optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps,
                           weight_decay=cfg.weight_decay, mask=decayed)
    if cfg.name == "sgd":
        rule = optax.trace(cfg.momentum) if cfg.momentum else optax.identity()
    else:
        rule = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    return optax.chain(optax.add_decayed_weights(cfg.weight_decay), rule,
                       optax.scale_by_learning_rate(rate))


def _check(cfg, total_steps, steps_per_epoch):
    for field, allowed in (("name", ("sgd", "adam", "adamw")),
                           ("schedule", ("cosine", "step", "constant", "warmup_cosine"))):
        if cfg[field] not in allowed:
            raise unknown(f"optim.{field}", cfg[field], allowed)
    if total_steps < 1 or steps_per_epoch < 1:
        raise UserError(f"{total_steps} steps of which {steps_per_epoch} per epoch: both must be "
                        "at least 1; the data set must hold at least one batch")
    missing = {"sgd": ("momentum",), "adam": (), "adamw": ("b1", "b2", "eps")}[cfg.name]
    for field in missing:
        if field not in cfg:
            raise UserError(f"optim.name = {cfg.name!r} needs optim.{field}, which this config "
                            "does not have; add it to the group optim of the config file")
    if cfg.lr <= 0 or cfg.weight_decay < 0 or cfg.warmup_steps < 0:
        raise UserError(f"optim.lr = {cfg.lr} must be positive; optim.weight_decay = "
                        f"{cfg.weight_decay} and optim.warmup_steps = {cfg.warmup_steps} must "
                        "not be negative")
    if cfg.get("clip_norm", 0) < 0:
        raise UserError(f"optim.clip_norm = {cfg.clip_norm} must be positive, or 0 for no clipping")
    if not all(0 <= m <= 1 for m in cfg.milestones):
        raise UserError(f"optim.milestones = {tuple(cfg.milestones)}: fractions of all steps, "
                        "each between 0 and 1")
