"""The section of a report on defenses: verdict, pictures, and the repaired encoder."""

from jax_cl_bd.reporting import figures, html, vetting
from jax_cl_bd.reporting.html import Picture, percent
from jax_cl_bd.reporting.read import Run, probes
from jax_cl_bd.reporting.tables import flat, heading, rates_table


def section(run: Run, pictures: list[Picture]) -> str:
    """Each defense: its verdict, and the repaired encoder beside the one that it was given."""
    if not run.defenses:
        return html.section("Defenses", html.paragraph("No defense was run.", "note"))
    parts = []
    for name, found in run.defenses.items():
        if vetting.of(found):  # has a section of its own
            continue
        parts.append(f"<h3>{html.text(name)}</h3>")
        known = [(k.replace("_", " "), f"{v:.4g}" if isinstance(v, float) else v)
                 for k, v in flat(found.get("verdict", {}))]
        if found.get("seconds") is not None:
            known.append(("seconds", f"{found['seconds']:,.0f}"))
        parts.append(html.pairs(known))
        shown = [Picture(f"{name}_{stem}", png, caption, caption)
                 for stem, (png, caption) in run.shown.get(name, {}).items()]
        if "front" in found:
            shown.append(_front(name, found["front"]))
            parts.append(lowest(found["front"]))
        pictures.extend(shown)
        parts.append(html.figures(shown))
        twin = found.get("control", {})
        for probe, row in probes(found).items():
            rows = {"victim": run.results.get("victim", {}).get(probe), "repaired": row,
                    "control": run.results.get("control", {}).get(probe),
                    "twin": twin.get(probe)}
            names = {"repaired": f"victim after {name}", "twin": f"control after {name}"}
            rows = {label: r for label, r in rows.items() if r}
            parts += [html.paragraph(heading(probe, {"": row}), "note"), rates_table(rows, names)]
        if not twin:
            parts.append(html.paragraph("The defense was not run on a control.", "note"))
    return html.section("Defenses", *parts)


def _front(name: str, front: dict) -> Picture:
    """All points of a repair, and the defender's choice among them."""
    chosen = next(p for p in front["points"] if p["chosen"])
    start = front["start"]
    return Picture(
        f"{name}_front", figures.front(front),
        f"Clean accuracy against attack success rate of {len(front['points'])} points; the "
        f"suspect {html.number(start['clean_accuracy'])} % and "
        f"{html.number(start['attack_success_rate'])} %, the choice "
        f"{html.number(chosen['clean_accuracy'])} % and "
        f"{html.number(chosen['attack_success_rate'])} %.",
        f"What {name} gives at each learning rate, after each part of its steps. The defender's "
        "choice is the strongest point that its own validation images allow, made without "
        "knowledge of the attack.")


def lowest(front: dict) -> str:
    """The lowest attack success within a loss of clean accuracy, beside the defender's choice."""
    chosen = next(p for p in front["points"] if p["chosen"])
    rows = [("defender's choice", chosen)]
    rows += [(f"lowest that loses at most {100 * float(loss):g} % of clean accuracy", point)
             for loss, point in front["lowest"].items()]
    return html.table(
        ["point", "learning rate", "step", "clean accuracy", "attack success rate"],
        [[label, f"{p['rate']:g}" if "rate" in p else "suspect as it is", p.get("step", "–"),
          percent(p["clean_accuracy"]), percent(p["attack_success_rate"])]
         if p else [label, *"––––"] for label, p in rows])
