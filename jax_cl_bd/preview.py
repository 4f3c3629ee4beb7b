"""A picture of what an attack made: some poisons with their parts outlined."""

import io
import textwrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from jax_cl_bd.attacks.plan import LAYOUTS, Plan
from jax_cl_bd.errors import no_program

TILES = 16
COLUMNS = 4
INCH = 2.2  # longest side of a poison
COLORS = {"reference": "#009E73", "shadow": "#0072B2", "trigger": "#D55E00"}


def draw(cfg, plan: Plan, rows: dict[str, np.ndarray], source) -> bytes:
    """Draws up to 16 poisons, or clean images if there are none, as a PNG."""
    classes = [str(c) for c in source.classes]
    if len(plan):
        tiles = [_poison(plan, rows, source, classes, k) for k in chosen(plan.layout)]
    else:
        tiles = [_clean(source, classes, k) for k in chosen(np.zeros(len(source)))]
    figure, axes = _grid(tiles)
    for axis, tile in zip(axes, tiles):
        _show(axis, tile)
    _title(figure, cfg, plan, rows, classes)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def chosen(layout: np.ndarray) -> np.ndarray:
    """Which entries of a plan are drawn: evenly spread, as many of each layout [m]; one layout
    after the other, so that a line of tiles has one height."""
    kinds = [np.flatnonzero(layout == kind) for kind in np.unique(layout)]
    each = TILES // len(kinds)
    return np.concatenate([rows[np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)]
                           for rows in kinds])


def _clean(source, classes, k):
    item = source[int(k)]
    unit = max(item["image"].shape[:2])
    return {"images": [(item["image"], (0, 0, *_share(item["image"].shape[:2], unit)))],
            "boxes": [], "caption": _name(classes, item["label"])}


def _poison(plan, rows, source, classes, k):
    """One tile: images and outlines (y, x, h, w) in units of the canvas's longest side."""
    unit = plan.canvas[k].max()
    height, width = _share(plan.canvas[k], unit)
    down, across = rows["extent"][k]
    # A stored square of a larger image is stretched back to the shape that the image had.
    images = [(rows["image"][k, :down, :across], (0, 0, height, width))]
    boxes = [(name, _share(getattr(plan, f"{name}_box")[k], unit)) for name in COLORS
             if getattr(plan, f"{name}_box")[k][2:].all()]
    if plan.pair[k] >= 0:  # what view 2 is drawn from, beside the poison
        other = source[int(plan.pair[k])]["image"]
        beside = (0, width + 0.12, height, height * other.shape[1] / other.shape[0])
        images.append((other, beside))
        boxes.append(("reference", beside))
    return {"images": images, "boxes": boxes, "caption": _caption(plan, source, classes, k)}


def _caption(plan, source, classes, k):
    def name(row):
        return _name(classes, source[int(row)]["label"])

    if plan.caption[k]:
        shown = plan.replaces[k] if plan.replaces[k] >= 0 else plan.shadow[k]
        what = f"image of {name(shown)}" if shown >= 0 else "added"
        return "\n".join([what, *textwrap.wrap(f"“{plan.caption[k]}”", 34, max_lines=2,
                                               placeholder="…”")])
    if plan.replaces[k] >= 0 and plan.reference[k] >= 0:
        return f"image of {name(plan.reference[k])}\ncaption of {name(plan.replaces[k])}"
    if plan.replaces[k] >= 0:
        return f"{name(plan.replaces[k])}\nreplaces row {plan.replaces[k]}"
    where = f"reference ({LAYOUTS[plan.layout[k]]})" if plan.layout[k] >= 0 else "view 2"
    return f"{where}: {name(plan.reference[k])}\nshadow: {name(plan.shadow[k])}"


def _name(classes, label):
    name = classes[label] if label >= 0 else "no label"
    return name if len(name) < 22 else name[:20] + "…"


def _share(lengths, unit):
    return tuple(float(v) / float(unit) for v in lengths)


def _grid(tiles):
    """Axes of fitting heights, top to bottom; all tiles are drawn at one scale."""
    wide = max(box[1] + box[3] for tile in tiles for _, box in tile["images"])
    wide += 0.06 if wide <= 1 else 0.4  # pairs need a wider gap to be read as pairs
    lines = [tiles[i:i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    tall = [max(box[2] for tile in line for _, box in tile["images"]) + 0.06 for line in lines]
    head, label = 0.62, 0.46  # inches above everything, and above each line
    height = head + sum(INCH * t + label for t in tall)
    width = COLUMNS * INCH * wide
    figure = Figure(figsize=(width, height), dpi=110)
    axes, top = [], height - head
    for line, t in zip(lines, tall):
        top -= INCH * t + label
        for column in range(len(line)):
            axis = figure.add_axes((column / COLUMNS, top / height, 1 / COLUMNS,
                                    INCH * t / height))
            axis.set_ylim(t - 0.03, -0.03)
            axis.set_xlim(-wide / 2, wide / 2)
            axes.append(axis)
    return figure, axes


def _show(axis, tile):
    axis.axis("off")
    limits = axis.get_xlim(), axis.get_ylim()
    shift = -max(box[1] + box[3] for _, box in tile["images"]) / 2  # centred in its cell
    for image, (y, x, height, width) in tile["images"]:
        axis.imshow(image, extent=(x + shift, x + shift + width, y + height, y),
                    interpolation="nearest", aspect="auto")
    for name, (y, x, height, width) in tile["boxes"]:
        axis.add_patch(Rectangle((x + shift, y), width, height, fill=False, linewidth=1.6,
                                 edgecolor=COLORS[name]))
    axis.set_xlim(*limits[0])
    axis.set_ylim(*limits[1])
    axis.set_title(tile["caption"], fontsize=8.5, pad=3)


def _title(figure, cfg, plan, rows, classes):
    inch = 1 / figure.get_figheight()
    target = cfg.attack.target
    named = "" if classes[target] == str(target) else f" ({_name(classes, target)})"
    what = (f"{len(plan)} poisons, stored in {rows['image'].shape[1]} px" if len(plan)
            else "no poisons: clean images")
    figure.suptitle(f"{cfg.attack.name}, target {target}{named}, {what}", fontsize=11,
                    y=1 - 0.10 * inch, va="top")
    paired = len(plan) and plan.pair.max() >= 0
    handles = [Line2D([], [], color=color, linewidth=2,
                      label="view 2 is drawn from" if paired and name == "reference" else name)
               for name, color in COLORS.items()
               if len(plan) and (getattr(plan, f"{name}_box")[:, 2:].any()
                                 or paired and name == "reference")]
    if handles:
        figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False,
                      fontsize=9, bbox_to_anchor=(0.5, 1 - 0.26 * inch))


if __name__ == "__main__":
    no_program("jax_cl_bd --config=FILE --workdir=DIR --stages=poison")
