"""export: writes the poisoned set of a run folder as PNG files, for any other trainer.

    python -m jax_cl_bd.export --workdir=RUN --to=FOLDER [--format=huggingface]

With --format=huggingface it writes a trained image-text model instead (export_model.py). Else:

FOLDER/images/<row>.png   every row of the poisoned set, without loss, in no class folders
FOLDER/rows.csv           for each file: clean or poison, source row, label, the row view 2 is of,
                          and where the data has captions, they as a JSON list
FOLDER/plan.csv           for each poison: replaces, reference, shadow, layout, boxes, seed, caption

Images have the shape and resolution of the original, poisons too: one that is stored smaller is
rendered again at full resolution from the saved plan. With data.center_crop all are the central
square at data.image_size. Labels are for probes; they are no part of self-supervised training.
"""

import csv
import json
import sys

import numpy as np
from etils import epath
from PIL import Image

from jax_cl_bd import command_line, errors, export_model, lookup, poison, run_folder
from jax_cl_bd.attacks.plan import LAYOUTS
from jax_cl_bd.data import parallel_map, sources
from jax_cl_bd.errors import UserError

BUCKET = 128  # px; large poisons are rendered in squares of few sizes, one compile each


def export(workdir: epath.Path, to: epath.Path) -> int:
    """Exports the poisoned set of `workdir` to a new folder.

    Returns:
        How many images were written.
    Raises:
        UserError: no complete poison set in `workdir`, or `to` is not empty.
    """
    cfg = run_folder.read_config(workdir)
    if not run_folder.is_done(workdir / "poison"):
        raise UserError(f"{workdir} has no complete poison set; run the stage poison first")
    plan, rows = poison.load(workdir)
    export_model.check_new(to)
    source = sources.load(cfg.data, "train")
    table = sources.table(source)
    kept = plan.kept(len(source))
    if kept.max(initial=-1) >= len(source) + len(plan) or plan.replaces.max(initial=-1) >= len(
            source) or plan.removed.max(initial=-1) >= len(source):
        raise UserError(f"the plan in {workdir} names rows beyond the {len(source)} of "
                        f"{cfg.data.name!r}: is data_dir another version of the data?")
    poisons = _full_size(cfg, plan, rows, source, poison.load_trigger(cfg, workdir))

    (to / "images").mkdir(parents=True, exist_ok=True)
    digits = len(str(kept.max()))

    def write(row):
        image = (source[row]["image"] if row < len(source) else poisons[row - len(source)])
        with (to / "images" / f"{row:0{digits}d}.png").open("wb") as file:
            Image.fromarray(image).save(file, "PNG")

    for _ in parallel_map.run(write, kept, what="export images"):
        pass
    _write_csv(to / "rows.csv", _row_lines(kept, plan, table, digits))
    _write_csv(to / "plan.csv", _plan_lines(plan, len(source)))
    return len(kept)


def _full_size(cfg, plan, rows, source, trigger) -> list[np.ndarray]:
    """Every poison at the resolution of its canvas, uint8 [h, w, 3]."""
    found = [image[:h, :w] for image, (h, w) in zip(rows["image"], rows["extent"])]
    attack = lookup.load("attacks", cfg.attack.name, offers="plan")
    smaller = np.flatnonzero((rows["extent"] != rows["size"]).any(axis=1))
    sides = -(-rows["size"].max(axis=1, initial=0) // BUCKET) * BUCKET
    for side in np.unique(sides[smaller]):
        large = cfg.copy_and_resolve_references().unlock()
        large.data.image_size = int(side)
        which = smaller[sides[smaller] == side]
        again = attack.render(large, plan.part(which), source, trigger)
        for k, image, (h, w) in zip(which, again["image"], again["extent"]):
            found[k] = image[:h, :w]
    return found


def _row_lines(kept, plan, table, digits):
    last = [] if table.captions is None else ["captions"]
    yield ("row", "file", "kind", "source_row", "label", "pair", *last)
    n = len(table.labels)
    for row in kept.tolist():
        k = row - n
        origin = row if k < 0 else int(plan.replaces[k])  # -1: no single image it stems from
        yield (row, f"images/{row:0{digits}d}.png", "clean" if k < 0 else "poison", origin,
               int(table.labels[origin]) if origin >= 0 else -1,
               int(plan.pair[k]) if k >= 0 and plan.pair[k] >= 0 else row,
               *_captions(plan, table, origin, k))


def _captions(plan, table, origin, k):
    """The last column, of data with captions: the poison's own, else those of its source row."""
    if table.captions is None:
        return []
    given = [str(plan.caption[k])] if k >= 0 and plan.caption[k] else None
    own = list(table.captions[origin]) if origin >= 0 else []
    return [json.dumps(given or own, ensure_ascii=False)]


def _plan_lines(plan, n):
    boxes = ("reference", "shadow", "trigger")
    yield ("row", "replaces", "reference", "shadow", "layout", "canvas_h", "canvas_w",
           *(f"{name}_{side}" for name in boxes for side in "yxhw"), "pair", "seed", "caption",
           "beside")
    for k in range(len(plan)):
        layout = LAYOUTS[plan.layout[k]] if plan.layout[k] >= 0 else ""
        yield (n + k, plan.replaces[k], plan.reference[k], plan.shadow[k], layout, *plan.canvas[k],
               *(v for name in boxes for v in getattr(plan, f"{name}_box")[k]), plan.pair[k],
               plan.seed[k], plan.caption[k], plan.beside[k])


def _write_csv(path, lines):
    with path.open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def main(argv: list[str]) -> None:
    """Reads the command line; see the top of this file."""
    parser = command_line.Parser("jax_cl_bd.export", __doc__)
    parser.add_argument("--workdir", required=True, metavar="RUN", type=epath.Path,
                        help="run folder whose poison set or model is exported")
    parser.add_argument("--to", required=True, metavar="FOLDER", type=epath.Path,
                        help="new folder to write to")
    parser.add_argument("--format", choices=("png", "huggingface"), default="png",
                        help="what is written (default png)")
    given = parser.parse_args(argv)
    if given.format == "huggingface":
        print(f"{export_model.export(given.workdir, given.to)} model in {given.to}")
    else:
        print(f"{export(given.workdir, given.to)} images in {given.to}/images")


if __name__ == "__main__":
    errors.end(main, sys.argv[1:])
