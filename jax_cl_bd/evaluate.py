"""evaluate: measures victim, control and an untrained encoder alike, into results.json."""

import contextlib
import copy
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import time

import jax
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import lookup, metrics, parallel, poison, run_folder
from jax_cl_bd.data import sources, templates, texts
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError, no_program
from jax_cl_bd.evals import alignment, attack_metrics, examples, test_sets, zero_shot
from jax_cl_bd.models import build, parts, start
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.objectives import training

MAP_POINTS = 2000
WITHOUT_LABELS = ("retrieval", "z_score", "mismatch")  # probes that need none
OF_THE_RUNS_DATA = ("targeted", "mismatch")  # probes of rows or classes of the run's own test split
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scikit-learn")


def test_data(cfg: ml_collections.ConfigDict, trigger):
    """Builds the labelled rows and the clean and triggered test sets; the same for every encoder.

    With cfg.downstream the images are another data set's, and the target is its class of the same
    name; `own` then holds the run's own test pairs, where its data has captions. Its test split is
    cfg.evals.downstream_test_split, by default the name that the run's own has; cfg.evals.
    downstream_class_names names the classes of a folder. `other` holds another split of the run's
    own data, cfg.evals.other_test_split. No pixel is read yet.

    Raises:
        UserError: a setting of `evals` that does not fit the data, or a downstream data set without
            the target class, or with two of its name.
    """
    if not cfg.evals.placements:
        raise UserError("evals.placements is empty; name at least 'random', the test protocol")
    train, test = (sources.load(cfg.data, split) for split in ("train", "test"))
    if not cfg.downstream:
        data = test_sets.make(cfg, train, test, trigger)
        data.other = _other_split(cfg, train, trigger)
        return data
    if cfg.evals.get("other_test_split", ""):
        raise UserError(f"evals.other_test_split={cfg.evals.other_test_split!r} is a split of the "
                        f"run's own data, and downstream={cfg.downstream!r} measures on another; "
                        "leave one of them empty")
    other = ml_collections.ConfigDict(cfg.to_dict())
    other.data.update({"name": cfg.downstream, "limit": 0,
                       "test_split": cfg.evals.downstream_test_split or cfg.data.test_split,
                       "class_names": cfg.evals.downstream_class_names})
    target = str(train.classes[cfg.attack.target])
    own = None
    if not test_sets.has_labels(train):
        other.data.classes_file = ""  # it has the names that the run's captions contain
    if hasattr(test, "captions") and cfg.text.name != "none":
        own = test_sets.make(cfg, train, test, trigger)
    train, test = (sources.load(other.data, split) for split in ("train", "test"))
    if target not in train.classes:
        raise UserError(f"downstream={cfg.downstream!r} has no class {target!r}, the attack's "
                        f"target; its classes are {', '.join(map(str, train.classes[:20]))}")
    if list(train.classes).count(target) > 1:
        raise UserError(f"downstream={cfg.downstream!r} has more than one class {target!r}, the "
                        "attack's target; give them different names")
    other.attack.target = list(train.classes).index(target)
    if not test_sets.has_labels(test):
        raise UserError(f"downstream={cfg.downstream!r} has no labels in its test split, and they "
                        "are what it is for")
    data = test_sets.make(other, train, test, trigger)
    data.own = own
    return data


def _other_split(cfg, train, trigger):
    """The images of cfg.evals.other_test_split under the first placement, for the zero-shot row of
    that name; None if it names none."""
    split = cfg.evals.get("other_test_split", "")  # configs before there was one lack it
    if not split:
        return None
    if "zero_shot" not in cfg.evals.probes:
        raise UserError(f"evals.other_test_split={split!r} is for the zero-shot classifier, and "
                        f"evals.probes has no 'zero_shot'; add it, or leave the split empty")
    if split in (cfg.data.train_split, cfg.data.test_split, cfg.defense.get("validation_split")):
        raise UserError(f"evals.other_test_split={split!r} is also trained, tested or chosen on; "
                        "name another split of the data")
    test = sources.load({**cfg.data.to_dict(), "test_split": split}, "test")
    data = test_sets.make(cfg, train, test, trigger)
    data.placements = data.placements[:1]
    return data


def untrained(cfg: ml_collections.ConfigDict, victim: epath.Path, mesh) -> encoders.Encoder:
    """The encoder as the victim's training began with it: drawn, or loaded (config.init_from). Of
    a victim of which there are weights alone, one of its kind is drawn."""
    if not run_folder.weights_alone(victim):
        tokenizer, variables = texts.load_tokenizer(cfg, victim), training.first_variables(cfg)
    elif cfg.text.name != "none":
        tokenizer, variables = tokenizers.load(cfg.text.tokenizer), training.first_variables(cfg)
    else:
        side, tokenizer = cfg.data.image_size, None
        variables = parts.init_variables({"encoder": build.build(cfg.model)},
                                         training.first_key(cfg), (side, side, 3))
    drawn = encoders.of_parts(cfg, variables, mesh, tokenizer)
    return dataclasses.replace(drawn, step=0)


def measure(cfg: ml_collections.ConfigDict, encoder: encoders.Encoder, data, label: str) -> dict:
    """Runs every probe of the config: {"<probe>[:placement]": figures} and the alignment row.

    A repaired encoder may have lost its text tower: probes that need one (TEXT) are left out.
    """
    modules = {name: lookup.load("evals", name, offers="run") for name in cfg.evals.probes}
    modules = {name: module for name, module in modules.items()
               if not getattr(module, "TEXT", False) or encoder.text is not None}
    with contextlib.closing(metrics.Progress(f"evaluate {label}", len(modules) + 1)) as progress:
        rows, seen = {}, 0

        def watch(count):
            nonlocal seen
            seen += count
            progress.update(0, f"{name}, {seen} images encoded")

        encoder.watchers.append(watch)
        for name, module in modules.items():
            rows |= module.run(cfg, encoder, data)
            progress.update(1, name)
        name = "alignment"
        rows[name] = alignment.of_encoder(encoder, data)
        progress.update(1, name)
        encoder.watchers.remove(watch)
    return rows


def add_excess(rows: dict, control: dict | None) -> None:
    """Writes `excess` into every probe row, against the control's row of the same name."""
    for name, row in rows.items():
        if "clean_accuracy" in row:
            attack_metrics.add_excess(row, (control or {}).get(name))


def check(cfg: ml_collections.ConfigDict) -> None:
    """Finds what is wrong with the settings of this stage before anything is compiled."""
    if not cfg.evals.probes:
        raise UserError("evals.probes is empty; name at least one, such as ('knn',)")
    if cfg.control_from:
        run_folder.control_of(cfg, epath.Path(cfg.control_from))  # refuses what does not fit
    probes = [lookup.load("evals", name, offers="run") for name in cfg.evals.probes]
    _check_labels(cfg)
    data = test_data(cfg, poison.make_trigger(cfg))
    for probe in probes:
        if hasattr(probe, "check"):
            probe.check(cfg, data)
    if cfg.evals.knn_k < 1 or cfg.evals.knn_temperature <= 0:
        raise UserError(f"evals.knn_k={cfg.evals.knn_k} and evals.knn_temperature="
                        f"{cfg.evals.knn_temperature} must be positive")


def _check_labels(cfg):
    """Refuses probes that have no labels to measure by, or other rows than those they speak of."""
    for name in cfg.evals.probes:
        if cfg.downstream and name in OF_THE_RUNS_DATA:
            raise UserError(f"evals.probes has {name!r}, which is about the run's own test images; "
                            f"take it out, or leave downstream ({cfg.downstream!r}) empty")
    needing = [name for name in cfg.evals.probes if name not in WITHOUT_LABELS]
    if cfg.downstream or not needing:
        return
    if not any(test_sets.has_labels(sources.load(cfg.data, s)) for s in ("train", "test")):
        raise UserError(f"evals.probes has {needing[0]!r}, which needs labels, and data set "
                        f"{cfg.data.name!r} has none: set --config.downstream to a labelled one, "
                        f"or --config.evals.probes to some of {', '.join(WITHOUT_LABELS)}")


def run(cfg: ml_collections.ConfigDict, folder: epath.Path, victim: epath.Path) -> None:
    """Measures the run in `victim`; writes results.json and evaluate/ of `folder`."""
    began = time.monotonic()
    mesh = parallel.make_mesh(cfg.mesh)
    data = test_data(cfg, poison.load_trigger(cfg, victim))
    found = {"victim": start.open_victim(cfg, victim, mesh),
             "untrained": untrained(cfg, victim, mesh)}
    if (control := run_folder.control_of(cfg, victim)) not in (None, victim):
        found["control"] = encoders.load(control, mesh)
    results, answers = {}, {}
    for label, encoder in found.items():  # one after the other: `data` keeps features of one
        results[label] = measure(cfg, encoder, data, label)
        if label != "untrained":
            _save_map(folder, label, encoder, data)
            if encoder.text is not None:
                answers[label] = examples.find(cfg, encoder, data)
    if control == victim:
        results["control"] = copy.deepcopy(results["victim"])
    for label in results:
        add_excess(results[label], results.get("control") if label != "control" else None)
    if answers:
        _save_examples(folder, answers, data)
    steps = {label: encoder.step for label, encoder in found.items()}
    steps |= {"control": steps["victim"]} if control == victim else {}
    summary = dict.fromkeys(("poisons", "rate_of_dataset", "rate_of_target_class"))
    if not run_folder.weights_alone(victim):
        summary = run_folder.read_json(victim / "poison" / "summary.json")
    run_folder.write_json(folder / "results.json", {
        "poison": _poison_row(cfg, summary), **results,
        "defenses": run_folder.kept_defenses(folder),
        "run": _run_row(cfg, victim, time.monotonic() - began)
        | {"steps": steps, "control": _name_of(control) if cfg.control_from else None}})


def _poison_row(cfg, summary: dict) -> dict:
    named = ("name", "id", "size", "opacity", "test_place", "test_box")
    trigger = {k: cfg.attack.trigger[k] for k in named if k in cfg.attack.trigger}
    return {"attack": cfg.attack.name, "target": cfg.attack.target,
            "count": summary["poisons"], "rate_of_dataset": summary["rate_of_dataset"],
            "rate_of_target_class": summary["rate_of_target_class"], "trigger_test": trigger,
            "settings": cfg.attack.to_dict()}


def _run_row(cfg, folder: epath.Path, seconds: float) -> dict:
    speeds = [line["images_per_second"] for line in metrics.read_lines(folder / "metrics.jsonl")
              if "images_per_second" in line]
    settings = run_folder.settings_of(cfg, run_folder.EVALUATE_GROUPS)
    return {"config_hash": run_folder.hash_of(settings), "seed": cfg.seed,
            "versions": {p: importlib.metadata.version(p) for p in PACKAGES}
            | {"python": platform.python_version()},
            "devices": [d.device_kind for d in jax.devices()], "seconds": round(seconds, 1),
            "images_per_second": float(np.median(speeds)) if speeds else None,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _name_of(control: epath.Path) -> dict:
    """Which encoder the control is: its run folder's name and its seed."""
    own = control.name == "control"
    run = epath.Path(os.path.abspath(control.parent if own else control)).name
    return {"folder": f"{run}/control" if own else run,
            "seed": run_folder.read_config(control).seed}


def _save_map(folder: epath.Path, label: str, encoder, data) -> None:
    """Keeps the features that the report draws: clean and triggered test images, class names."""
    count = len(data.test_labels)
    rows = np.linspace(0, count - 1, min(count, MAP_POINTS)).astype(int)
    clean = data.features(encoder, "test")[rows]
    triggered = clean[:0]  # of an attack without a trigger
    if data.placements:
        triggered = data.features(encoder, f"{data.placements[0]}/triggered")[rows]
    words = {}
    if encoder.text is not None:  # then the map is of the shared space
        clean = encoder.project(clean)
        triggered = encoder.project(triggered) if len(triggered) else clean[:0]
    if encoder.text is not None and len(data.classes) > 1:
        words = {"text": zero_shot.class_weights(encoder, data.classes, templates.PROMPTS),
                 "classes": np.array([str(name) for name in data.classes])}
    name = "map.npz" if label == "victim" else f"map_{label}.npz"
    labels = np.where(data.of_target, data.target, data.test_labels)  # also of data without labels
    _save_arrays(folder / "evaluate" / name, clean=clean, triggered=triggered,
                 labels=labels[rows], target=data.target, **words)


def _save_examples(folder: epath.Path, answers: dict[str, dict], data) -> None:
    """Keeps what encoders say of some images as JSON, and the images that the victim's names."""
    _save_arrays(folder / "evaluate" / "examples.npz", **examples.pixels(answers["victim"], data))
    run_folder.write_json(folder / "evaluate" / "examples.json", answers)


def _save_arrays(path: epath.Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}"
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


if __name__ == "__main__":
    no_program("jax_cl_bd --config=FILE --workdir=DIR --stages=evaluate")
