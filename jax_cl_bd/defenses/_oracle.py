"""The oracle of EftCLIP (arXiv 2511.13545): what is really in an image, asked of somebody else.

`ground(source, rows) -> float32 [N, C]`: how sure it is that each class is in each image. Regions
come from `_regions`. Back-ends (defense.oracle.name):

- "ground_truth": the label of the picture (and of an object that an attack drew beside), which a
  share `error` of rows has wrong (another class alone, drawn once for each row). With error 0 it
  is an upper bound and no oracle that exists.
- "classifier": an image classifier trained here on the defender's clean labelled images alone, so
  it shares nothing with the suspect. It sees whole images.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath

from jax_cl_bd import optim, run_folder
from jax_cl_bd.data import augment, feed, images
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import build, parts
from jax_cl_bd.models.heads import Projection
from jax_cl_bd.train import TrainState, born_sharded, fit

NAMES = ("ground_truth", "classifier")
_ERROR_SEED = 7933
_BLOCK = 256  # images classified at once


def check(cfg: ml_collections.ConfigDict) -> None:
    """Refuses a back-end that does not exist, or an impossible error rate. Raises UserError."""
    oracle = cfg.defense.oracle
    if oracle.name not in NAMES:
        raise unknown("defense.oracle.name", oracle.name, NAMES)
    if not 0 <= oracle.error < 1:
        raise UserError(f"defense.oracle.error={oracle.error} must lie in [0, 1): the share of "
                        "images that the oracle gets wrong")
    if oracle.steps < 1:
        raise UserError(f"defense.oracle.steps={oracle.steps} must be at least 1")


def make(cfg, clean, mesh, folder: epath.Path, key: jax.Array):
    """Gives ground(source, rows); a classifier is trained in `folder`, and resumes."""
    if cfg.defense.oracle.name == "ground_truth":
        return _ground_truth(cfg, len(clean.classes))
    return _classifier(cfg, clean, mesh, folder, key)


def _ground_truth(cfg, classes: int):
    error, seed = cfg.defense.oracle.error, cfg.seed

    def ground(source, rows):
        labels = np.asarray(source.table(rows)[0])
        # A row is wrong or right by its number, whoever asks and how often.
        draws = np.stack([np.random.default_rng([_ERROR_SEED, seed, len(source), int(row)]).random(
            2) for row in rows]) if len(rows) else np.zeros((0, 2))
        other = (labels + 1 + np.floor(draws[:, 1] * (classes - 1)).astype(int)) % classes
        wrong = draws[:, 0] < error
        said = np.where(wrong, other, labels)
        seen = (said[:, None] == np.arange(classes)) & (labels >= 0)[:, None]
        if hasattr(source, "beside"):  # a second object in the picture
            second = np.where(wrong, -1, source.beside(rows))
            seen |= second[:, None] == np.arange(classes)
        return np.float32(seen)

    return ground


def _classifier(cfg, clean, mesh, folder, key):
    labels = clean.table(np.arange(len(clean)))[0]
    own = ml_collections.ConfigDict(cfg.to_dict())
    own.text = ml_collections.ConfigDict({"name": "none"})
    own.train.update(batch_size=cfg.defense.batch_size, eval_every=0)
    own.data.text_augment = "none"
    steps, classes = cfg.defense.oracle.steps, len(clean.classes)
    modules = {"encoder": build.build(cfg.model), "classes": Projection(classes, use_bias=True)}
    apply_fns = parts.make_apply_fns(modules)
    tx, _ = optim.make(cfg.optim, steps, 1)
    run_folder.write_config(folder, own)
    side = cfg.data.image_size

    def init(key):
        weights, steps_key = jax.random.split(key)
        variables = parts.init_variables(modules, weights, (side, side, 3))
        return TrainState(step=jnp.zeros((), jnp.int32), params=variables["params"],
                          batch_stats=variables["batch_stats"],
                          opt_state=tx.init(variables["params"]), extra={}, key=steps_key)

    def step_fn(state, data, batch):
        view_key = jax.random.fold_in(state.key, state.step)
        x = augment.one_view(cfg.augment.view2, cfg.augment.interpolation, cfg.data.mean,
                             cfg.data.std, data, batch, view_key)

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

    state, shardings = born_sharded(init, key, mesh)
    rows = _Labelled(feed.make(own, PoisonedSet(clean)), labels)
    state = fit(step_fn, state, shardings, rows, folder=folder, steps=steps, cfg_train=own.train,
                mesh=mesh, label="train oracle")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    mean, std = np.float32(cfg.data.mean), np.float32(cfg.data.std)

    @jax.jit
    def probabilities(variables, x):
        z = (x.astype(jnp.float32) / 255 - mean) / std
        for name in modules:
            z, _ = apply_fns[name](variables, z, False)
        return jax.nn.softmax(z.astype(jnp.float32))

    def ground(source, rows):
        out = [np.zeros((0, classes), np.float32)]
        for start in range(0, len(rows), _BLOCK):
            part = rows[start:start + _BLOCK]
            x = np.zeros((_BLOCK, side, side, 3), np.uint8)
            for i, row in enumerate(part):
                x[i] = images.test_image(source[int(row)]["image"], side)
            out.append(np.asarray(probabilities(variables, x))[:len(part)])
        return np.concatenate(out)

    return ground


class _Labelled:
    """A feed whose data also hold the labels of the rows."""

    def __init__(self, inner, labels):
        self.data = {**inner.data, "labels": np.asarray(labels, np.int32)}
        self.batches = inner.batches
