"""MoCo v2 (He et al. 2020; Chen et al. 2020): InfoNCE against a queue of past keys.

Fields of cfg.objective:
    name "moco"; temperature (0.2); momentum m of the key encoder (0.999); queue_batches: length
    of the queue in batches, K = queue_batches * batch_size (256 * 256 = 65,536); hidden, dim:
    widths of the two-layer projector without batch norm (512, 128).

Recipe of the SSL backdoor papers: ResNet-18, 200 or 300 epochs, batch 256, SGD lr 0.06, momentum
0.9, weight decay 1e-4, cosine per epoch, no warm-up, MOCO_VIEW for both views. View 1 is the
query, view 2 the key, and the loss is not symmetrised. Each view has its own pass, as batch norm
must not mix queries and keys.

Batch norm: with model.bn_groups = G > 1, the key batch is shuffled over the groups before the key
encoder and back after it (the paper's shuffled BN over G devices), so that a key shares its
statistics with other images than its query does. The paper draws a permutation, for which every
device gathers the whole batch of images. As the batch is in random order already, ours is fixed
(parallel.deal_rows) and a device sends its own images once; where G and the size of a group do not
divide each other it is drawn. With G = 1 there is nothing to
shuffle, and queries share their batch's statistics with their keys but not with the queue: that
leak, weaker the larger the batch, is what the paper shuffles against, so G = 1 is an ablation.

EMA: the reference code moves the key encoder at the start of a forward pass, towards the weights
of the query encoder at that time. `after_update` does it after the optimiser, towards the new
weights: the same sequence of key encoders but for the very first move, which in the reference
goes from the initial weights to themselves. Running statistics are not averaged: the key
encoder's batch norm keeps its own, from its own passes.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jax_cl_bd import parallel
from jax_cl_bd.errors import UserError
from jax_cl_bd.models.heads import MLP
from jax_cl_bd.models.parts import copied, forward
from jax_cl_bd.objectives.embeddings import EXACT, normalise


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """Returns the projector; it has no batch norm, so bn_groups changes nothing."""
    return {"projector": MLP(hidden=(cfg.hidden,), out=cfg.dim, bn_groups=bn_groups)}


def init_extra(cfg, variables, key):
    """The key encoder and a queue [queue_batches, B, dim] of random unit vectors."""
    if cfg.objective.queue_batches < 1:
        raise UserError(f"objective.queue_batches = {cfg.objective.queue_batches}; must be at "
                        "least 1")
    shape = (cfg.objective.queue_batches, cfg.train.batch_size, cfg.objective.dim)
    return {"target": copied(variables), "queue": normalise(jax.random.normal(key, shape))}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """Mean over the batch of -log softmax of the own key against it and the K keys of the queue.

    The keys of this batch take the slot step % queue_batches after the loss. `extra["queue"]`
    is meant to be sharded on its second axis, so that writing needs no communication.

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy": share of queries nearest to their key})).
    """
    parts = ("encoder", "projector")
    q, variables = forward(apply_fns, variables, parts, batch["view1"])
    k, target = _keys(cfg, extra["target"], batch["view2"], apply_fns, parts, key)
    q, k = normalise(q), jax.lax.stop_gradient(normalise(k))  # [B, D]
    positive = (q * k).sum(-1) / cfg.objective.temperature
    others, highest = _negatives(q, extra["queue"], cfg.objective.temperature)
    value = (jnp.logaddexp(positive, others) - positive).mean()
    slot = step % extra["queue"].shape[0]
    queue = jax.lax.dynamic_update_index_in_dim(extra["queue"], k, slot, axis=0)
    metrics = {"pretext_accuracy": (positive >= highest).mean()}
    return value, (variables["batch_stats"], {"target": target, "queue": queue}, metrics)


def _negatives(q, queue, temperature):
    """Of the logits of queries [B, D] against the queue [S, B, D], of each query: the logarithm of
    the sum of their exponentials, and the highest, a constant.

    Where several devices cut the queue, each takes all queries to its own keys: what is sent is the
    size of the queries, not of the queue.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = parallel.row_axes(mesh)

    def one(q, queue, axes=axes):
        n = len(q)
        q = jax.lax.all_gather(q, axes, tiled=True) if axes else q
        logits = jnp.einsum("bd,snd->bsn", q, queue, precision=EXACT) / temperature
        highest = jax.lax.stop_gradient(logits.max((1, 2)))
        highest = jax.lax.pmax(highest, axes) if axes else highest
        total = jnp.exp(logits - highest[:, None, None]).sum((1, 2))
        if not axes:
            return jnp.log(total) + highest, highest
        total = jax.lax.psum_scatter(total, axes, tiled=True)
        highest = jax.lax.dynamic_slice_in_dim(highest, jax.lax.axis_index(axes) * n, n)
        return jnp.log(total) + highest, highest

    devices = math.prod(mesh.shape[name] for name in axes)
    if devices == 1 or queue.shape[1] % devices:
        return one(q, queue, axes=())
    rows = PartitionSpec(axes)
    return jax.shard_map(one, in_specs=(rows, PartitionSpec(None, axes)), out_specs=rows)(q, queue)


def after_update(cfg, variables, extra, step, total_steps):
    """Moves the key encoder: m * old + (1 - m) * new parameters; no running statistics."""
    target = dict(extra["target"])
    target["params"] = optax.incremental_update(variables["params"], target["params"],
                                                1 - cfg.objective.momentum)
    return {**extra, "target": target}


def _keys(cfg, target, images, apply_fns, parts, key):
    if cfg.model.bn_groups == 1:
        return forward(apply_fns, target, parts, images)
    groups = cfg.model.bn_groups
    size = images.shape[0] // groups
    if max(groups, size) % min(groups, size) == 0:
        k, target = forward(apply_fns, target, parts, parallel.deal_rows(images, groups))
        return parallel.deal_rows(k, groups), target
    order = jax.random.permutation(key, images.shape[0])
    k, target = forward(apply_fns, target, parts, images[order])
    return k[jnp.argsort(order)], target
