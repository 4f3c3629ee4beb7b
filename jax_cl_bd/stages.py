"""Which stages a run has, what each needs, and when it is complete."""

import errno
import textwrap

import ml_collections
from etils import epath

from jax_cl_bd import defend, evaluate, poison, pretrain, report, run_folder
from jax_cl_bd.data import sources
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import table

GROUPS = {"poison": run_folder.POISON_GROUPS, "pretrain": run_folder.PRETRAIN_GROUPS,
          "evaluate": run_folder.EVALUATE_GROUPS, "defend": run_folder.DEFEND_GROUPS,
          "report": run_folder.DEFEND_GROUPS}
# What each stage leaves in the run folder; redoing it drops this and all that follows.
LEAVES = {"poison": ("poison",),
          "pretrain": ("pretrain", "checkpoints", "metrics.jsonl", "events", "control"),
          "evaluate": ("evaluate", "results.json"), "defend": ("defenses",),
          "report": ("report",)}
VICTIMS_OWN = ("seed", "data", "attack", "augment", "model", "objective", "optim", "train")


def with_victim(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """With --config.victim, takes what made that victim from its own config."""
    if not cfg.victim:
        return cfg
    theirs = run_folder.read_config(epath.Path(cfg.victim))
    tree = cfg.to_dict() | {group: theirs[group] for group in VICTIMS_OWN}
    tree["data"]["data_dir"] = cfg.data.data_dir or theirs.data.data_dir
    return ml_collections.ConfigDict(tree).lock()


def check(cfg: ml_collections.ConfigDict, chosen: list[str]) -> None:
    """Finds what is wrong with the settings of the chosen stages, before anything is compiled.

    Raises:
        UserError: one line with the value seen and what is allowed.
    """
    if cfg.seed < 0:
        raise UserError(f"seed={cfg.seed} must not be negative")
    train, test = (sources.load(cfg.data, split) for split in ("train", "test"))
    poison.check(cfg, sources.table(train), train.classes)
    if tuple(train.classes) != tuple(test.classes):
        raise UserError(f"the train split has {len(train.classes)} classes, the test split "
                        f"{len(test.classes)}; probes need the same in both")
    for stage, verb in (("pretrain", pretrain), ("evaluate", evaluate), ("defend", defend)):
        if stage in chosen:
            verb.check(cfg)


def place_of(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> epath.Path:
    """The folder that holds a stage's settings.json and done.json."""
    return folder / "defenses" / cfg.defense.name if stage == "defend" else folder / stage


def is_done(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> bool:
    """Says whether a stage is complete; pretrain also needs the control if one is asked for."""
    if stage == "defend" and cfg.defense.name == "none":
        return True
    done = run_folder.is_done(place_of(cfg, folder, stage))
    if stage == "pretrain" and cfg.control:
        done = done and run_folder.is_done(folder / "control" / "pretrain")
    return done


def drop(folder: epath.Path, stage: str) -> None:
    """Removes what a stage and those after it left."""
    names = list(LEAVES)
    for later in names[names.index(stage):]:
        for leaf in LEAVES[later]:
            path = folder / leaf
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink(missing_ok=True)


def run(cfg: ml_collections.ConfigDict, folder: epath.Path, chosen: list[str]) -> None:
    """Runs what is not complete; the report is made anew when anything before it was."""
    victim = epath.Path(cfg.victim) if cfg.victim else folder
    if cfg.victim:
        chosen = [stage for stage in chosen if stage not in ("poison", "pretrain")]
    settings = {stage: run_folder.settings_of(cfg, GROUPS[stage]) for stage in chosen}
    for stage in chosen:
        if stage != "report":
            run_folder.check_settings(place_of(cfg, folder, stage), settings[stage])
    run_folder.write_config(folder, cfg)
    fresh = False
    for stage in chosen:
        if is_done(cfg, folder, stage) and not (stage == "report" and fresh):
            print(f"{stage}: complete", flush=True)
            continue
        fresh = True
        _require(cfg, victim, stage)
        place = place_of(cfg, folder, stage)
        if stage != "report":
            run_folder.begin(place, settings[stage])
        if stage == "evaluate" or stage == "defend":
            {"evaluate": evaluate, "defend": defend}[stage].run(cfg, folder, victim)
        else:
            {"poison": poison, "pretrain": pretrain, "report": report}[stage].run(cfg, folder)
        if stage != "pretrain":  # which marks victim and control by itself
            run_folder.finish(place, settings[stage])
    _print_results(folder)


def _print_results(folder: epath.Path) -> None:
    """Ends a run with its table and the place of its report, as far as they exist."""
    results, page = folder / "results.json", folder / "report" / "index.html"
    if results.exists() and "victim" in (found := run_folder.read_json(results)):
        print(f"\n{table.text(found)}\n", flush=True)
    if page.exists():
        print(f"report: {page}", flush=True)


def _require(cfg, victim: epath.Path, stage: str) -> None:
    """Refuses a stage whose predecessor is not complete."""
    needs = {"pretrain": "poison", "evaluate": "pretrain", "defend": "pretrain"}
    before = needs.get(stage)
    if before and not run_folder.is_done(victim / before):
        raise UserError(f"{stage} needs the {before} stage of {victim}, which is not complete; "
                        f"run it first (add {before} to --stages)")


def explain(error: Exception) -> str:
    """One line for what broke while running, with the way on."""
    way = "the same command goes on from the last checkpoint"
    text = textwrap.shorten(str(error), 400)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return f"the disk is full ({text}); free some space, then {way}"
    return text if "same command" in text else f"{text}; {way}"
