"""Retraining from scratch: what a defender gets who throws the suspect encoder away.

The victim's own objective and recipe on the defender's clean images alone. A defense that uses the
suspect (such as distillation) is worth its risk only if it beats this. An objective that is itself
a defense (RoCLIP, SafeCLIP) gives way to the one that it defends: these images are clean.
"""

import jax
import ml_collections
from etils import epath

from jax_cl_bd import optim, parallel, run_folder
from jax_cl_bd.data import feed, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import training
from jax_cl_bd.train import born_sharded, fit

USES_VICTIM = False  # so it is run once, and not again for the control


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images are there to train on."""
    training.check(cfg)  # of a victim from elsewhere nobody has asked yet
    d = cfg.defense
    parallel.check_batch(d.batch_size, parallel.make_mesh(cfg.mesh), "defense.batch_size")
    if clean < d.batch_size:
        raise UserError(f"{clean} clean images are fewer than one batch of defense.batch_size="
                        f"{d.batch_size}")
    if d.steps < 1 and d.epochs < 1:
        raise UserError(f"defense.steps={d.steps} and defense.epochs={d.epochs} make no step; "
                        "set one of them")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key) -> Outcome:
    """Trains cfg.objective on the clean images `data.clean`; `truth` and the victim's weights are
    not looked at (of an image-text model its tokenizer is used)."""
    del truth
    data = data.clean
    pair = victims[0].pair
    own = training.plain(cfg)
    own.train.update(batch_size=cfg.defense.batch_size, chunks=1)
    clean = PoisonedSet(data, texts=pair and texts.of(own, pair.tokenizer, data))
    per_epoch = feed.steps_per_epoch(len(data), own.train.batch_size)
    steps = cfg.defense.steps or cfg.defense.epochs * per_epoch
    tx, _ = optim.make(own.optim, steps, per_epoch)
    run_folder.write_config(folder, own)
    if pair:
        pair.tokenizer.save(folder / "tokenizer.json")
    state, shardings = born_sharded(training.make_init(own, tx), key, mesh)
    rows = feed.make(own, clean, process_index=jax.process_index(),
                     process_count=jax.process_count())
    state = fit(training.make_step(own, tx, steps), state, shardings, rows, folder=folder,
                steps=steps, cfg_train=own.train, mesh=mesh, label="retrain")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    verdict = {"clean_images": len(data), "steps": steps, "gradient_steps": steps}
    return Outcome(verdict, variables, {}, own)
