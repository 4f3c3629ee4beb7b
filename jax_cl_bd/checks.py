"""What is looked at before anything is compiled: settings, data, and whether a job's processes
have the same."""

import operator

import ml_collections

from jax_cl_bd import defend, evaluate, multihost, poison, pretrain, run_folder
from jax_cl_bd.data import sources, texts
from jax_cl_bd.errors import UserError
from jax_cl_bd.settings import asked_of

POSITIVE = ("data.image_size", "train.batch_size", "train.chunks", "evals.batch_size")
NOT_NEGATIVE = ("seed", "data.workers", "train.steps", "train.epochs", "train.log_every",
                "train.save_every", "train.eval_every")


def check(cfg: ml_collections.ConfigDict, chosen: list[str]) -> None:
    """Finds what is wrong with the settings of the chosen stages, before anything is compiled.

    Raises:
        UserError: one line with the value seen and what is allowed.
    """
    with asked_of(cfg):
        _check_numbers(cfg)
        if not set(chosen) <= {"report"}:  # which reads no data
            _check(cfg, chosen)


def _check_numbers(cfg):
    for names, least in ((POSITIVE, 1), (NOT_NEGATIVE, 0)):
        for name in names:
            if (value := operator.attrgetter(name)(cfg)) < least:
                raise UserError(f"{name}={value} must be at least {least}")


def _check(cfg, chosen):
    if not cfg.data.name:
        raise UserError("data.name is empty: name the data, such as --config.data.name=folder:PATH"
                        ", or a finished run whose own rows are meant: --config.victim=RUN")
    train = sources.load(cfg.data, "train")
    if run_folder.from_elsewhere(cfg):
        chosen = [s for s in chosen if s not in ("poison", "pretrain")]
    if {"poison", "pretrain"} & set(chosen):
        texts.check(cfg, train)
    if "poison" in chosen:
        poison.check(cfg, sources.table(train), train.classes)
    if "pretrain" in chosen:
        pretrain.check(cfg, len(train))
    measured = cfg.evals.probes or not defend.vets(cfg)
    if measured and {"pretrain", "evaluate", "defend"} & set(chosen):  # all of them measure
        test = sources.load(cfg.data, "test")
        if tuple(train.classes) != tuple(test.classes):
            raise UserError(f"the train split has {len(train.classes)} classes, the test split "
                            f"{len(test.classes)}; probes need the same in both")
        evaluate.check(cfg)
    if "defend" in chosen:
        defend.check(cfg, train)


def check_alike(cfg: ml_collections.ConfigDict) -> None:
    """Refuses a job whose processes have other settings, or see other data, than process 0.

    Raises:
        UserError: naming what differs, and where.
    """
    source, settings = sources.load(cfg.data, "train"), cfg.to_dict()
    for name in ("data_dir", "workers"):  # may differ from host to host
        del settings["data"][name]
    multihost.check_alike({"settings": settings,
                           "data": poison.fingerprint(source, sources.table(source))})
