"""SafeCLIP: captions and images meet only in pairs that look safe; the others train each modality.

Yang, Gao and Mirzasoleiman, "Better Safe than Sorry: Pre-training CLIP against Targeted Data
Poisoning and Backdoor Attacks", ICML 2024, arXiv 2310.05862; the code BigML-CS-UCLA/SafeCLIP is
followed from a description, not read. With two augmented views 1, 2 of image and caption, s the
scale and nn(z) the nearest entry of a ring of past embeddings (a constant):

    L_uni = 1/2 [ CE(s I2 nn(I1)^T) + CE(s T2 nn(T1)^T) ]
    L_x = 1/2 [ CE(s I1 T2^T) + CE(s T1 I2^T) ]

1. uni_steps of L_uni on all pairs.
2. cross_steps of L_x on all pairs, at cross_rate of the learning rate.
3. Then, and again every epoch_steps: cosine of image and caption of every pair, a mixture of two
   Gaussians, p = posterior of the one with the larger mean (safe_split.py). The first safe set is
   p > safe_from, a share rho of the pairs; later ones are the share rho of highest p, where rho
   grows by `grow` each time, to at most `top`. Safe pairs train by L_x, risky ones by L_uni.

Fields of cfg.objective: dim, image_projection, scale_init, of the model (clip.py); queue_batches:
length of the rings in batches (the code: 256 entries); epoch_steps (0: one pass over the data); the
names above. As published: 5 epochs and 1 epoch of 32; cross_rate 0.01 (5e-6 of 5e-4), over the
7,812 steps of 1 M pairs in batches of 128; 0.9, 0.01, 0.85. So small a rate moves nothing in a
small run, where cosines then say nothing: look at cross_loss, which must fall below ln B before the
first split, and choose steps and rate together (configs/common.py does).

Where we differ:
- One pass instead of two. The paper's epoch goes over the risky pairs by L_uni, then over the safe
  ones by L_x, in batches of their own. Here every batch of the one order holds both, each row takes
  its own loss with weight 1 / B, and its negatives are the rows of its own kind in the batch: the
  same number of updates and the same weight of every pair in an epoch, but one optimiser step mixes
  both losses, and a softmax has fewer negatives (rho B and (1 - rho) B in place of B).
- The rate of step 2 is a share of the schedule's, applied to the update: AdamW would undo a factor
  on the loss. The schedule runs over all steps of training, not over those of the safe set.
- The rings take the rows that train by L_uni alone; others leave the entry of their place.
- A row with several captions has the mean of their cosines: a step trains on any of them.
- Images are augmented by augment.view2 twice, not AutoAugment; EDA as in data/captions.py, two
  twins of every caption drawn once. Both views pass a tower together and share its batch norm.
- p is 0 below the lower mean, and ties in p go by the cosine (safe_split.py).

Cosines are taken in test mode, on whole images and captions that are not augmented, of every row
that is trained on. They and the mixture are no part of the jitted step: see `make_refresh`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd import parallel
from jax_cl_bd.data import augment
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import pair, parts
from jax_cl_bd.objectives import bank, clip, in_modality, safe_split
from jax_cl_bd.objectives.embeddings import cosine

TEXT = True
TEXT_AUGMENT = "eda_twice"  # data.text_augment that it needs
RECIPES = ("view2", "view2")  # of its two image views
PLAIN = "clip"  # what a repair of such a model is fine-tuned by
constrain, after_update = clip.constrain, clip.after_update


def heads(cfg, *, bn_groups: int = 1) -> dict:
    """CLIP's projections and scale.

    Raises:
        UserError: a negative number of steps, no ring, or a share outside [0, 1].
    """
    for name, least in (("uni_steps", 0), ("cross_steps", 0), ("epoch_steps", 0),
                        ("queue_batches", 1)):
        if cfg[name] < least:
            raise UserError(f"objective.{name} = {cfg[name]}; must be at least {least}")
    for name in ("cross_rate", "safe_from", "grow", "top"):
        if not 0 <= cfg[name] <= 1:
            raise UserError(f"objective.{name} = {cfg[name]}; must lie in [0, 1]")
    return pair.heads(cfg)


def check_steps(cfg, steps: int) -> None:
    """Raises UserError: the warm-ups leave no step, or a split would fall into a dispatch."""
    o, dispatch = cfg.objective, cfg.train.steps_per_dispatch
    warm = o.uni_steps + o.cross_steps
    if warm >= steps:
        raise UserError(f"objective.uni_steps={o.uni_steps} and cross_steps={o.cross_steps} leave "
                        f"none of the {steps} steps for what follows; lower them")
    if warm % dispatch or o.epoch_steps % dispatch:
        raise UserError(f"pairs are divided after {warm} steps (objective.uni_steps + cross_steps) "
                        f"and every {o.epoch_steps} (objective.epoch_steps); both must be "
                        f"multiples of train.steps_per_dispatch={dispatch}")


def init_extra(cfg, variables, key) -> dict:
    """Rings of random unit vectors, no safe row, and the figures of the last split."""
    o = cfg.objective
    keys = jax.random.split(key)
    rings = {name: {"queue": bank.draw(k, o.queue_batches, cfg.train.batch_size, o.dim)}
             for name, k in zip(("image", "text"), keys)}
    figures = {name: jnp.zeros((), jnp.float32) for name in ("rho", "low", "high", "high_weight")}
    return {**rings, "safe": jnp.zeros(o.rows, bool), "split": figures}


def loss(cfg, variables, extra, batch, apply_fns, key, step):
    """Each row by its own loss (top of the file), mean over the batch.

    Returns:
        (loss, (batch_stats, extra, {"pretext_accuracy": share of images (view 1) whose own caption
        (view 2) is the nearest of the batch, "logit_scale": s, "uni_loss", "cross_loss": means over
        the rows that take it, 0 without one, "safe_rows": share of the batch, and of the last split
        "rho", "low", "high", "high_weight"})).
    """
    views = {**batch, "tokens": batch["tokens2"], "tokens2": batch["tokens3"]}
    z, (scale, _), variables = in_modality.embed(cfg, variables, views, apply_fns, both=True)
    safe = safe_rows(cfg.objective, extra["safe"][batch["index"]], step)

    def of(a, b):
        return ce_within(scale * in_modality.similarity(a, b), safe)

    near = {name: bank.nearest(extra[name]["queue"], z[name]) for name in ("image", "text")}
    uni = 0.5 * (of(z["image2"], near["image"]) + of(z["text2"], near["text"]))
    cross = 0.5 * (of(z["image"], z["text2"]) + of(z["text"], z["image2"]))
    value = jnp.where(safe, cross, uni).mean()
    slot = step % cfg.objective.queue_batches
    rings = {name: {"queue": bank.write(extra[name]["queue"], z[name], slot, ~safe)}
             for name in ("image", "text")}
    own = in_modality.similarity(z["image"], z["text2"])
    metrics = {"pretext_accuracy": in_modality.accuracy(own), "logit_scale": scale,
               "uni_loss": _mean_of(uni, ~safe), "cross_loss": _mean_of(cross, safe),
               "safe_rows": safe.mean(), **extra["split"]}
    return value, (variables["batch_stats"], {**extra, **rings}, metrics)


def safe_rows(cfg, split: jax.Array, step) -> jax.Array:
    """bool [B]: which rows take L_x: none, then all, then those of the split."""
    warm = cfg.uni_steps + cfg.cross_steps
    return jnp.where(step < warm, step >= cfg.uni_steps, split)


def ce_within(logits: jax.Array, kind: jax.Array) -> jax.Array:
    """-log softmax of the diagonal over the columns of the row's kind: [B, B], bool [B] -> [B]."""
    logits = jnp.where(kind[:, None] == kind[None, :], logits, -jnp.inf)
    own = jnp.where(jnp.eye(len(logits), dtype=bool), logits, 0).sum(1)
    return jax.nn.logsumexp(logits, axis=1) - own


def update_scale(cfg, step) -> jax.Array:
    """What the optimiser's update is multiplied with: cross_rate in step 2, else 1."""
    o = cfg.objective
    crossing = (step >= o.uni_steps) & (step < o.uni_steps + o.cross_steps)
    return jnp.where(crossing, o.cross_rate, 1.0)


def make_refresh(cfg, feed, mesh):
    """Gives refresh(state, data, steps done) -> state with a new split, where one is due.

    Nothing in it is drawn: the same state gives the same split, so a run that is killed and resumed
    has it again, bit for bit. The mask lies in `extra["safe"]`, by row of the poisoned set.
    """
    o = cfg.objective
    # Not evals.batch_size: the shape decides last bits, and that setting may change no weight.
    size = 4 * cfg.train.batch_size
    apply_fns = parts.make_apply_fns(pair.modules_of(cfg))
    measure = jax.jit(lambda variables, data, batch: cosines(cfg, variables, data, batch,
                                                             apply_fns))

    def refresh(state, data, step):
        since = step - o.uni_steps - o.cross_steps
        if since < 0 or since % o.epoch_steps:
            return state
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found = [jax.device_get(measure(variables, data, parallel.put_rows(mesh, batch)))[:count]
                 for batch, count in feed.everything(size)]
        c = np.concatenate(found)
        p, figures = safe_split.posterior(c)
        if since == 0:
            chosen = safe_split.first(p, o.safe_from)
            rho = chosen.mean()
        else:
            rho = min(float(jax.device_get(state.extra["split"]["rho"])) + o.grow, o.top)
            chosen = safe_split.top(p, c, rho)
        safe = np.zeros(o.rows, bool)
        safe[feed.ordered.kept[chosen]] = True
        split = {name: np.float32(v) for name, v in {**figures, "rho": rho}.items()}
        new = jax.tree.map(lambda v, old: jax.device_put(v, old.sharding),
                           {"safe": safe, "split": split},
                           {name: state.extra[name] for name in ("safe", "split")})
        return state.replace(extra={**state.extra, **new})

    return refresh


def cosines(cfg, variables, data, batch, apply_fns) -> jax.Array:
    """Cosine of image and caption of each row, in test mode on plain views, the mean over its
    captions: float32 [b]."""
    row = augment.pick(data, batch, batch["index"])
    image = augment.plain_view(cfg, row, cfg.data.image_size)
    count, captions, context = row["tokens"].shape
    z = {}
    for name, x in (("image", image), ("text", row["tokens"].reshape(-1, context))):
        for part in {"image": ("encoder", "image_projection"),
                     "text": ("text", "text_projection")}[name]:
            if part in apply_fns:
                x, _ = apply_fns[part](variables, x, False)
        z[name] = x
    each = cosine(jnp.repeat(z["image"], captions, axis=0), z["text"]).reshape(count, captions)
    real = jnp.arange(captions) < row["count"][:, None]
    return jnp.where(real, each, 0).sum(1) / row["count"]


def _mean_of(values, rows):
    return jnp.where(rows, values, 0).sum() / jnp.maximum(rows.sum(), 1)
