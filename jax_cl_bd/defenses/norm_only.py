"""Batch norm alone: what a fine-tuning repair does before it has moved a weight.

No paper's defense but a control of ours for all of them: fine-tuning on clean pairs also moves the
running statistics of batch norm, which by itself changes the attack success rate. Here
`defense.steps` batches of clean pairs pass through the suspect in train mode, without gradient, and
every parameter stays as it was. The statistics move as in training, 0.9 of the old and 0.1 of the
batch: after 50 batches 0.5 % of the suspect's own are left. Images are those of augment.view1, as
in fine-tuning by the CLIP loss alone; with in_modality fine-tuning mixes augmented images in.
"""

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from jax_cl_bd import lookup, parallel, run_folder
from jax_cl_bd.data import augment, feed, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import parts
from jax_cl_bd.objectives import training
from jax_cl_bd.train import TrainState, fit


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to pass through.

    Raises:
        UserError: a model of images alone or without batch norm, no step, or no whole batch.
    """
    d = cfg.defense
    if cfg.text.name == "none":
        raise UserError("defense norm_only is for image-text models; text.name is 'none'")
    if not jax.tree.leaves(encoders.abstract_parts(cfg)["batch_stats"]):
        raise UserError(f"defense norm_only re-estimates batch norm, and model.name="
                        f"{cfg.model.name!r} has none")
    parallel.check_batch(d.batch_size, parallel.make_mesh(cfg.mesh), "defense.batch_size")
    if d.steps < 1:
        raise UserError(f"defense.steps={d.steps} must be at least 1")
    if clean < d.batch_size:
        raise UserError(f"{clean} clean pairs are fewer than one batch of defense.batch_size="
                        f"{d.batch_size}")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Passes the clean pairs `data.clean` through `victims[0]`; never uses `truth`.

    Returns:
        The verdict {"clean_pairs", "steps"} with the model.
    """
    del truth
    clean, suspect = data.clean, victims[0].pair
    own = training.plain(cfg)
    own.train.update(batch_size=cfg.defense.batch_size, chunks=1, eval_every=0)
    own.objective.in_modality = 0.0
    run_folder.write_config(folder, own)
    suspect.tokenizer.save(folder / "tokenizer.json")
    objective = lookup.load("objectives", own.objective.name, offers="loss")
    apply_fns = parts.make_apply_fns(training.modules_of(own))

    def step_fn(state, data, batch):
        view_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        views = augment.views(own, data, batch, view_key)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        loss, (stats, _, metrics) = objective.loss(own, variables, state.extra, views, apply_fns,
                                                   loss_key, state.step)
        return state.replace(step=state.step + 1, batch_stats=stats), {"loss": loss, **metrics}

    copied = jax.tree.map(jnp.copy, suspect.variables)  # the step donates them
    state = TrainState(step=jnp.zeros((), jnp.int32), params=copied["params"],
                       batch_stats=copied["batch_stats"], opt_state={},
                       extra=objective.init_extra(own, copied, key), key=jnp.copy(key))
    shardings = parallel.state_shardings(mesh, jax.eval_shape(lambda: state))
    rows = feed.make(own, PoisonedSet(clean, texts=texts.of(own, suspect.tokenizer, clean)))
    label = whose(folder)
    state = fit(step_fn, jax.device_put(state, shardings), shardings, rows, folder=folder,
                steps=cfg.defense.steps, cfg_train=own.train, mesh=mesh, label=f"norm of {label}")
    return Outcome({"clean_pairs": len(clean), "steps": cfg.defense.steps, "gradient_steps": 0},
                   {"params": state.params, "batch_stats": state.batch_stats}, {}, own)
