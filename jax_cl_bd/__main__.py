"""python -m jax_cl_bd --config=FILE[:arguments] --workdir=DIR [--config.key=value ...]

Poisons a training set, pretrains an encoder on it and a clean one beside it, measures both, runs a
defense, and reports: the stages of one run folder, DIR. What is complete is skipped, so the same
command goes on where it stopped. FILE is an experiment file such as configs/quickstart.py; with
--config=FILE --help also prints what it does and which arguments it takes after the colon, and
--config.key=value changes any one of its settings.
"""

import contextlib
import signal
import sys
from collections.abc import Callable

from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from jax_cl_bd import command_line, host_memory, multihost, run_folder, settings
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.run_folder import STAGES

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True,
                                         help_string="An experiment file, FILE.py[:arg,key=value].")
WORKDIR = flags.DEFINE_string("workdir", None, "The run folder, local or gs://.")
ONLY = flags.DEFINE_list("stages", list(STAGES), f"Some of {','.join(STAGES)}.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, in a job of "
                                  "several processes that no cluster tells of itself.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes such a job has (1: alone, "
                                 "whatever a cluster says).")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
JOINED = flags.DEFINE_bool("joined", False, "Set by a job's process where it joins the others.")
CHECK_ONLY = flags.DEFINE_bool("check_only", False, "Check the settings of the stages, and end.")
FORCE = flags.DEFINE_enum("force", None, STAGES, "Redo this stage, and drop what depends on it.")


def parse_flags(argv: list[str], doc: str) -> None:
    """Reads flags and the config; with --help it prints `doc` and more, and ends.

    Raises:
        UserError: for all that is wrong with them.
    """
    for word in command_line.parse(flags.FLAGS, argv, doc):
        meant = (f"did you mean --stages={word}?" if word in STAGES else
                 "what a run does is said by flags, see --help")
        raise UserError(f"unexpected argument {word!r}; {meant}")
    for name, flag in (("config", CONFIG), ("workdir", WORKDIR)):
        if flag.value is None:
            raise UserError(f"--{name} is missing; for example: python -m jax_cl_bd "
                            "--config=configs/quickstart.py --workdir=runs/quickstart")
    for stage in ONLY.value:
        if stage not in STAGES:
            raise unknown("stage", stage, STAGES)
    if FORCE.value and FORCE.value not in ONLY.value and not (JOINED.value or PROCESSES.value):
        raise UserError(f"--force={FORCE.value} needs {FORCE.value} among --stages")


def _shared(words: list[str]) -> list[str]:
    """The flags that all processes of a job and all its stages have."""
    own = ("stages", "force", "coordinator", "processes", "process_id")
    kept, words = [], list(words)
    while words:
        word = words.pop(0)
        name, given, _ = word.lstrip("-").partition("=")
        if name not in own:
            kept.append(word)
        elif not given:
            words.pop(0)  # its value
    return kept


def main(argv: list[str]) -> int:
    """Checks everything, then runs the stages that are not complete, in their order.

    Returns:
        The exit status: 1 where a vetting found something, else 0.
    """
    parse_flags(argv, __doc__)
    job = multihost.find(COORDINATOR.value, PROCESSES.value, PROCESS_ID.value)
    if job and not JOINED.value:
        chosen = [s for s in STAGES if s in ONLY.value]
        return multihost.supervise(job, _shared(argv[1:]), chosen, FORCE.value,
                                   epath.Path(WORKDIR.value),
                                   has_victim=bool(CONFIG.value.victim))
    host_memory.keep_pages()
    logging.set_verbosity(logging.FATAL)  # orbax logs tracebacks of what is raised here as well
    if job:
        multihost.join(job)
    from jax_cl_bd import checks, stages  # import jax, so only once the flags are known to be good

    folder = epath.Path(WORKDIR.value)
    chosen = [s for s in STAGES if s in ONLY.value]
    with settings.asked_of(CONFIG.value):
        cfg = stages.with_victim(CONFIG.value)
        checks.check(cfg, chosen)
        if CHECK_ONLY.value:
            return 0
        if job:
            checks.check_alike(cfg)
        with run_folder.locked(folder) if multihost.is_writer() else contextlib.nullcontext():
            stages.run(cfg, folder, chosen, FORCE.value)
            return int(stages.suspicious(cfg, folder))


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived; while an encoder is trained, train.fit sees to it."""


def _terminate(number, frame):
    raise _Terminated


def run_main(run: Callable[[list[str]], int | None], argv: list[str]) -> None:
    """Ends the process with the exit status of a program, one line for what went wrong."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(run(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError, FloatingPointError, ImportError) as error:
        from jax_cl_bd.stages import explain

        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, _Terminated)
        print(f"stopped{' by SIGTERM' if terminated else ''}; the same command goes on where it "
              "stopped", file=sys.stderr)
        sys.exit(143 if terminated else 130)


if __name__ == "__main__":
    run_main(main, sys.argv)
