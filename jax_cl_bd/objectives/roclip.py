"""RoCLIP: pretraining in which, every few epochs, images meet the nearest caption of a pool.

Yang, Gao and Mirzasoleiman, "Robust Contrastive Language-Image Pretraining against Data Poisoning
and Backdoor Attacks", NeurIPS 2023, arXiv 2303.06854; code BigML-CS-UCLA/RoCLIP (train.py,
memory_bank.py and data.py in model/src). Epochs count from 1. In every K-th one, with B the pool of
caption embeddings, s the scale and I, T the batch:

    T_nn[i] = B[argmax_b cos(I[i], B[b])], looked up first; then T goes into B, the oldest go out
    L = 1/2 [ CE(s I T_nn^T) + CE(s T_nn I^T) ]

and L_CLIP in all others. Always of one augmented view of image (augment.view2) and caption (EDA).
Fields of cfg.objective:
    dim, image_projection, scale_init: of the model, see clip.py.
    break_every: K (2); 0: never, which leaves the augmentation alone, a control of ours.
    epoch_steps: steps of an epoch (0: one pass over the data).
    queue_batches: length of the pool in batches. The code has 21,845 captions, about 2 % of 1 M.

As in the code: the pool holds constants, so in such an epoch only the image tower and the scale get
a gradient (the text tower's weights still decay, and Adam's momentum moves them); it is filled in
such epochs alone, so it is random at the very first and stale at the start of every later one.

Differences: images are augmented by augment.view2, not AutoAugment; EDA as in data/captions.py,
drawn once for every caption (the code: once for every data set object), where a row may have
several captions and a step chooses one; the pool is a whole number of batches. How a pool that is
small for its batch behaves is not in the paper: several images then share a T_nn and are each
other's negatives.
"""

import jax.numpy as jnp

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import pair
from jax_cl_bd.objectives import bank, clip, in_modality

TEXT = True
TEXT_AUGMENT = "eda"  # data.text_augment that it needs
PLAIN = "clip"  # what a repair of such a model is fine-tuned by
constrain, after_update = clip.constrain, clip.after_update


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale.

    Raises:
        UserError: a negative number of epochs or steps, or no pool.
    """
    for name, least in (("break_every", 0), ("epoch_steps", 0), ("queue_batches", 1)):
        if cfg[name] < least:
            raise UserError(f"objective.{name} = {cfg[name]}; must be at least {least}")
    return pair.heads(cfg)


def init_extra(cfg, variables, key) -> dict:
    """The pool, [queue_batches, B, dim] random unit vectors."""
    return {"queue": bank.draw(key, cfg.objective.queue_batches, cfg.train.batch_size,
                               cfg.objective.dim)}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """The loss of this step's epoch (top of the file).

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy": share of images whose own caption is the
        nearest of the batch, "logit_scale": s, "matched": 1 in an epoch of the pool, else 0})).
    """
    views = {"view1": batch["view2"], "tokens": batch["tokens2"]}
    z, (scale, _), variables = in_modality.embed(cfg, variables, views, apply_fns, both=False)
    matched, slot = phase(cfg.objective, step)
    text = jnp.where(matched, bank.nearest(extra["queue"], z["image"]), z["text"])
    queue = bank.write(extra["queue"], z["text"], slot, matched)
    logits = scale * in_modality.similarity(z["image"], text)  # [B, B], float32
    value = 0.5 * (in_modality.cross_entropy(logits) + in_modality.cross_entropy(logits.T))
    own = in_modality.similarity(z["image"], z["text"])
    metrics = {"pretext_accuracy": in_modality.accuracy(own), "logit_scale": scale,
               "matched": jnp.float32(matched)}
    return value, (variables["batch_stats"], {"queue": queue}, metrics)


def phase(cfg, step):
    """(whether a step, counted from 0, is in an epoch of the pool; the slot that it then fills)."""
    if not cfg.break_every:
        return jnp.bool_(False), 0
    before = step // cfg.epoch_steps  # whole epochs done; this is epoch before + 1
    filled = before // cfg.break_every * cfg.epoch_steps + step % cfg.epoch_steps
    return (before + 1) % cfg.break_every == 0, filled % cfg.queue_batches
