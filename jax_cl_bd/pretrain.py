"""pretrain: trains the victim on the poisoned set and, if asked, its clean twin, the control."""

import jax
import ml_collections
from etils import epath

from jax_cl_bd import evaluate, multihost, optim, parallel, poison, run_folder
from jax_cl_bd.data import augment, feed, sources, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError, no_program
from jax_cl_bd.evals import during_training, test_sets
from jax_cl_bd.models import start
from jax_cl_bd.objectives import gradient_cache, training
from jax_cl_bd.train import born_sharded, fit


def total_steps(cfg: ml_collections.ConfigDict, rows: int) -> tuple[int, int]:
    """Gives (steps of the whole run, steps of one epoch); each epoch drops its last n mod B rows.

    Raises:
        UserError: there are fewer rows than one batch.
    """
    per_epoch = rows // cfg.train.batch_size
    if per_epoch == 0:
        raise UserError(f"train.batch_size={cfg.train.batch_size} is more than the {rows} rows "
                        "of the poisoned set")
    if cfg.train.steps < 1 and cfg.train.epochs < 1:
        raise UserError(f"train.steps={cfg.train.steps} and train.epochs={cfg.train.epochs} make "
                        "no step; set one of them")
    return cfg.train.steps or cfg.train.epochs * per_epoch, per_epoch


def check(cfg: ml_collections.ConfigDict, rows: int) -> None:
    """Finds what is wrong with the settings of this stage before anything is compiled.

    `rows`: those of the source.
    """
    if cfg.train.steps > 0 and cfg.train.epochs > 0 and not cfg.victim:  # which has been trained
        raise UserError(f"train.steps={cfg.train.steps} and train.epochs={cfg.train.epochs} both "
                        "say how long to train; for epochs add --config.train.steps=0, for steps "
                        "--config.train.epochs=0")
    training.check(cfg)
    if jax.process_count() > 1 and training.looks_at_all(cfg):
        raise UserError(f"objective {cfg.objective.name!r} looks at all data between steps, which "
                        f"one process must hold; this job has {jax.process_count()}")
    steps, per_epoch = total_steps(cfg, rows)
    sized = training.sized(cfg, rows=rows, steps_per_epoch=per_epoch)
    training.check_steps(sized, steps)
    optim.make(cfg.optim, steps, per_epoch)
    feed.check(cfg.data)
    mesh = parallel.make_mesh(cfg.mesh)
    parallel.check_batch(cfg.train.batch_size, mesh)
    parallel.check_batch(cfg.evals.batch_size, mesh, "evals.batch_size")
    if cfg.train.chunks != 1:
        gradient_cache.check(cfg, mesh.size, has_batch_norm=training.has_batch_norm(cfg))
    if cfg.model.bn_groups < 1 or cfg.train.batch_size % cfg.model.bn_groups:
        raise UserError(f"model.bn_groups={cfg.model.bn_groups} must divide "
                        f"train.batch_size={cfg.train.batch_size}")
    augment.check(cfg.augment.view1, cfg.augment.interpolation)
    augment.check(cfg.augment.view2, cfg.augment.interpolation)
    k = cfg.train.steps_per_dispatch
    for name in ("log_every", "save_every", "eval_every"):
        if k < 1 or cfg.train[name] % k:
            raise UserError(f"train.{name}={cfg.train[name]} must be a multiple of "
                            f"train.steps_per_dispatch={k} (at least 1)")
    training.rehearse(sized, steps, mesh)


def run(cfg: ml_collections.ConfigDict, folder: epath.Path) -> None:
    """Trains the victim in `folder` and, with cfg.control, its clean twin in `folder/control`.

    The twin is left out where cfg.control_from names another run's, and where nothing is poisoned:
    it would be the same encoder once more.
    """
    source = sources.load(cfg.data, "train")
    plan, rows = poison.load(folder)
    captions = texts.load(cfg, folder, source)
    sets = {"victim": (folder, PoisonedSet(source, plan, rows, captions))}
    steps, per_epoch = total_steps(cfg, len(sets["victim"][1].kept))
    if cfg.control and not cfg.control_from and len(plan):
        sets["control"] = (folder / "control", PoisonedSet(source, texts=captions))
    settings = run_folder.settings_of(cfg, run_folder.PRETRAIN_GROUPS)
    mesh = parallel.make_mesh(cfg.mesh)
    watch = clean = None
    tests = _watched(cfg, source, folder)
    if tests is not None:
        watch = during_training.make(cfg, tests, mesh, captions and captions.tokenizer)
    tx, _ = optim.make(cfg.optim, steps, per_epoch)
    weights = start.load(cfg)
    for label, (place, dataset) in sets.items():
        if multihost.of_writer(run_folder.is_done(place / "pretrain")):
            continue
        if multihost.is_writer():
            run_folder.write_config(place, cfg)
            run_folder.begin(place / "pretrain", settings)
        own = training.sized(cfg, rows=len(dataset.pair), steps_per_epoch=per_epoch)
        training.check_steps(own, steps)  # again: by now the length of an epoch is certain
        state, shardings = born_sharded(training.make_init(own, tx), training.first_key(cfg), mesh,
                                        weights)
        rows_feed = feed.make(cfg, dataset, clean=clean, process_index=jax.process_index(),
                              process_count=jax.process_count())
        clean = rows_feed.data.get("clean")
        fit(training.make_step(own, tx, steps), state, shardings, rows_feed, folder=place,
            steps=steps, cfg_train=cfg.train, mesh=mesh, label=f"pretrain {label}", evaluate=watch,
            refresh=training.make_refresh(own, rows_feed, mesh))
        if multihost.is_writer():
            run_folder.finish(place / "pretrain", settings, step=steps)


def _watched(cfg, source, folder):
    """What the attack is watched on while it grows: the run's own test set or, if that has no
    labels, the downstream one. None without either, or if train.eval_every is 0."""
    if not cfg.train.eval_every:
        return None
    trigger = poison.load_trigger(cfg, folder)
    if test_sets.has_labels(source):
        return test_sets.make(cfg, source, sources.load(cfg.data, "test"), trigger)
    return evaluate.test_data(cfg, trigger) if cfg.downstream else None


if __name__ == "__main__":
    no_program("jax_cl_bd --config=FILE --workdir=DIR --stages=pretrain")
