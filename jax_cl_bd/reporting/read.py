"""What a report finds in a run folder; whatever is missing is None or empty."""

import dataclasses
import os

import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import metrics, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError, nearest

OF_CONTROL = " of control"  # "<defense> of control": the control after that defense


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder in memory."""
    folder: epath.Path
    cfg: ml_collections.ConfigDict
    results: dict | None  # results.json
    summary: dict | None  # poison/summary.json
    plan: Plan | None
    preview: bytes | None
    metrics: dict[str, list[dict]]  # "victim", "control" -> lines of metrics.jsonl
    maps: dict[str, dict[str, np.ndarray]]  # "victim", "control" -> evaluate/map*.npz
    borrowed: dict | None  # {"folder", "seed"} of the run whose control this is; None: its own
    same_trigger: bool  # whether the control's own run had this run's trigger and target
    settings: dict[str, dict]  # defense -> defenses/<name>/settings.json
    shown: dict[str, dict[str, tuple[bytes, str]]]  # defense -> picture -> (PNG, caption)
    trigger: dict[str, np.ndarray] | None = None  # poison/trigger/params.npz
    optimisation: dict | None = None  # poison/trigger/optimisation.json, of a learned trigger
    examples: dict | None = None  # evaluate/examples.json, of an image-text run
    pixels: dict[str, np.ndarray] | None = None  # evaluate/examples.npz

    @property
    def image_text(self) -> bool:
        """Whether the model has a text tower."""
        return self.cfg.get("text", {}).get("name", "none") != "none"

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, where an evaluation kept them."""
        return self.examples["victim"]["classes"] if self.examples else None

    @property
    def defenses(self) -> dict[str, dict]:
        return (self.results or {}).get("defenses", {})

    @property
    def encoders(self) -> dict[str, dict[str, dict]]:
        """Encoder -> probe -> figures; the repaired ones last, as "<defense>" and, where the
        control was defended too, "<defense> of control"."""
        found = {label: self.results[label] for label in ("victim", "control", "untrained")
                 if label in (self.results or {})}
        for name, rows in self.defenses.items():
            repaired = {name: rows, f"{name}{OF_CONTROL}": rows.get("control", {})}
            found |= {label: own for label, own in repaired.items() if probes(own)}
        return found


def folders(names: list[str]) -> list[epath.Path]:
    """The run folders that a command line names.

    Raises:
        UserError: one of them does not exist, or is another once more.
    """
    found, places = [], {}
    for name in names:
        folder = epath.Path(name)
        if not folder.is_dir() and folder.exists():
            raise UserError(f"{name!r} is a file, not a run folder")
        if not folder.is_dir():
            beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
            near = nearest(str(folder), [str(path) for path in beside if path.is_dir()])
            hint = f"; did you mean {near!r}?" if near else ""
            raise UserError(f"the run folder {name!r} does not exist{hint}")
        place = str(folder) if "://" in name else os.path.realpath(folder)
        if place in places:
            raise UserError(f"the run folder {name!r} is given twice, the first time as "
                            f"{places[place]!r}; a run counts once")
        places[place] = name
        found.append(folder)
    return found


def load(folder: epath.Path, cfg: ml_collections.ConfigDict | None = None) -> Run:
    """Reads a run folder; with cfg.victim, the poison and training are those of that folder.

    Raises:
        UserError: there is no config, or a file is broken.
    """
    cfg = run_folder.read_config(folder) if cfg is None else cfg
    victim = epath.Path(cfg.victim) if cfg.victim else folder
    plan, preview = victim / "poison" / "plan.npz", victim / "poison" / "preview.png"
    control, same_trigger = _control(cfg, victim)
    places = {"victim": victim, "control": control}
    lines = {label: metrics.read_lines(place / "metrics.jsonl") if place is not None else []
             for label, place in places.items()}
    if not same_trigger:
        lines["control"] = [{key: value for key, value in line.items()
                             if not key.startswith("eval/") or key.endswith("/clean_accuracy")}
                            for line in lines["control"]]
    maps = {label: folder / "evaluate" / name
            for label, name in (("victim", "map.npz"), ("control", "map_control.npz"))}
    results = _json(folder / "results.json")
    return Run(
        folder=folder, cfg=cfg, results=results,
        summary=_json(victim / "poison" / "summary.json"),
        plan=Plan.load(plan) if plan.exists() else None,
        preview=preview.read_bytes() if preview.exists() else None,
        metrics={label: found for label, found in lines.items() if found},
        maps={label: _arrays(path) for label, path in maps.items() if path.exists()},
        borrowed=_borrowed(cfg, results), same_trigger=same_trigger,
        settings={name: _json(folder / "defenses" / name / "settings.json") or {}
                  for name in (results or {}).get("defenses", {})},
        shown={name: _pictures(folder / "defenses" / name)
               for name in (results or {}).get("defenses", {})},
        trigger=_arrays_if(victim / "poison" / "trigger" / "params.npz"),
        optimisation=_json(victim / "poison" / "trigger" / "optimisation.json"),
        examples=_json(folder / "evaluate" / "examples.json"),
        pixels=_arrays_if(folder / "evaluate" / "examples.npz"))


def _control(cfg, victim):
    """The control's folder, None if it cannot be read, and whether it was watched while training
    under this run's trigger and target."""
    if not cfg.get("control_from"):
        return victim / "control", True
    theirs = epath.Path(cfg.control_from)
    try:
        place, attack = run_folder.control_of(cfg, victim), run_folder.read_config(theirs).attack
    except (UserError, OSError):
        return None, True
    same = (attack.target, attack.trigger) == (cfg.attack.target, cfg.attack.trigger)
    pixels = [_arrays_if(path / "poison" / "trigger" / "params.npz") or {}
              for path in (victim, theirs)]
    return place, (same and pixels[0].keys() == pixels[1].keys()
                   and all(np.array_equal(v, pixels[1][k]) for k, v in pixels[0].items()))


def _pictures(place):
    """What report.json of a defense lists under "pictures", file -> caption."""
    listed = (_json(place / "report.json") or {}).get("pictures", {})
    return {epath.Path(name).stem: ((place / name).read_bytes(), caption)
            for name, caption in listed.items() if (place / name).exists()}


def _borrowed(cfg, results):
    known = (results or {}).get("run", {}).get("control")
    if known or not cfg.get("control_from"):
        return known
    given = epath.Path(cfg.control_from)
    try:
        return {"folder": given.name, "seed": run_folder.read_config(given).seed}
    except (UserError, OSError):
        return {"folder": given.name}


def probes(rows: dict) -> dict[str, dict]:
    """The rows of one encoder that are a probe's figures."""
    return {name: row for name, row in rows.items()
            if isinstance(row, dict) and "clean_accuracy" in row}


def series(lines: list[dict], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and values of one metric, or None if it was never written."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return tuple(np.array(part) for part in zip(*found)) if found else None


def _json(path):
    return run_folder.read_json(path) if path.exists() else None


def _arrays_if(path):
    return _arrays(path) if path.exists() else None


def _arrays(path):
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
