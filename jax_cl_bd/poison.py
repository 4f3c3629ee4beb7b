"""poison: decides who is poisoned, renders the poisons, and leaves both in the run folder.

poison/plan.npz               who is poisoned and how
poison/images.array_record    one PNG per poison, of the part of its square that it fills
poison/trigger/params.npz     the trigger
poison/summary.json           counts and rates
poison/preview.png            some poisons, their parts outlined
poison/tokenizer.json         of an image-text run
"""

import contextlib
import hashlib
import io
import json
import tempfile
from types import ModuleType

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from PIL import Image

from jax_cl_bd import lookup, preview, run_folder
from jax_cl_bd.attacks.plan import LAYOUTS, Plan, rows_of
from jax_cl_bd.data import parallel_map, sources, texts
from jax_cl_bd.errors import UserError, no_program

STREAM = 1  # of cfg.seed


def run(cfg, folder: epath.Path) -> None:
    """Makes the poison set of a config and writes it to `folder`/poison.

    A pure function of the config and the data: the same files every time.

    Raises:
        UserError: a setting that does not fit the data, before anything is rendered.
    """
    source = sources.load(cfg.data, "train")
    table = sources.table(source)
    check(cfg, table, source.classes)
    stage = folder / "poison"
    (stage / "trigger").mkdir(parents=True, exist_ok=True)
    trigger = learn_trigger(cfg, source, stage)
    plan, rows = make(cfg, source, table, trigger)

    with _renamed(stage / "plan.npz") as path:
        plan.save(path)
    with _renamed(stage / "trigger" / "params.npz") as path, path.open("wb") as file:
        np.savez(file, **{k: np.asarray(v) for k, v in trigger[1].items()})
    _write_images(stage / "images.array_record", rows)
    if cfg.text.name != "none":
        with _renamed(stage / "tokenizer.json") as path:
            texts.make_tokenizer(cfg, source).save(path)
    facts = summary(cfg, plan, rows, table, source.classes, trigger)
    facts["data"] = fingerprint(source, table)
    run_folder.write_json(stage / "summary.json", facts)
    with _renamed(stage / "preview.png") as path:
        path.write_bytes(preview.draw(cfg, plan, rows, source))
    print(f"poison: {facts['poisons']} poisons ({facts['added']} added, {facts['replaced']} "
          f"replaced, {facts['removed']} references removed), "
          f"{percent(facts['rate_of_dataset'])} of {facts['rows']} rows; "
          f"see {stage / 'preview.png'}", flush=True)


def percent(share: float) -> str:
    """A share in percent with three significant digits: 3 of 3 million are "0.0001 %"."""
    return np.format_float_positional(100 * share, 3, unique=False, fractional=False,
                                      trim="-") + " %"


def make(cfg, source, table, trigger) -> tuple[Plan, dict[str, np.ndarray]]:
    """Draws the plan and renders it; `load` reads the same back from a run folder."""
    attack = lookup.load("attacks", cfg.attack.name, offers="plan")
    plan = attack.plan(cfg, table, np.random.default_rng([cfg.seed, STREAM]))
    return plan, attack.render(cfg, plan, source, trigger)


def check(cfg, table, classes: tuple[str, ...]) -> None:
    """Validates seed, trigger and attack against what is known of the data, reading no pixels.

    Raises:
        UserError: the first setting found wrong.
    """
    if cfg.seed < 0:
        raise UserError(f"seed is {cfg.seed}; it is 0 or more")
    trigger = lookup.load("triggers", cfg.attack.trigger.name, offers="apply")
    trigger.check(cfg.attack.trigger)
    lookup.load("attacks", cfg.attack.name, offers="plan").check(cfg, table, classes)
    if cfg.attack.trigger_from:
        make_trigger(cfg)


def fingerprint(source, table) -> dict:
    """What tells one data set from another without its pixels: {"rows", "sha256"} of labels, sizes
    and, where the source has them, captions and paths."""
    digest = hashlib.sha256()
    digest.update(np.asarray(table.labels, np.int64).tobytes())
    digest.update(np.asarray(table.sizes, np.int32).tobytes())
    for texts_of_rows in (table.captions, getattr(source, "paths", None)):
        for row in texts_of_rows or ():
            digest.update(json.dumps(row).encode())
    return {"rows": len(table.labels), "sha256": digest.hexdigest()}


def check_data(cfg, folder: epath.Path) -> None:
    """Compares the data with those that the poisons of a run folder were made from, if it says.

    Raises:
        UserError: they are not the same rows.
    """
    recorded = run_folder.read_json(folder / "poison" / "summary.json").get("data")
    if recorded is None:
        return  # of runs made before there were fingerprints
    source = sources.load(cfg.data, "train")
    if differs := run_folder.difference(recorded, fingerprint(source, sources.table(source))):
        raise UserError(f"data set {cfg.data.name!r} is not the one that {folder} was poisoned "
                        f"with: {differs} (restore it, or use another --workdir)")


def load(folder: epath.Path) -> tuple[Plan, dict[str, np.ndarray]]:
    """Reads a poison set: the plan, and rows {"image" uint8 [m, S_p, S_p, 3], "size", "extent"
    int32 [m, 2]}.

    Raises:
        UserError: a file is missing, cut short or corrupt; names it and how to make it again.
    """
    stage = folder / "poison"
    plan = Plan.load(stage / "plan.npz")
    side = run_folder.read_json(stage / "summary.json")["stored_side"]
    records = _read_records(stage / "images.array_record")
    if len(records) != len(plan):
        raise UserError(f"{stage / 'images.array_record'} holds {len(records)} images, but the "
                        f"plan has {len(plan)} poisons; make it again with --force=poison")
    images = np.zeros((len(plan), side, side, 3), np.uint8)
    extent = np.zeros((len(plan), 2), np.int32)
    for k, record in enumerate(records):
        try:
            image = np.asarray(Image.open(io.BytesIO(record)).convert("RGB"))
            extent[k] = image.shape[:2]
            images[k, :extent[k, 0], :extent[k, 1]] = image
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"poison {k} in {stage / 'images.array_record'} is corrupt ({error}); "
                            "make it again with --force=poison") from None
    return plan, {"image": images, "size": plan.canvas.astype(np.int32), "extent": extent}


def make_trigger(cfg) -> tuple[ModuleType, dict[str, np.ndarray]]:
    """The trigger of a config, (module, params): built, or read from `attack.trigger_from`."""
    module = lookup.load("triggers", cfg.attack.trigger.name, offers="apply")
    made = module.init(cfg.attack.trigger, jax.random.key(cfg.seed))
    if not cfg.attack.trigger_from:
        return module, made
    given = epath.Path(cfg.attack.trigger_from)
    places = [given / "params.npz", given / "poison" / "trigger" / "params.npz"]
    found = next((path for path in places if path.exists()), None)
    if found is None:
        raise UserError(f"attack.trigger_from is {str(given)!r}, but neither {places[0]} nor "
                        f"{places[1]} exists")
    params = _read_params(found)
    if {k: v.shape for k, v in params.items()} != {k: np.shape(v) for k, v in made.items()}:
        raise UserError(f"{found} holds no parameters of the trigger {cfg.attack.trigger.name!r}")
    if "opacity" in params and not np.isclose(params["opacity"], made["opacity"], rtol=1e-6):
        raise UserError(f"{found} has opacity {params['opacity']:g}, but attack.trigger.opacity is "
                        f"{made['opacity']:g}; set them equal")
    return module, params


def learn_trigger(cfg, source, stage: epath.Path) -> tuple[ModuleType, dict[str, np.ndarray]]:
    """The same, after an attack that learns its trigger has done so."""
    module, params = make_trigger(cfg)
    attack = lookup.load("attacks", cfg.attack.name, offers="plan")
    if hasattr(attack, "prepare") and not cfg.attack.trigger_from:
        params = attack.prepare(cfg, source, stage, jax.random.key(cfg.seed))
    return module, params


def load_trigger(cfg, folder: epath.Path) -> tuple[ModuleType, dict[str, np.ndarray]]:
    """The trigger that the poisons of a run folder carry, (module, params); of a folder of weights
    alone, the one of the config."""
    if run_folder.weights_alone(folder):
        return make_trigger(cfg)
    module = lookup.load("triggers", cfg.attack.trigger.name, offers="apply")
    return module, _read_params(folder / "poison" / "trigger" / "params.npz")


def summary(cfg, plan: Plan, rows: dict, table, classes, trigger) -> dict:
    """Counts and rates of a plan.

    rate_of_dataset: poisons over all rows of the poisoned set. rate_of_target_class: poisons that
    show content of the target class, over the class's clean images before the attack. Where no row
    has a label, both, and `target_images`, are of the rows with a caption that names the target.
    """
    target = rows_of(table, cfg.attack.target, classes)
    source = len(table.labels)
    total = len(plan.kept(source))
    replaced = plan.replaces[plan.replaces >= 0]
    content = np.where(plan.reference >= 0, plan.reference, plan.replaces)
    used = cfg.attack.trigger.to_dict()
    used["from"] = cfg.attack.trigger_from  # else its image is the one of its id
    used["opacity"] = float(trigger[1].get("opacity", used.get("opacity", 1.0)))
    found = {"attack": cfg.attack.name, "seed": cfg.seed, "target": cfg.attack.target,
             "target_class": str(classes[cfg.attack.target]), "poisons": len(plan),
             "added": int((plan.replaces < 0).sum()), "replaced": len(replaced),
             "removed": len(plan.removed), "source_rows": source, "rows": total,
             "rate_of_dataset": len(plan) / total,
             "rate_of_target_class":
                 int((np.isin(content, target) | (plan.beside == cfg.attack.target)).sum())
                 / max(1, len(target)),
             "target_images": len(target),
             "clean_target_images_left":
                 len(np.setdiff1d(target, np.concatenate([plan.removed, replaced]))),
             "stored_side": rows["image"].shape[1],
             "canvas": {"smallest": plan.canvas.min(0).tolist() if len(plan) else None,
                        "largest": plan.canvas.max(0).tolist() if len(plan) else None},
             "layouts": {name: int((plan.layout == i).sum()) for i, name in enumerate(LAYOUTS)},
             "trigger": used}
    for name, chosen in (("references", plan.reference), ("shadows", plan.shadow),
                         ("replaced", replaced)):
        unique = np.unique(chosen[chosen >= 0])
        found[f"unique_{name}"] = len(unique)
        labels, counts = np.unique(table.labels[unique], return_counts=True)
        found[f"unique_{name}_by_class"] = {
            str(classes[c]) if c >= 0 else "no label": int(n) for c, n in zip(labels, counts)}
    return found


def _read_params(path):
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the stage poison first") from None
    except Exception as error:  # zipfile and zlib have errors of their own
        raise UserError(f"{path} holds no readable trigger ({error}); "
                        "make it again with --force=poison") from None


def _write_images(path, rows):
    """PNG of the filled part of each square. Written locally first: array_record knows no gs://."""
    def encode(k):
        height, width = rows["extent"][k]
        out = io.BytesIO()
        Image.fromarray(rows["image"][k, :height, :width]).save(out, "PNG")
        return out.getvalue()

    with tempfile.TemporaryDirectory() as scratch:
        local = epath.Path(scratch) / path.name
        writer = ArrayRecordWriter(str(local), "group_size:1")
        for record in parallel_map.run(encode, range(len(rows["image"])), what="write poisons"):
            writer.write(record)
        writer.close()
        with _renamed(path) as temporary:
            local.copy(temporary, overwrite=True)


def _read_records(path):
    if not path.exists():
        raise UserError(f"{path} is missing: run the stage poison first")
    with contextlib.ExitStack() as stack:
        local = path
        if "://" in str(path):
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            local = path.copy(epath.Path(scratch) / path.name)
        try:
            reader = ArrayRecordReader(str(local))
            records = reader.read_all() if reader.num_records() else []
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"{path} is corrupt ({str(error).splitlines()[0]}); "
                            "make it again with --force=poison") from None
    return records


@contextlib.contextmanager
def _renamed(path):
    """Gives a temporary path that takes the name of `path` when the block ends well."""
    temporary = path.parent / f".{path.name}.partial"
    yield temporary
    temporary.replace(path)


if __name__ == "__main__":
    no_program("jax_cl_bd --config=FILE --workdir=DIR --stages=poison")
