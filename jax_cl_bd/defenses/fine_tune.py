"""Fine-tuning an image-text model on clean pairs with its own pretraining loss, and nothing else.

The baseline that CleanCLIP is compared with ("CLIP loss only"; Bansal et al., ICCV 2023, arXiv
2303.03323, where it leaves most of a backdoor intact). Steps count from 0, where the released code
starts beyond its warm-up; batch norm trains as in pretraining, which by itself changes figures.
"""

import jax
import ml_collections
from etils import epath

from jax_cl_bd import optim, parallel, run_folder
from jax_cl_bd.data import feed, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.defenses import _sweep, retrain
from jax_cl_bd.defenses.outcome import Outcome
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import training
from jax_cl_bd.train import fit


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` pairs are there to train on."""
    if cfg.text.name == "none":
        raise UserError("defense fine_tune is for image-text models; text.name is 'none'")
    retrain.check(cfg, clean)
    optim.make(cfg.defense.optim, max(cfg.defense.steps, 1), 1)


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key) -> Outcome:
    """Goes on training `victims[0]` on the clean pairs `data.clean`; never uses `truth`."""
    del truth
    data = data.clean
    own = training.plain(cfg)
    own.train.update(batch_size=cfg.defense.batch_size, chunks=1)
    own.objective.in_modality = 0.0
    per_epoch = feed.steps_per_epoch(len(data), own.train.batch_size)
    steps = cfg.defense.steps or cfg.defense.epochs * per_epoch
    tx, _ = optim.make(cfg.defense.optim, steps, per_epoch)
    run_folder.write_config(folder, own)
    victim = victims[0].pair
    victim.tokenizer.save(folder / "tokenizer.json")
    state = _sweep.first_state(own, victim.variables, tx, key)
    shardings = parallel.state_shardings(mesh, jax.eval_shape(lambda: state))
    rows = feed.make(own, PoisonedSet(data, texts=texts.of(own, victim.tokenizer, data)),
                     process_index=jax.process_index(), process_count=jax.process_count())
    state = fit(training.make_step(own, tx, steps), jax.device_put(state, shardings), shardings,
                rows, folder=folder, steps=steps, cfg_train=own.train, mesh=mesh,
                label=f"fine-tune {'control' if folder.name == 'control' else 'victim'}")
    return Outcome({"clean_pairs": len(data), "steps": steps, "gradient_steps": steps},
                   {"params": state.params, "batch_stats": state.batch_stats}, {}, own)
