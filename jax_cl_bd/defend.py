"""defend: runs one defense on the victim and on the control, and measures what comes out."""

import copy
import time

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import evaluate, lookup, parallel, poison, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import front, incoming
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError, no_program, unknown
from jax_cl_bd.evals import attack_metrics
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.models import start

POOLS = ("", "data")  # defense.pool
STREAM = 3  # of cfg.seed


def clean_rows(plan, rows: int, fraction: float, seed: int) -> np.ndarray:
    """Draws the defender's clean images, int64 rows of the source.

    They are disjoint from all that the attack touched: references, shadows, replaced and removed
    rows. `fraction` is of the whole source; UserError if fewer are left.
    """
    touched = np.concatenate([plan.reference, plan.shadow, plan.replaces, plan.removed])
    free = np.setdiff1d(np.arange(rows), touched)
    count = round(fraction * rows)
    if count > len(free):
        raise UserError(f"defense.clean_fraction={fraction} of {rows} images is {count}, but the "
                        f"attack left only {len(free)} untouched; give at most "
                        f"{np.floor(1000 * len(free) / rows) / 1000:g}")
    return np.sort(np.random.default_rng([seed, STREAM]).permutation(free)[:count])


def validation(cfg: ml_collections.ConfigDict):
    """Images that neither training nor tests know, for a defense that chooses by them (its
    `validation_split` names a split of the data); else None.

    Raises:
        UserError: that split does not exist, or has rows that are trained or tested on.
    """
    split = cfg.defense.get("validation_split", "")
    if not split:
        return None
    if split in (cfg.data.train_split, cfg.data.test_split):
        raise UserError(f"defense.validation_split={split!r} is also trained or tested on; name "
                        "another split of the data, or a slice of one")
    held_out = sources.load({**cfg.data.to_dict(), "test_split": split}, "test")
    for kind in ("train", "test"):
        if count := sources.shared(held_out, sources.load(cfg.data, kind)):
            raise UserError(f"defense.validation_split={split!r} has {count} rows in common with "
                            f"data.{kind}_split={cfg.data[f'{kind}_split']!r}; name a slice of its "
                            "own")
    return held_out


def vets(cfg: ml_collections.ConfigDict) -> bool:
    """Says whether the defense judges an encoder or data of which nothing is known: no benchmark,
    so no control, no probes, no truth; the exit status is its verdict (its VETS = True)."""
    if cfg.defense.name == "none":
        return False
    return getattr(lookup.load("defenses", cfg.defense.name, offers="run"), "VETS", False)


def knows_plan(cfg: ml_collections.ConfigDict, victim: epath.Path) -> bool:
    """Says whether the plan in the victim's folder is about the data of this config. It is not
    where there is none, nor where what is vetted is other data (defense.pool)."""
    if run_folder.weights_alone(victim):
        return False
    return not vets(cfg) or cfg.defense.get("pool", "data") == ""


def check(cfg: ml_collections.ConfigDict, source) -> None:
    """Finds what is wrong with the settings of this stage before anything is compiled.

    `source`: the clean training set. That the attack leaves enough of it is seen in `clean_rows`.
    """
    if cfg.defense.name == "none":
        return
    defense = lookup.load("defenses", cfg.defense.name, offers="run")
    if vets(cfg):
        defense.check(cfg, len(source))
        return
    if cfg.victim:
        _check_victim(cfg, defense, source)
    if not 0 < cfg.defense.clean_fraction <= 1:
        raise UserError(f"defense.clean_fraction={cfg.defense.clean_fraction} must lie in (0, 1]")
    labelled = (sources.labels(source) >= 0).any()
    if getattr(defense, "NEEDS_LABELS", False) and not labelled:
        raise UserError(f"defense {cfg.defense.name} needs labelled images, and data set "
                        f"{cfg.data.name!r} has none")
    validation(cfg)
    defense.check(cfg, round(cfg.defense.clean_fraction * len(source)))


def _check_victim(cfg, defense, source):
    """Refuses a defense that needs what nobody has of a victim from elsewhere."""
    pool, alone = cfg.defense.get("pool", ""), run_folder.from_elsewhere(cfg)
    if pool not in POOLS:
        raise unknown("defense.pool", pool, POOLS)
    if pool and not alone:
        raise UserError(f"defense.pool={pool!r} is for a victim from elsewhere; {cfg.victim} is a "
                        "run folder, which knows what it was trained on")
    if alone and not pool and getattr(defense, "NEEDS_POOL", False):
        raise UserError(f"defense {cfg.defense.name} needs the rows that the suspect was trained "
                        f"on, and {cfg.victim} does not say which; if they are the train split of "
                        f"{cfg.data.name!r}, say so: --config.defense.pool=data")
    if alone and not getattr(defense, "VERDICT_ONLY", False):
        texts.check(cfg, source)  # what is trained on the data


def run(cfg: ml_collections.ConfigDict, folder: epath.Path, victim: epath.Path) -> None:
    """Defends the victim of one run folder; results go to defenses/<name> of `folder`.

    The control is defended alike, as what the defense does without a backdoor; not so with
    cfg.control = False, nor by a defense that never looks at the victim (USES_VICTIM = False): the
    rival is then the control as it is. It is not defended twice where the victim is its own
    control. A victim from elsewhere has neither plan nor control, and there is no truth to score
    by. Of each, `seconds` are what the defense itself took, without what the benchmark measures
    afterwards; None where it goes on with what an earlier process left.
    """
    defense = lookup.load("defenses", cfg.defense.name, offers="run")
    mesh = parallel.make_mesh(cfg.mesh)
    vetting, known = vets(cfg), knows_plan(cfg, victim)
    plan, rows = poison.load(victim) if known else (Plan.empty(), None)
    source = clean = sources.load(cfg.data, "train")
    if not vetting:
        clean = sources.Subset(source, clean_rows(plan, len(source), cfg.defense.clean_fraction,
                                                  cfg.seed))
    pools = {"victim": None, "control": Pool(source)}  # what each has seen
    if known or vetting or cfg.defense.get("pool", "") == "data":
        pools["victim"] = Pool(source, plan, rows)
    held_out = validation(cfg)
    trigger = poison.load_trigger(cfg, victim)
    verdict_only = getattr(defense, "VERDICT_ONLY", False)
    tests = None if verdict_only else evaluate.test_data(cfg, trigger)
    arriving, triggered = None, None
    if getattr(defense, "NEEDS_INCOMING", False):  # of the data that the suspect was trained on
        arriving, triggered = incoming.make(tests.own or tests)
    key = jax.random.key(cfg.seed * 16 + STREAM)
    out = folder / "defenses" / cfg.defense.name
    results = {}
    control = None if vetting else run_folder.control_of(cfg, victim)
    uses_victim = getattr(defense, "USES_VICTIM", True)
    for label, place, where in _suspects(cfg, victim, control, out, uses_victim):
        suspect = start.open_victim(cfg, place, mesh)
        truth = None
        if known and not (vetting and not len(plan)):
            truth = Truth(plan, cfg.attack.target, trigger, pools[label].poison, triggered)
        data = Given(clean, held_out, pools[label], arriving)
        anew, began = not _begun(where), time.monotonic()
        outcome = defense.run(cfg, [suspect], data, truth, mesh, where, key)
        row = {"verdict": outcome.verdict,
               "seconds": round(time.monotonic() - began, 1) if anew else None}
        if outcome.variables is not None:
            repaired = encoders.of_parts(outcome.cfg, outcome.variables, mesh,
                                         suspect.pair and suspect.pair.tokenizer)
            row |= evaluate.measure(cfg, repaired, tests, f"{cfg.defense.name} of {label}")
            if outcome.classify:
                row |= attack_metrics.rows("own_head", outcome.classify(outcome.variables), tests,
                                           repaired, labelled_rows=len(clean))
            if outcome.points and tests.placements:
                row["front"] = front.measure(outcome, suspect, tests, mesh)
        run_folder.write_json(where / "report.json", outcome.report)
        results[label] = row
    if uses_victim and control == victim:
        results["control"] = copy.deepcopy(results["victim"])
    path = folder / "results.json"
    whole = run_folder.read_json(path) if path.exists() else {"defenses": {}}
    undefended = _undefended_control(cfg, folder, victim)
    for label, row in results.items():
        probes = {k: v for k, v in row.items() if k not in ("verdict", "seconds", "front")}
        rival = results.get("control", undefended) if label == "victim" else None
        evaluate.add_excess(probes, rival)
    found = results["victim"]
    if "control" in results:
        found["control"] = results["control"]
    run_folder.write_json(out / "results.json", found)
    whole["defenses"][cfg.defense.name] = found
    run_folder.write_json(path, whole)


def _suspects(cfg, victim, control, out, uses_victim) -> list[tuple]:
    """Whom to defend: (label, folder of the encoder, folder of what comes out)."""
    found = [("victim", victim, out)]
    if uses_victim and cfg.control and control not in (None, victim):
        found.append(("control", control, out / "control"))
    return found


def _begun(where: epath.Path) -> bool:
    """Whether a defense has left something in its folder: of the victim the control's is there
    too."""
    return where.exists() and any(place.is_dir() and place.name != "control"
                                  for place in where.iterdir())


def _undefended_control(cfg, folder: epath.Path, victim: epath.Path) -> dict | None:
    """The control's rows as they were measured here or else with the victim, by the same evals."""
    settings = run_folder.settings_of(cfg, run_folder.EVALUATE_GROUPS)
    for place in (folder, victim):
        begun, results = place / "evaluate" / "settings.json", place / "results.json"
        if not (run_folder.is_done(place / "evaluate") and results.exists()):
            continue
        if not run_folder.difference(run_folder.read_json(begun), settings):
            return run_folder.read_json(results).get("control")
    return None


if __name__ == "__main__":
    no_program("jax_cl_bd --config=FILE --workdir=DIR --stages=defend")
