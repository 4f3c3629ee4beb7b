"""Gradient caching: a contrastive loss of the whole batch in the memory of a part of it.

Gao, Zhang, Han and Callan 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", section 3.2: all rows are embedded without keeping activations, the loss of the whole batch
gives the gradient of every embedding, and the rows are embedded once more, part by part, to pass
it on. Here the objective is left as it is and its towers are replaced: each goes through its rows
in `train.chunks` parts, one after another, and keeps the inputs of a part alone; the backward pass
makes the activations of a part again and drops them before it turns to the next. It costs one more
forward pass.

Accumulation that averages the gradients of small batches is another loss, with fewer negatives;
this is the same one, up to rounding.

Batch norm: a part sees its own rows. That is the uncached step's arithmetic only where groups do
not reach beyond a part, so `check` asks for model.bn_groups that divide by parts times devices.
Running averages are means over groups either way.

On a CPU backward convolutions inside a loop are slow (a hundred times, in some shapes), so the
setting is for accelerators, or for towers without convolutions.
"""

import jax
import ml_collections

from jax_cl_bd import parallel
from jax_cl_bd.errors import UserError

WHOLE = ("scale",)  # parts that look at no row


def check(cfg: ml_collections.ConfigDict, devices: int, *, has_batch_norm: bool) -> None:
    """Finds chunks that do not fit the batch or the batch norm.

    Raises:
        UserError: naming what would fit.
    """
    chunks, batch_size = cfg.train.chunks, cfg.train.batch_size
    if chunks < 1 or batch_size % (chunks * devices):
        raise UserError(f"train.chunks={chunks} must divide train.batch_size={batch_size} over "
                        f"{devices} devices: chunks times devices must divide it (1: off)")
    if chunks > 1 and has_batch_norm and cfg.model.bn_groups % (chunks * devices):
        raise UserError(
            f"train.chunks={chunks} with batch norm over model.bn_groups={cfg.model.bn_groups} "
            f"groups would compute other statistics than the whole batch does; set "
            f"model.bn_groups to a multiple of chunks times devices, {chunks * devices}, or chunks "
            "to 1")


def chunked(apply_fns: dict, chunks: int) -> dict:
    """The functions of models/parts.make_apply_fns, each in `chunks` parts of its rows.

    Batch norm inside must have model.bn_groups / chunks groups.
    """
    if chunks == 1:
        return apply_fns
    return {name: fn if name in WHOLE else _in_parts(fn, chunks) for name, fn in apply_fns.items()}


def _in_parts(fn, chunks):
    def apply(variables, x, train):
        def one(_, part):
            return None, fn(variables, part, train)

        parts = parallel.split_rows(x, chunks)
        _, (y, stats) = jax.lax.scan(jax.checkpoint(one), None, parts)
        return parallel.join_rows(y), jax.tree.map(lambda s: s.mean(0), stats)

    return apply
