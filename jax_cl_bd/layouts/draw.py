"""Draws a layout to scale."""

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jax_cl_bd.layouts.pair_probability import Layout

REFERENCE, SHADOW, TRIGGER, INK = "#2f6fb0", "#c9a227", "#b5332e", "#222222"


def layout_figure(layout: Layout, pair_probability: float, *, error_bound: float | None = None,
                  names=("reference", "shadow"), note: str = "") -> Figure:
    """A figure of canvas, parts and trigger, the pair's probability in its title.

    Args:
        layout: lengths in any unit, one layout.
        error_bound: of `solve.Solution`; a numerical error, so the title calls it that.
        names: what the two parts are called; note: a second line of the title.
    """
    height, width = (float(side) for side in layout.canvas)
    longest = max(height, width)
    figure = Figure(figsize=(1.6 + 6 * width / longest, 1.6 + 6 * height / longest), dpi=120,
                    layout="constrained")
    axes = figure.add_subplot()
    axes.add_patch(Rectangle((0, 0), width, height, facecolor="#f2f2f2", edgecolor=INK, lw=2.5,
                             zorder=4, fill=False))
    axes.add_patch(Rectangle((0, 0), width, height, facecolor="#f2f2f2", zorder=0))
    for box, name, colour in ((layout.reference_box, names[0], REFERENCE),
                              (layout.shadow_box, names[1], SHADOW)):
        draw_part(axes, box, name, colour)
    draw_trigger(axes, layout)
    edges = [layout.reference_box, layout.shadow_box, layout.trigger_box]
    axes.set_xticks(ticks(width, [v for b in edges for v in (b[1], b[1] + b[3])], longest))
    axes.set_yticks(ticks(height, [v for b in edges for v in (b[0], b[0] + b[2])], longest))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.tick_params(labelsize=8)
    margin = 0.02 * longest
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), aspect="equal")
    axes.spines[:].set_visible(False)
    title = f"pair probability {pair_probability:.4g}"
    title += f" (numerical error about {error_bound:.1g})" if error_bound else ""
    title += f", canvas {height:.4g} x {width:.4g} (h x w)"
    figure.suptitle(title + (f"\n{note}" if note else ""), fontsize=10, color=INK)
    return figure


def draw_part(axes, box, name: str, colour: str) -> None:
    y, x, h, w = (float(value) for value in box)
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, alpha=0.28, zorder=1))
    axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, lw=1.8, zorder=2))
    axes.text(x + w / 2, y + 0.09 * h, f"{name}\n{h:.4g} x {w:.4g}", ha="center", va="center",
              fontsize=9, color=INK, zorder=5)


def draw_trigger(axes, layout: Layout) -> None:
    y, x, h, w = (float(value) for value in layout.trigger_box)
    axes.add_patch(Rectangle((x, y), w, h, facecolor=TRIGGER, alpha=0.85, zorder=3))
    below = 0.02 * float(max(layout.canvas))
    axes.text(x + w / 2, y + h + below, f"trigger {h:.3g} x {w:.3g}", ha="center", va="top",
              fontsize=8, color=TRIGGER, zorder=5)


def ticks(side: float, edges, longest: float) -> list[float]:
    """The boxes' edges as ticks, without those that would overlap an earlier one."""
    chosen = [0.0, side]
    for edge in edges:
        if all(abs(edge - other) > 0.055 * longest for other in chosen):
            chosen.append(float(edge))
    return sorted(chosen)
