"""Which stages a run has, what each needs, and when it is complete."""

import errno
import sys
import textwrap

import ml_collections
from etils import epath

from jax_cl_bd import (
    checkpoint,
    defend,
    evaluate,
    lookup,
    multihost,
    poison,
    pretrain,
    report,
    run_folder,
)
from jax_cl_bd.data import sources
from jax_cl_bd.data.images import CorruptRow
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import start
from jax_cl_bd.reporting import table, vetting
from jax_cl_bd.train import NonFinite

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
GOES_ON = "the same command goes on where it stopped"
# Errors after which the same command would fail again; what to do is in their message.
SAYS_ITSELF = (CorruptRow, NonFinite, FloatingPointError)
VICTIMS_OWN = ("seed", "data", "attack", "augment", "text", "model", "objective", "optim", "train",
               "init_from")


def with_victim(cfg: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """With --config.victim, takes what made that victim from its own config; else, with
    --config.init_from, what describes the model from those weights.

    What changes no result, such as workers or log_every, stays as it is given now; so does
    data_dir, unless it is empty. Of a victim that is weights alone (a hub folder, a control, a
    defense's folder) the model is taken and nothing else, and so it is where a vetting names data
    of its own.
    """
    if not cfg.victim:
        return start.with_weights(cfg)
    vets = defend.vets(cfg)
    if run_folder.from_elsewhere(cfg) or (vets and cfg.data.name):
        return start.of_victim(cfg, needs_text=not vets)
    theirs = run_folder.read_config(epath.Path(cfg.victim))
    merged = ml_collections.ConfigDict(cfg.to_dict()
                                       | {group: theirs[group].to_dict()
                                          if hasattr(theirs[group], "to_dict") else theirs[group]
                                          for group in VICTIMS_OWN})
    for name in run_folder.NEVER_HASHED:
        group, _, key = name.partition(".")
        if cfg[group][key] or name != "data.data_dir":
            merged[group][key] = cfg[group][key]
    if vets:
        merged.defense.pool = ""  # the rows that this run was trained on, as it has them
    return merged.lock()


def place_of(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> epath.Path:
    """The folder that holds a stage's settings.json and done.json."""
    return folder / "defenses" / cfg.defense.name if stage == "defend" else folder / stage


def is_done(cfg: ml_collections.ConfigDict, folder: epath.Path, stage: str) -> bool:
    """Says whether a stage is complete; pretrain also needs the control if one is asked for and
    anything is poisoned."""
    if stage == "defend" and cfg.defense.name == "none":
        return True
    if stage == "evaluate" and not cfg.evals.probes:  # as a vetting has it
        return True
    done = run_folder.is_done(place_of(cfg, folder, stage))
    if (stage == "pretrain" and cfg.control and not cfg.control_from
            and not run_folder.is_clean(folder)):
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


def run(cfg: ml_collections.ConfigDict, folder: epath.Path, chosen: list[str],
        force: str | None = None) -> None:
    """Runs what is not complete, in order; what depends on it is then made anew.

    `force`: one of the chosen stages, dropped first, once nothing speaks against the run. Of
    several processes, in pretrain, each calls it, and process 0 writes (multihost.py).

    Raises:
        UserError: the folder was begun with other settings or other data, or a predecessor is not
            complete.
    """
    victim = epath.Path(cfg.victim) if cfg.victim else folder
    redone = (force, *DEPENDENTS[force]) if force else ()
    settings = {stage: run_folder.settings_of(cfg, GROUPS[stage]) for stage in GROUPS}
    settings["poison"] = run_folder.settings_of(cfg, _poison_groups(cfg))
    for stage in {"evaluate", "defend"} & set(chosen):
        settings[stage] |= _of_elsewhere(cfg, victim)
    _check_settings(cfg, folder, chosen, redone, settings)
    writes = multihost.is_writer()
    if not cfg.victim and writes:
        _unmark_damaged(cfg, folder, {"pretrain"} & set(chosen)
                        | _to_do(cfg, folder, chosen, redone))
    _check_order(cfg, folder, victim, chosen, redone)
    if writes:
        if force in chosen:  # else a later process of the job drops it
            drop(cfg, folder, force)
        run_folder.write_config(folder, cfg)
    for stage in GROUPS:
        if stage not in chosen or (stage in ("poison", "pretrain") and cfg.victim):
            continue
        if stage == "evaluate" and not cfg.evals.probes:
            continue
        if multihost.of_writer(is_done(cfg, folder, stage)):
            if writes:
                print(f"{stage}: complete", flush=True)
            continue
        if writes:
            undo(folder, stage)
        if stage == "evaluate":
            _forget_other_measurements(folder, settings["evaluate"])
        place = place_of(cfg, folder, stage)
        if stage != "report" and writes:
            run_folder.begin(place, settings[stage])
        if stage in ("evaluate", "defend"):
            {"evaluate": evaluate, "defend": defend}[stage].run(cfg, folder, victim)
        else:
            {"poison": poison, "pretrain": pretrain, "report": report}[stage].run(cfg, folder)
        if stage != "pretrain":  # which marks victim and control by itself
            run_folder.finish(place, settings[stage])
    if writes:
        _print_results(folder)


def suspicious(cfg: ml_collections.ConfigDict, folder: epath.Path) -> bool:
    """Says whether the config's defense is a vetting that is complete and found something."""
    place = place_of(cfg, folder, "defend")
    if not defend.vets(cfg) or not run_folder.is_done(place):
        return False
    return bool(run_folder.read_json(place / "results.json")["verdict"]["suspicious"])


def _of_elsewhere(cfg, victim: epath.Path) -> dict[str, str]:
    """Fingerprints of what the config does not describe: another's weights, and data to be
    vetted."""
    found, vets = {}, defend.vets(cfg)
    if run_folder.from_elsewhere(cfg) or (vets and cfg.victim):
        found["victim"] = start.fingerprint(start.open_victim(cfg, victim))
    if vets:
        source = sources.load(cfg.data, "train")
        found["rows"] = poison.fingerprint(source, sources.table(source))["sha256"]
    return found


def _to_do(cfg, folder, chosen, redone) -> set[str]:
    """The chosen stages that are not complete, or will not be once what is redone is dropped."""
    return {stage for stage in chosen if stage in redone or not is_done(cfg, folder, stage)}


def _check_settings(cfg, folder, chosen, redone, settings) -> None:
    """Refuses a folder whose stages, those to be redone left out, were made with other settings:
    all that are complete, and those that are chosen."""
    measured_anew = "evaluate" in _to_do(cfg, folder, chosen, redone)
    for stage in ("poison", "pretrain", "evaluate", "defend"):
        of_victim = stage in ("poison", "pretrain")
        if stage in redone or (of_victim and cfg.victim):
            continue
        place = place_of(cfg, folder, stage)
        if of_victim or stage in chosen or run_folder.is_done(place):
            remeasured = stage == "defend" and measured_anew
            run_folder.check_settings(place, settings[stage],
                                      but=run_folder.MEASURE_GROUPS if remeasured else ())


def _check_order(cfg, folder, victim, chosen, redone) -> None:
    """Refuses a stage whose predecessor is neither complete nor to be run, or whose data are not
    those that were poisoned."""
    needs = {"pretrain": "poison", "evaluate": "pretrain", "defend": "pretrain"}
    data_checked = "poison" in redone
    for stage in GROUPS:
        if (stage not in needs or (stage == "pretrain" and cfg.victim)
                or stage not in _to_do(cfg, folder, chosen, redone)):
            continue
        before = needs[stage]
        complete = run_folder.is_done(victim / before) if cfg.victim else is_done(
            cfg, folder, before) and before not in redone
        if run_folder.from_elsewhere(cfg):
            complete = True
        if not complete and (cfg.victim or before not in chosen):
            raise UserError(f"{stage} needs the {before} stage of {victim}, which is not complete; "
                            f"run it first (add {before} to --stages)")
        if cfg.victim and not defend.knows_plan(cfg, victim):
            continue  # the data are others
        if not data_checked and run_folder.is_done(victim / "poison"):
            poison.check_data(cfg, victim)
            data_checked = True


def _unmark_damaged(cfg, folder, stages: set[str]) -> None:
    """Takes the mark from a training whose last checkpoint is not what was saved, where one of
    `stages` reads it: it then goes on from the one before, to the same weights."""
    if not stages & {"pretrain", "evaluate", "defend"}:
        return
    for place in (folder, folder / "control") if cfg.control else (folder,):
        step = run_folder.last_step(place)
        wrong = step is not None and checkpoint.fault(place / "checkpoints", step)
        if wrong:
            print(f"{place}: the last checkpoint, of step {step}, is damaged ({wrong}); its "
                  "training is no longer complete", file=sys.stderr)
            (place / "pretrain" / "done.json").unlink()


def _forget_other_measurements(folder: epath.Path, settings: dict) -> None:
    """Unmarks the defenses that were measured otherwise than is asked for now, and leaves in
    results.json the others alone. Their checkpoints stay, so that they are only measured anew."""
    measure = run_folder.of_groups(settings, run_folder.MEASURE_GROUPS)
    for mark in folder.glob("defenses/*/settings.json"):
        place, old = mark.parent, run_folder.read_json(mark)
        before = run_folder.of_groups(old, run_folder.MEASURE_GROUPS)
        if not run_folder.difference(before, measure):
            continue
        (place / "done.json").unlink(missing_ok=True)
        if before.get("control_from", "") != measure["control_from"]:
            _remove(place / "control")  # another encoder's
        run_folder.write_json(mark, {k: v for k, v in old.items() if k not in before} | measure)
    if (folder / "results.json").exists():
        run_folder.write_json(folder / "results.json",
                              {"defenses": run_folder.kept_defenses(folder)})


def _poison_groups(cfg) -> tuple[str, ...]:
    """What poisons depend on: more, where the attack learns a trigger with a model of its own."""
    attack = lookup.load("attacks", cfg.attack.name, offers="plan")
    learns = not (cfg.attack.trigger_from or cfg.attack.get("surrogate", ""))
    return GROUPS["poison"] + (getattr(attack, "GROUPS", ()) if learns else ())


def _print_results(folder: epath.Path) -> None:
    """Ends a run with its table and the place of its report, as far as they exist."""
    results, page = folder / "results.json", folder / "report" / "index.html"
    found = run_folder.read_json(results) if results.exists() else {}
    if "victim" in found:
        print(f"\n{table.text(found)}\n", flush=True)
    for name, row in found.get("defenses", {}).items():
        if vetting.of(row):
            print(f"\n{vetting.text(name, row)}\n", flush=True)
    if page.exists():
        print(f"report: {page}", flush=True)


def explain(error: Exception) -> str:
    """One line for what broke while running, with the way on."""
    text = textwrap.shorten(str(error), 400)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"the disk is full ({text}); free some space, then {GOES_ON}"
    if isinstance(error, SAYS_ITSELF):
        return text
    return f"{text}; what is finished is kept: once that is mended, {GOES_ON}"
