"""Training a classifier on labelled images by cross-entropy, for whoever needs one.

`modules` are the parts that an image passes, {name: linen module}: the encoder first, a linear
layer named HEAD last.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_cl_bd.data import augment, feed, sources
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import parts
from jax_cl_bd.models.heads import Projection
from jax_cl_bd.train import TrainState

HEAD = "classes"


def check_batch(cfg, clean: int) -> None:
    """Refuses fewer images to train on than one batch. Raises UserError."""
    if clean < cfg.defense.batch_size:
        raise UserError(f"{clean} clean images with labels are fewer than one batch of "
                        f"defense.batch_size={cfg.defense.batch_size}")


def labelled(cfg, source):
    """The rows of a source that have a label; UserError if they are fewer than one batch."""
    labels = sources.labels(source)
    check_batch(cfg, int((labels >= 0).sum()))
    return source if (labels >= 0).all() else sources.Subset(source, np.flatnonzero(labels >= 0))


def head(classes: int) -> Projection:
    """The last part: one linear layer with bias."""
    return Projection(classes, use_bias=True)


def first_state(variables: dict, tx, key: jax.Array) -> TrainState:
    """The state before the first step, of {"params": {part: ...}, "batch_stats": {part: ...}}."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=variables["params"],
                      batch_stats=variables["batch_stats"],
                      opt_state=tx.init(variables["params"]), extra={}, key=key)


def make_step(cfg, modules: dict, tx, view):
    """The step function of train.fit; images are augmented as `view` says (data/augment.py)."""
    apply_fns = parts.make_apply_fns(modules)

    def step_fn(state, data, batch):
        view_key = jax.random.fold_in(state.key, state.step)
        x = augment.one_view(view, cfg.augment.interpolation, cfg.data.mean, cfg.data.std, data,
                             batch, view_key)

        def loss_of(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, variables = parts.forward(apply_fns, variables, tuple(modules), x)
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), data["labels"][batch["index"]]).mean()
            return loss, variables["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return state.replace(step=state.step + 1, batch_stats=stats, opt_state=opt_state,
                             params=optax.apply_updates(state.params, updates)), {"loss": loss}

    return step_fn


class Feed:
    """The feed of a source whose data also hold the labels of its rows, of which all have one."""

    def __init__(self, cfg, source):
        inner = feed.make(cfg, PoisonedSet(source))
        self.data = {**inner.data, "labels": np.int32(sources.labels(source))}
        self.batches = inner.batches


def logits(modules: dict, variables: dict, x):
    """What the parts give of their input [N, ...], outside training: float32 [N, C]."""
    apply_fns = parts.make_apply_fns(modules)
    for name in modules:
        x, _ = apply_fns[name](variables, x, False)
    return x.astype(jnp.float32)
