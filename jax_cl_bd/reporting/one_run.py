"""The report of one run folder, section by section."""

import numpy as np

from jax_cl_bd import run_folder
from jax_cl_bd.reporting import defenses, figures, html, image_text, training, vetting, words
from jax_cl_bd.reporting.html import Picture, percent
from jax_cl_bd.reporting.pairs import pair_probability
from jax_cl_bd.reporting.read import Run, probes
from jax_cl_bd.reporting.tables import differences_table, flat, heading, rates_table

MEANING = ("Rates are shares of the test images; below each, its 95 % Wilson interval. Accuracies "
           "count all classes, the other rates only images of other classes than the target, taken "
           "for the target. Excess is the attack success rate minus the largest of occlusion rate, "
           "wrong trigger rate and the control's attack success rate. The interval of the excess, "
           "and of differences of two encoders, is Newcombe's.")


def build(run: Run, command: str | None) -> tuple[str, list[Picture]]:
    """Gives the page and its pictures."""
    pictures: list[Picture] = []
    if vetted := vetting.section(run, pictures):  # no benchmark: nothing is known of an attack
        title = f"Vetting of {run.cfg.victim or run.cfg.data.name}"
        shown = [f"<h1>{html.text(title)}</h1>", vetted]
        if not run.cfg.victim:
            shown.append(training.section(run, pictures))
        return html.page(title, [*shown, about(run, command)]), pictures
    sections = [f"<h1>{html.text(words.title(run))}</h1>", html.paragraph(words.what(run), "what"),
                html.paragraph(words.headline(run), "headline"), tiles(run),
                poison(run, pictures), training.section(run, pictures), measured(run, pictures),
                image_text.measures(run), image_text.section(run), features(run, pictures),
                defenses.section(run, pictures), about(run, command)]
    return html.page(words.title(run), list(filter(None, sections))), pictures


def tiles(run: Run) -> str:
    """The four figures to see first."""
    found = words.protocol_row(run)
    if found is None:
        return ""
    probe, row = found
    control = run.results.get("control", {}).get(probe, {})
    shown = [("clean accuracy", row, "clean_accuracy"),
             ("attack success rate", row, "attack_success_rate"),
             ("excess", row, "excess"),
             ("control's attack success rate", control, "attack_success_rate")]
    figures_ = [(name, number_of(values, key)) for name, values, key in shown
                if values.get(key) is not None]
    out = "".join(f'<div class="tile"><span>{name}</span><b>{value}</b></div>'
                  for name, value in [*figures_, *image_text.tiles(run)])
    return f'<div class="tiles">{out}</div>'


def number_of(row: dict, key: str) -> str:
    """A figure without its interval."""
    return percent(row[key], signed=key == "excess")


def poison(run: Run, pictures: list[Picture]) -> str:
    """What was put into the data: counts, preview, layout and its pair probability."""
    s = run.summary
    if s is None and run_folder.from_elsewhere(run.cfg):
        return html.section("Poison", html.paragraph(
            "Nothing is known of how this encoder was made: no plan, no control.", "note"))
    if s is None:
        return html.section("Poison", html.paragraph("The poison stage has not run.", "note"))
    if not s["poisons"]:
        return html.section("Poison", html.paragraph("No image is poisoned.", "note"))
    parts = [html.paragraph(
        f"{s['poisons']:,} poisons: {s['added']:,} added, {s['replaced']:,} in the place of the "
        f"original, {s['removed']:,} further images taken out; {s['rows']:,} rows in all. "
        f"{trigger_words(s['trigger'])}")]
    if run.preview is not None:
        captioned = run.plan is not None and any(run.plan.caption)
        below = ", each under its caption" if captioned else ""
        picture = Picture("preview", run.preview, "Grid of poisoned training images with outlines "
                          f"of reference, shadow and trigger{below}.",
                          f"Poisons as stored, before any augmentation{below}.")
        pictures.append(picture)
        parts += [html.figure(picture), image_text.captions(run)]
    parts.append(image_text.learned_trigger(run, pictures))
    if not run.image_text:  # a layout is made for two views of one image
        parts.append(layout(run, pictures))
    return html.section("Poison", *parts)


def trigger_words(trigger: dict) -> str:
    """The trigger in a sentence."""
    if trigger["name"] == "none":
        return "There is no trigger."
    return f"The trigger is {words.trigger_phrase(trigger)}."


def layout(run: Run, pictures: list[Picture]) -> str:
    """The layout drawn, and how often random crops turn a poison into the wanted pair."""
    plan = run.plan
    composites = np.flatnonzero(plan.layout >= 0) if plan is not None else []
    if not len(composites):
        return html.paragraph("These poisons have no layout of parts, so no pair probability is "
                              "predicted.", "note")
    first = composites[0]
    boxes = {name: getattr(plan, f"{name}_box")[first]
             for name in ("reference", "shadow", "trigger")}
    mean, low, high = pair_probability(run.cfg, plan)
    height, width = plan.canvas[first]
    picture = Picture(
        "layout", figures.layout(plan.canvas[first], boxes),
        f"Poison of {width} by {height} pixels: reference part, shadow part and trigger to scale.",
        f"The first poison's layout, {width} × {height} px, to scale.")
    pictures.append(picture)
    per_epoch = mean * len(composites)
    spread = "" if high - low < 5e-5 else f" (over the layouts used: {low:.4f} to {high:.4f})"
    said = (f"Predicted pair probability: {mean:.4f}{spread}. That is the chance that, of the two "
            "random crops of a poison, one shows the whole trigger and nothing but the shadow "
            "part, the other nothing but the reference part: about "
            f"{per_epoch:.1f} such pairs in every epoch. Computed from the crop law, not "
            "measured.")
    return html.figures([picture]) + html.paragraph(said)


def measured(run: Run, pictures: list[Picture]) -> str:
    """A table for each probe and placement of the trigger."""
    encoders = run.encoders
    if not encoders:
        return html.section("Measured", html.paragraph("The evaluate stage has not run.", "note"))
    names = list(dict.fromkeys(name for rows in encoders.values() for name in probes(rows)))
    if not names:  # data without labels
        return ""
    parts = [html.paragraph(MEANING, "note")]
    parts.append(html.paragraph(
        words.control(run) if "control" in encoders else "No control was trained: the excess is "
        "taken over occlusion and wrong trigger alone.", "note"))
    for name in names:
        rows = {label: found[name] for label, found in encoders.items() if name in found}
        parts += [f"<h3>{html.text(heading(name, rows))}</h3>"]
        success = {label: row["attack_success_rate"] for label, row in rows.items()
                   if row.get("attack_success_rate") is not None}
        if name == names[0] and success:
            spoken = "; ".join(f"{label} {html.number(v)} %" for label, v in success.items())
            picture = Picture(
                "rates", figures.rates(rows, list(run.defenses)),
                "Share of other classes' test images predicted as the target with the trigger: "
                f"{spoken}.", f"How often other classes are taken for the target "
                f"({words.probe_name(name)}).")
            pictures.append(picture)
            parts.append(html.figure(picture))
        parts += [rates_table(rows), differences_table(rows)]
        parts.append(image_text.top(rows, first=name == names[0]))
    return html.section("Measured", *parts)


def features(run: Run, pictures: list[Picture]) -> str:
    """Where triggered images lie among the clean ones."""
    parts, shown = [], []
    for label, arrays in run.maps.items():
        labels, target = arrays["labels"], int(arrays["target"])
        text = arrays.get("text")
        names = [str(name) for name in arrays.get("classes", ())] or run.classes
        png, share = figures.feature_map(arrays["clean"], arrays["triggered"], labels, target,
                                         text=text, classes=names)
        alt = (f"Features of the {label}'s test images in two dimensions: "
               f"{np.sum(labels == target)} clean images of the target class, "
               f"{np.sum(labels != target)} clean ones of other classes"
               + (", and the latter with the trigger" if len(arrays["triggered"]) else ""))
        caption = (f"{label.capitalize()}: first two principal components of the normalised "
                   f"features ({html.number(share)} % of their variance)")
        if text is not None:
            alt += f"; with the text embeddings of {len(text)} classes"
            caption += ", images and class texts in the shared space"
        shown.append(Picture(f"map_{label}", png, f"{alt}.", f"{caption}."))
    pictures.extend(shown)
    parts.append(html.figures(shown))
    if any("text" in arrays for arrays in run.maps.values()):
        parts.append(html.paragraph(
            "Images and texts of such a model lie in two separate cones (the modality gap), so "
            "each is centred by its own mean before the joint projection, and both weigh the same "
            "in it. Directions can be compared, the distance of an image to a text cannot.",
            "note"))
    rows = {label: found["alignment"] for label, found in run.encoders.items()
            if found.get("alignment")}
    if rows:
        parts += [html.paragraph(
            "Reference alignment is a feature's component along the target class, noise norm what "
            "is left across it, in units of the mean norm of clean features; mean ± deviation "
            "over images of other classes. A spread ratio below 1 says that the trigger "
            "overwrites what tells images apart.", "note"), alignment_table(rows)]
    if not any(parts):
        return ""
    return html.section("Features", *parts)


def alignment_table(rows: dict[str, dict]) -> str:
    """Alignment figures, triggered beside clean."""
    def cell(row, name):
        return f"{row[name]:.3f} ± {row[f'{name}_std']:.3f}".replace("-", "\N{MINUS SIGN}")

    header = ["encoder", "reference alignment, triggered", "reference alignment, clean",
              "noise norm, triggered", "noise norm, clean", "spread ratio"]
    return html.table(header, [
        [words.name_of(label), cell(r, "reference_alignment"),
         cell(r, "clean_reference_alignment"), cell(r, "noise_norm"), cell(r, "clean_noise_norm"),
         f"{r['spread_ratio']:.3f}"] for label, r in rows.items()])


def about(run: Run, command: str | None) -> str:
    """What it takes to run this again."""
    parts = []
    facts = (run.results or {}).get("run", {})
    rows = [("config hash", facts.get("config_hash", "")), ("seed", run.cfg.seed),
            ("devices", ", ".join(map(str, facts.get("devices", ())))),
            ("images per second", f"{facts['images_per_second']:,.0f}"
             if facts.get("images_per_second") else ""),
            ("seconds of evaluation", facts.get("seconds", "")),
            ("finished", facts.get("finished", "")),
            ("versions", ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items()))]
    parts.append(html.pairs([(k, v) for k, v in rows if v != ""]))
    if command:
        parts.append(f"<pre>{html.text(command)}</pre>")
    settings = html.pairs(flat(run.cfg.to_dict()))
    parts.append(f"<details><summary>All settings (config.json)</summary>{settings}</details>")
    return html.section("This run", *parts)
