"""The pictures of a report. Colours are of Okabe and Ito's palette, safe for colour-blind eyes."""

import io
import textwrap

import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jax_cl_bd.reporting.read import OF_CONTROL

COLORS = {"victim": "#D55E00", "control": "#0072B2", "untrained": "#8A8F94"}
DEFENSE_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of several repairs: beside victim and control, whose two colours are not among them.
FRONT_COLORS = (*DEFENSE_COLORS, "#7F3C8D", "#8A6D1D", "#1c2126")
FRONT_MARKERS = ("o", "^", "D")
FAR = 0.12  # clean accuracy below the suspect's from which a repair's points are not drawn
MARKERS = {"victim": "o", "control": "s"}
INK, SOFT = "#1c2126", "#5d6770"
MOST_LABELS = 24  # class names that a map has room for


def color_of(label: str, defenses: list[str]) -> str:
    """The colour of an encoder; a defense has one, of the victim or of the control."""
    label = label.removesuffix(OF_CONTROL)
    if label in COLORS:
        return COLORS[label]
    return DEFENSE_COLORS[defenses.index(label) % len(DEFENSE_COLORS)]


def curves(series: dict[str, tuple[np.ndarray, np.ndarray]], *, ylabel: str, rate: bool = False,
           xlabel: str = "training step", clean: dict | None = None,
           level: tuple[str, float] | None = None) -> bytes:
    """Lines over steps, one per encoder; rates are drawn in percent.

    `clean` holds the same figure of the images without trigger, drawn dashed in the encoder's
    colour; `level` names a value to compare with, drawn dashed in grey.
    """
    figure, axis = _blank(5.2, 3.4)
    for name, (steps, values) in series.items():
        color, few = COLORS.get(name, INK), len(steps) <= 40
        marker = MARKERS.get(name, "o") if few else None
        axis.plot(steps, 100 * np.asarray(values) if rate else values, color=color, marker=marker,
                  markersize=3.5, linewidth=1.8 if len(steps) <= 500 else 0.8,
                  label=f"{name}, triggered" if clean else name)
        if clean and name in clean:
            axis.plot(*clean[name], "--", color=color, linewidth=1.3, label=f"{name}, no trigger")
    if level is not None:
        axis.axhline(level[1], linestyle="--", color=SOFT, linewidth=1.3, label=level[0])
    if rate:
        axis.set_ylim(-3, 103)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    figure.legend(loc="outside upper center", ncols=2 if clean else 3, frameon=False, fontsize=9)
    return _png(figure)


def rates(rows: dict[str, dict], defenses: list[str]) -> bytes:
    """What share of the other classes' test images goes to the target, per encoder and patch."""
    marks = (("attack_success_rate", "trigger", "o", True),
             ("wrong_trigger_rate", "another trigger", "s", False),
             ("occlusion_rate", "grey patch", "D", False),
             ("clean_target_rate", "no patch", "|", True))
    figure, axis = _blank(6.0, 0.95 + 0.6 * len(rows))
    for i, (label, row) in enumerate(rows.items()):
        color = color_of(label, defenses)
        for j, (name, _, marker, filled) in enumerate(marks):
            if row.get(name) is None:
                continue
            low, high = row["intervals"][name]
            y = -i + 0.27 - 0.18 * j
            axis.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.2, alpha=0.55)
            axis.plot(100 * row[name], y, marker, color=color, markersize=7 if j == 0 else 5.5,
                      markerfacecolor=color if filled else "white", markeredgewidth=1.5)
    for _, label, marker, filled in marks:
        axis.plot([], [], marker, color=INK, markerfacecolor=INK if filled else "white",
                  label=label, linestyle="none", markersize=6)
    axis.set_yticks(-np.arange(len(rows)), list(rows))
    axis.tick_params(axis="y", length=0, labelsize=10)
    axis.set_xlim(-2, 102)
    axis.set_ylim(-len(rows) + 0.45, 0.55)
    axis.set_xlabel("predicted as the target, % (lines: 95 % intervals)")
    axis.grid(axis="x", color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  frameon=False, fontsize=9, handletextpad=0.2, columnspacing=1.4)
    return _png(figure)


def layout(canvas, boxes: dict[str, np.ndarray]) -> bytes:
    """One poison's parts to scale; canvas (h, w), boxes (y, x, h, w)."""
    height, width = (float(v) for v in canvas)
    figure, axis = _blank(5.2, 3.0)
    axis.axis("off")
    paint = {"reference": "#009E73", "shadow": "#0072B2", "trigger": "#D55E00"}
    axis.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=INK, linewidth=1))
    for name, (y, x, h, w) in boxes.items():
        axis.add_patch(Rectangle((x, y), w, h, facecolor=paint[name], edgecolor=paint[name],
                                 alpha=0.9 if name == "trigger" else 0.22))
        top = name == "trigger"
        axis.text(x + w / 2, y - 0.02 * height if top else y + 0.07 * height, name,
                  ha="center", va="bottom" if top else "top", fontsize=10, color=INK)
    axis.set_xlim(-0.02 * width, 1.02 * width)
    axis.set_ylim(1.02 * height, -0.02 * height)
    axis.set_aspect("equal")
    return _png(figure)


def feature_map(clean: np.ndarray, triggered: np.ndarray, labels: np.ndarray, target: int, *,
                text: np.ndarray | None = None,
                classes: list[str] | None = None) -> tuple[bytes, float]:
    """PCA of L2-normalised features [N, D]; gives the PNG and the share of variance shown.

    Axes are fitted to clean and triggered images together. Triggered images are those of every
    class but the target; an attack without a trigger has none.

    With class embeddings `text` [C, D] of the same space, images and texts are each centred by
    their own mean, since the two lie in two cones (the modality gap: Liang et al., NeurIPS 2022),
    and weigh the same, whatever their number, in the fit and in the share. `classes` are the names.
    """
    triggered = triggered[labels != target] if len(triggered) else triggered
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            for x in (clean.astype(np.float64), triggered.astype(np.float64))]
    mean = np.concatenate(unit).mean(0)
    fitted = np.concatenate(unit) - mean
    if text is not None:
        text = text.astype(np.float64) - text.mean(0, dtype=np.float64)
        fitted = np.concatenate([fitted, text * np.sqrt(len(fitted) / len(text))])
    _, spread, axes = np.linalg.svd(fitted, full_matrices=False)
    # SVD leaves signs open; the largest entry of an axis is made positive.
    axes = axes[:2] * np.sign(axes[:2][np.arange(len(axes[:2])),
                                       np.abs(axes[:2]).argmax(1)])[:, None]
    flat = [np.pad((x - mean) @ axes.T, ((0, 0), (0, 2 - len(axes)))) for x in unit]
    figure, axis = _blank(5.2, 4.4 if text is None else 4.8)
    groups = ((flat[0][labels != target], "clean, other classes", "#9aa3ab", "o", 9, 0.5),
              (flat[1], "triggered, other classes", "#D55E00", "x", 16, 0.75),
              (flat[0][labels == target], "clean, target class", "#0072B2", "s", 15, 0.9))
    for points, label, color, marker, size, alpha in groups:
        if not len(points):
            continue
        extra = {} if marker == "x" else {"edgecolors": "none"}
        axis.scatter(points[:, 0], points[:, 1], c=color, marker=marker, s=size, alpha=alpha,
                     label=label, linewidths=1, **extra)
    if text is not None:
        _texts(axis, np.pad(text @ axes.T, ((0, 0), (0, 2 - len(axes)))), target,
               classes or [str(c) for c in range(len(text))])
    axis.set_xticks([])
    axis.set_yticks([])
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9.5,
                  handletextpad=0.1, columnspacing=0.9, markerscale=1.4)
    total = np.sum(spread**2)
    return _png(figure), float(np.sum(spread[:2] ** 2) / total) if total > 0 else 1.0


def _texts(axis, places, target, classes):
    """Class embeddings as labelled stars; of very many, the target's label alone."""
    others = np.arange(len(places)) != target
    for chosen, color, label in ((others, INK, "text, other classes"),
                                 (~others, "#009E73", "text, target class")):
        axis.scatter(*places[chosen].T, c=color, marker="*", s=95, label=label, zorder=3,
                     edgecolors="white", linewidths=0.7)
    halo = [patheffects.withStroke(linewidth=2.6, foreground="white")]
    shown = [c for c in range(len(places)) if len(places) <= MOST_LABELS or c == target]
    shown.sort(key=lambda c: c != target)  # the target's label has the first choice of place
    for c, (right, down) in zip(shown, _free_places(axis, places, shown, classes)):
        axis.annotate(classes[c], places[c], xytext=(6 if right else -6, -down), zorder=4,
                      textcoords="offset points", ha="left" if right else "right", va="center",
                      fontsize=8.5, fontweight="bold" if c == target else "normal",
                      color="#00694d" if c == target else INK, path_effects=halo)


def _free_places(axis, places, shown, classes):
    """For each label, whether it stands right of its star and how far below it, in points: the
    first of a few places where it meets no label before it and no star."""
    low, high = (np.array(v) for v in zip(axis.get_xlim(), axis.get_ylim()))
    points = (places - low) / (high - low) * (365, 285)  # about the axis's size
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    for c in shown:
        inwards = points[c, 0] < 182
        options = [(side, down) for down in (0, 10, -10, 20, -20)
                   for side in (inwards, not inwards)]
        width, found = 5.2 * len(classes[c]), None
        for right, down in options:
            x, y = points[c] + ((6 if right else -6 - width), -down)
            box = (x, y - 5, x + width, y + 5)
            free = not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3]
                           for t in taken)
            if free and box[0] > 0 and box[2] < 365:
                found = right, down
                break
        taken.append(box)
        yield found or options[0]


def patch(image: np.ndarray) -> bytes:
    """A trigger's pixels [h, w, 3] in [0, 1], enlarged."""
    figure, axis = _blank(5.2, 3.1)
    axis.imshow(image, interpolation="nearest")
    axis.axis("off")
    return _png(figure)


def front(found: dict) -> bytes:
    """Clean accuracy against attack success of a repair's points: a line per learning rate, the
    suspect as a cross, the defender's choice ringed."""
    figure, axis = _blank(5.2, 3.6)
    rates_of = list(dict.fromkeys(p["rate"] for p in found["points"]))
    for i, rate in enumerate(rates_of):
        own = [p for p in found["points"] if p["rate"] == rate]
        axis.plot([100 * p["attack_success_rate"] for p in own],
                  [100 * p["clean_accuracy"] for p in own], "o-", markersize=4, linewidth=1.2,
                  color=DEFENSE_COLORS[i % len(DEFENSE_COLORS)], label=f"rate {rate:g}")
    chosen = next(p for p in found["points"] if p["chosen"])
    axis.plot(100 * chosen["attack_success_rate"], 100 * chosen["clean_accuracy"], "o",
              markersize=12, markerfacecolor="none", color=INK, label="defender's choice")
    start = found["start"]
    axis.plot(100 * start["attack_success_rate"], 100 * start["clean_accuracy"], "x",
              markersize=9, color=COLORS["victim"], label="suspect")
    axis.set_xlim(-3, 103)
    axis.set_xlabel("attack success rate (%)")
    axis.set_ylabel("clean accuracy (%)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return _png(figure)


def fronts(lines: list[tuple[str, list[dict], list[dict]]], start: dict | None,
           control: dict | None) -> tuple[bytes, int]:
    """Clean accuracy against attack success of several repairs of one victim: (name, points, front)
    each, the front drawn as a line, the defender's choice ringed, suspect and control marked.

    Gives the PNG and how many points lie below what is shown: FAR less clean accuracy than the
    suspect has.
    """
    columns = 1 if max(len(name) for name, _, _ in lines) > 36 else 2
    lines = [(textwrap.fill(name, 84), points, front) for name, points, front in lines]
    rows = -(-(sum(name.count("\n") + 1 for name, _, _ in lines) + 3) // columns)
    figure, axis = _blank(6.4, 4.0 + 0.2 * rows)
    best = start["clean_accuracy"] if start else max(
        p["clean_accuracy"] for _, points, _ in lines for p in points)
    floor, hidden = best - FAR, 0
    marked = [point for point in (start, control) if point]
    for i, (name, points, front) in enumerate(lines):
        color = FRONT_COLORS[i % len(FRONT_COLORS)]
        marker = FRONT_MARKERS[i // len(FRONT_COLORS) % len(FRONT_MARKERS)]
        seen = [p for p in points if p["clean_accuracy"] >= floor]
        hidden, marked = hidden + len(points) - len(seen), marked + seen
        axis.plot(*_at(seen), marker, color=color, markersize=4, alpha=0.45, markeredgewidth=0)
        axis.plot(*_at([p for p in front if p["clean_accuracy"] >= floor]), "-" + marker,
                  color=color, markersize=5, linewidth=1.5, label=name)
        axis.plot(*_at([p for p in seen if p["chosen"]]), "o", markersize=11, color=color,
                  markerfacecolor="none", markeredgewidth=1.6)
    axis.plot([], [], "o", markersize=9, color=INK, markerfacecolor="none",
              label="defender's choice")
    if start:
        axis.plot(*_at([start]), "X", markersize=9, color=COLORS["victim"], label="suspect")
    if control:
        axis.plot(*_at([control]), "s", markersize=7, color=COLORS["control"],
                  label="clean control")
    low = min((p["clean_accuracy"] for p in marked), default=floor)
    high = max((p["clean_accuracy"] for p in marked), default=best)
    axis.set_ylim(100 * low - 1, 100 * high + 1)
    axis.set_xlim(-3, 103)
    axis.grid(color="#e6e9ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("attack success rate, %")
    axis.set_ylabel("clean accuracy, %")
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    return _png(figure), hidden


def _at(points):
    return ([100 * p["attack_success_rate"] for p in points],
            [100 * p["clean_accuracy"] for p in points])


def points(groups: list[tuple[str, dict[str, np.ndarray]]], intervals: dict, defenses: list[str], *,
           xlabel: str) -> bytes:
    """Every run's value with mean and interval: a panel per group, a row per encoder."""
    counts = [len(encoders) for _, encoders in groups]
    figure = Figure(figsize=(6.0, 0.7 + sum(0.55 + 0.34 * n for n in counts)), dpi=170,
                    layout="constrained")
    axes = figure.subplots(len(groups), squeeze=False, sharex=True,
                           height_ratios=[n + 0.6 for n in counts])[:, 0]
    for axis, (title, encoders) in zip(axes, groups):
        _plain(axis)
        for i, (label, values) in enumerate(encoders.items()):
            axis.plot(100 * values, np.full(len(values), -i), "o", alpha=0.6, markersize=6,
                      markeredgewidth=0, color=color_of(label, defenses))
            mean, low, high = intervals[title, label]
            axis.plot(100 * mean, -i, "|", color=INK, markersize=14, markeredgewidth=1.8)
            if low is not None:
                axis.plot([100 * low, 100 * high], [-i, -i], color=INK, linewidth=1)
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.set_yticks(-np.arange(len(encoders)), list(encoders))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(-len(encoders) + 0.4, 0.6)
        axis.grid(axis="x", color="#e6e9ec", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[-1].set_xlim(-3, 103)
    axes[-1].set_xlabel(xlabel)
    return _png(figure)


def _blank(width, height):
    figure = Figure(figsize=(width, height), dpi=170, layout="constrained")
    axis = figure.add_subplot()
    _plain(axis)
    return figure, axis


def _plain(axis):
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b9c0c6")
    axis.tick_params(colors=SOFT, labelsize=9)
    axis.xaxis.label.set_color(SOFT)
    axis.yaxis.label.set_color(SOFT)


def _png(figure):
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
