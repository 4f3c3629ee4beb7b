"""Which stages a run has, what each needs, and when it is complete."""

import errno
import textwrap

import jax
import ml_collections
from etils import epath

from jax_cl_bd import defend, evaluate, lookup, poison, pretrain, report, run_folder
from jax_cl_bd.data import sources, texts
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import start
from jax_cl_bd.reporting import table

GROUPS = {"poison": run_folder.POISON_GROUPS, "pretrain": run_folder.PRETRAIN_GROUPS,
          "evaluate": run_folder.EVALUATE_GROUPS, "defend": run_folder.DEFEND_GROUPS,
          "report": run_folder.DEFEND_GROUPS}
# Which stages read what a stage made; the latest first, as they are undone.
DEPENDENTS = {"poison": ("report", "defend", "evaluate", "pretrain"),
              "pretrain": ("report", "defend", "evaluate"), "evaluate": ("report",),
              "defend": ("report",), "report": ()}
# What each stage leaves in the run folder, besides the folder of its own name.
LEAVES = {"pretrain": ("checkpoints", "metrics.jsonl", "events", "control"),
          "evaluate": ("results.json",), "defend": ("defenses",)}
VICTIMS_OWN = ("seed", "data", "attack", "augment", "text", "model", "objective", "optim", "train",
               "init_from")


def with_victim(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """With --config.victim, takes what made that victim from its own config; else, with
    --config.init_from, what describes the model from those weights.

    What changes no result, such as data_dir or log_every, stays as it is given now.
    """
    if not cfg.victim:
        return start.with_weights(cfg)
    theirs = run_folder.read_config(epath.Path(cfg.victim))
    merged = ml_collections.ConfigDict(cfg.to_dict()
                                       | {group: theirs[group].to_dict()
                                          if hasattr(theirs[group], "to_dict") else theirs[group]
                                          for group in VICTIMS_OWN})
    for name in run_folder.NEVER_HASHED:
        group, _, key = name.partition(".")
        merged[group][key] = cfg[group][key] or merged[group][key]
    return merged.lock()


def check(cfg: ml_collections.ConfigDict, chosen: list[str]) -> None:
    """Finds what is wrong with the settings of the chosen stages, before anything is compiled.

    Raises:
        UserError: one line with the value seen and what is allowed.
    """
    if jax.process_count() > 1:
        raise UserError(f"this run has {jax.process_count()} processes; so far one process, with "
                        "any number of devices, is supported")
    if cfg.seed < 0:
        raise UserError(f"seed={cfg.seed} must not be negative")
    train, test = (sources.load(cfg.data, split) for split in ("train", "test"))
    texts.check(cfg, train)
    poison.check(cfg, sources.table(train), train.classes)
    if tuple(train.classes) != tuple(test.classes):
        raise UserError(f"the train split has {len(train.classes)} classes, the test split "
                        f"{len(test.classes)}; probes need the same in both")
    if "pretrain" in chosen:
        pretrain.check(cfg, len(train))
    if {"pretrain", "evaluate", "defend"} & set(chosen):  # all of them measure
        evaluate.check(cfg)
    if "defend" in chosen:
        defend.check(cfg, len(train))


def place_of(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> epath.Path:
    """The folder that holds a stage's settings.json and done.json."""
    return folder / "defenses" / cfg.defense.name if stage == "defend" else folder / stage


def is_done(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> bool:
    """Says whether a stage is complete; pretrain also needs the control if one is asked for."""
    if stage == "defend" and cfg.defense.name == "none":
        return True
    done = run_folder.is_done(place_of(cfg, folder, stage))
    if stage == "pretrain" and cfg.control and not cfg.control_from:
        done = done and run_folder.is_done(folder / "control" / "pretrain")
    return done


def drop(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> None:
    """Removes what a stage left, and what was made from it; of defenses only the config's own
    where the stage is defend. Its marks go first, so that a kill leaves nothing half complete."""
    undo(folder, stage)
    if stage == "defend":
        _remove(place_of(cfg, folder, stage))
        return
    for name in (*DEPENDENTS[stage], stage):
        if stage == "evaluate" and name == "evaluate":
            _remove(folder / name)  # results.json also holds the defenses' rows
            continue
        for leaf in (name, *LEAVES.get(name, ())):
            _remove(folder / leaf)


def undo(folder: epath.Path, stage: str) -> None:
    """Takes the marks of completion from all that depends on a stage."""
    for name in DEPENDENTS[stage]:
        places = folder.glob("defenses/*") if name == "defend" else [folder / name]
        for place in places:
            (place / "done.json").unlink(missing_ok=True)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    else:
        path.unlink(missing_ok=True)


def run(cfg: ml_collections.ConfigDict, folder: epath.Path, chosen: list[str]) -> None:
    """Runs what is not complete, in order; what depends on it is then made anew.

    Raises:
        UserError: the folder was begun with other settings, or a predecessor is not complete.
    """
    victim = epath.Path(cfg.victim) if cfg.victim else folder
    made_here = [stage for stage in ("poison", "pretrain") if not cfg.victim]
    settings = {stage: run_folder.settings_of(cfg, GROUPS[stage]) for stage in GROUPS}
    settings["poison"] = run_folder.settings_of(cfg, _poison_groups(cfg))
    for stage in GROUPS:  # what a stage reads must fit too, not only what it makes
        if stage in made_here or (stage in chosen and stage in ("evaluate", "defend")):
            run_folder.check_settings(place_of(cfg, folder, stage), settings[stage])
    run_folder.write_config(folder, cfg)
    for stage in GROUPS:
        if stage not in chosen or (stage in ("poison", "pretrain") and cfg.victim):
            continue
        if is_done(cfg, folder, stage):
            print(f"{stage}: complete", flush=True)
            continue
        _require(victim, stage)
        undo(folder, stage)
        place = place_of(cfg, folder, stage)
        if stage != "report":
            run_folder.begin(place, settings[stage])
        if stage in ("evaluate", "defend"):
            {"evaluate": evaluate, "defend": defend}[stage].run(cfg, folder, victim)
        else:
            {"poison": poison, "pretrain": pretrain, "report": report}[stage].run(cfg, folder)
        if stage != "pretrain":  # which marks victim and control by itself
            run_folder.finish(place, settings[stage])
    _print_results(folder)


def _poison_groups(cfg) -> tuple[str, ...]:
    """What poisons depend on: more, where the attack learns a trigger with a model of its own."""
    attack = lookup.load("attacks", cfg.attack.name, offers="plan")
    learns = not (cfg.attack.trigger_from or cfg.attack.get("surrogate", ""))
    return GROUPS["poison"] + (getattr(attack, "GROUPS", ()) if learns else ())


def _print_results(folder: epath.Path) -> None:
    """Ends a run with its table and the place of its report, as far as they exist."""
    results, page = folder / "results.json", folder / "report" / "index.html"
    if results.exists() and "victim" in (found := run_folder.read_json(results)):
        print(f"\n{table.text(found)}\n", flush=True)
    if page.exists():
        print(f"report: {page}", flush=True)


def _require(victim: epath.Path, stage: str) -> None:
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
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"the disk is full ({text}); free some space, then {way}"
    return text if "same command" in text else f"{text}; {way}"
