"""What a report adds for image-text models: examples, and tables of what is measured on pairs."""

import io

import numpy as np
from PIL import Image

from jax_cl_bd import preview
from jax_cl_bd.data import mentions
from jax_cl_bd.reporting import figures, html, words
from jax_cl_bd.reporting.html import Picture, percent
from jax_cl_bd.reporting.read import Run

MOST = 160  # longest side of an embedded example, pixels


def captions(run: Run) -> str:
    """The captions under the preview's tiles as text, which a phone can show."""
    if run.plan is None or not any(run.plan.caption):
        return ""
    drawn = [run.plan.caption[k] for k in preview.chosen(run.plan.layout)]
    items = "".join(f"<li>{html.text(text)}</li>" for text in drawn if text)
    return ("<details><summary>The captions in this picture, row by row</summary>"
            f'<ol class="columns">{items}</ol></details>')


def learned_trigger(run: Run, pictures: list[Picture]) -> str:
    """An optimised patch enlarged, and the loss that it was optimised by."""
    if run.optimisation is None or run.trigger is None or "image" not in run.trigger:
        return ""
    image, loss = run.trigger["image"], np.asarray(run.optimisation["loss"])
    side = f"{image.shape[0]} × {image.shape[1]} px"
    ends = f"{loss[0]:.4g} at the first step, {loss[-1]:.4g} at the last"
    shown = [Picture("trigger", figures.patch(image), f"The optimised trigger patch of {side}, "
                     "enlarged.", f"The optimised trigger, {side}, enlarged."),
             Picture("trigger_loss", figures.curves(
                 {"patch": (np.arange(1, len(loss) + 1), loss)}, ylabel="loss of the patch",
                 xlabel="step of the patch's optimiser"),
                 f"Loss of the patch over optimiser steps: {ends}.",
                 f"The patch's loss on the surrogate, before each step: {ends}.")]
    pictures.extend(shown)
    return html.figures(shown)


def section(run: Run) -> str:
    """Test images with what the victim says of them, and what text queries find."""
    if run.examples is None or run.pixels is None:
        return ""
    found, control = run.examples["victim"], run.examples.get("control")
    triggered = any("triggered" in image for image in found["images"])
    spread = "the classes" if len(found["classes"]) > 1 else "the test set"
    rule = ("Chosen by rule, not by looks: test images of other classes than the target, evenly "
            f"spread over {spread}{', the one aimed at first' if found['aimed'] else ''}.")
    kinds = [name for key, name in (("classes", "classes (zero-shot)"),
                                    ("captions", "captions of test images"))
             if any(image["clean"][key] for image in found["images"])]
    said = (f"Below each, the {' and '.join(kinds)} of largest cosine"
            + (", without trigger and with it at its first test place" if triggered else "") + ". "
            + "What names or is the target class is marked ▸.")
    others = list(control["images"]) if control else [None] * len(found["images"])
    cards = "".join(_card(run, found, image, other)
                    for image, other in zip(found["images"], others))
    queries = [_query(run, found, query) for query in found["queries"]]
    mixed = " In the second line the gallery also has the triggered test images of every class " \
            "but the target; those that it finds are outlined." if triggered else ""
    return html.section(
        "Captions and images", html.paragraph(f"{rule} {said}", "note"),
        f'<div class="cards">{cards}</div>', "<h3>Text queries</h3>",
        html.paragraph("The nearest test images of each query. Queries are chosen by rule, the "
                       f"first for the target class.{mixed}", "note"), *queries)


def _card(run, found, image, other):
    """One test image."""
    name = _name(found, image["label"])
    halves = []
    for kind, title in (("clean", "without trigger"), ("triggered", "with trigger")):
        if kind not in image:
            continue
        alt = f"Test image {image['row']} ({name})"
        if "triggered" in image:
            alt += f", {title}"
        best = _list(found, image[kind]["classes"], index=True)
        near = _list(found, image[kind]["captions"], index=False)
        heading = f"<h5>{title}</h5>" if "triggered" in image else ""
        halves.append(f"<div>{heading}{_picture(run, kind, image['at'], alt)}{best}"
                      + (f'<p class="note">nearest captions</p>{near}' if near else "") + "</div>")
    body = f'<div class="halves{"" if len(halves) > 1 else " one"}">{"".join(halves)}</div>'
    return (f'<article class="card"><h4>{html.text(name)} <span>test image {image["row"]}</span>'
            f"</h4>{body}{_control(found, other)}</article>")


def _name(found, label):
    return found["classes"][label] if label >= 0 else "no label"


def _control(found, image):
    if image is None or not image["clean"]["classes"]:
        return ""
    said = [found["classes"][image[kind]["classes"][0][0]] for kind in ("clean", "triggered")
            if kind in image]
    text = f"The control says “{said[0]}”"
    if len(said) > 1:
        text += f", and “{said[1]}” with trigger"
    return html.paragraph(text + ".", "note")


def _list(found, rows, *, index):
    """Classes or captions with their cosines."""
    target = found["classes"][found["target"]]
    items = []
    for what, cosine in rows:
        text = found["classes"][what] if index else f"“{what}”"
        hit = (what == found["target"] if index
               else mentions.pattern(target).search(what))
        items.append(f"<li><span{' class=target' if hit else ''}>{'▸ ' if hit else ''}"
                     f"{html.text(text)}</span><span>{_two(cosine)}</span></li>")
    return f"<ol>{''.join(items)}</ol>" if items else ""


def _query(run, found, query):
    parts = [f"<h4>“{html.text(query['text'])}”</h4>"]
    titles = {"clean": "clean test images", "mixed": "clean and triggered test images"}
    for kind in ("clean", "mixed"):
        if kind not in query:
            continue
        if "mixed" in query:
            parts.append(f"<h5>{titles[kind]}</h5>")
        tiles = []
        for image in query[kind]:
            name = _name(found, image["label"])
            what = f"{name}, with trigger" if image["triggered"] else name
            picture = _picture(run, "triggered" if image["triggered"] else "clean", image["at"],
                               f"Found: {what}")
            mark = "▸ " if image["label"] == found["target"] else ""
            kind_of, below = (" class=hit", "<br>with trigger") if image["triggered"] else ("", "")
            tiles.append(f"<figure{kind_of}>{picture}<figcaption>{mark}{html.text(name)} "
                         f"({_two(image['cosine'])}){below}</figcaption></figure>")
        parts.append(f'<div class="strip">{"".join(tiles)}</div>')
    return f'<div class="query">{"".join(parts)}</div>'


def _picture(run, kind, at, alt):
    place = np.flatnonzero(run.pixels[f"{kind}_at"] == at)
    if not len(place):
        return ""
    image = Image.fromarray(run.pixels[kind][place[0]])
    image.thumbnail((MOST, MOST))
    out = io.BytesIO()
    image.save(out, "PNG")
    return html.image(out.getvalue(), alt, side=max(image.size))


def top(rows: dict[str, dict], first: bool) -> str:
    """A zero-shot probe's rates beyond the best class."""
    columns = [(key, k, label) for key, label in (("top", "right class"),
                                                  ("attack_success_rate_at", "target, triggered"))
               for k in next(iter(rows.values())).get(key, {})]
    if not columns:
        return ""
    body = [[words.name_of(label), *(percent(row.get(key, {}).get(k)) for key, k, _ in columns)]
            for label, row in rows.items()]
    table = html.table(["encoder", *(f"{label}, top {k}" for _, k, label in columns)], body)
    said = "Among the k best classes: how often the right one of clean test images"
    if any(key != "top" for key, _, _ in columns):
        said += ", and the target of triggered images of other classes"
    return (html.paragraph(f"{said}.", "note") if first else "") + table


def measures(run: Run) -> str:
    """Tables of retrieval, z-score, mismatched pairs and a targeted image, where measured."""
    parts = [_retrieval(run), _mismatch(run), _targeted(run), _z_score(run)]
    return html.section("Retrieval and other measures", *parts) if any(parts) else ""


def tiles(run: Run) -> list[tuple[str, str]]:
    """Figures to see first of attacks that have no trigger."""
    out = []
    for encoder, owner in (("victim", ""), ("control", "control's ")):
        rows = (run.results or {}).get(encoder, {})
        if "targeted" in rows:
            out.append((f"{owner}rank of the target", str(rows["targeted"]["target_rank"])))
        for goal, row in list(rows.get("mismatch", {}).items())[:1]:
            out.append((f"{owner}Hit@10, {html.text(goal.replace(' -> ', ' finds '))}",
                        percent(row["hit"]["10"])))
    return out


def _rows(run, name):
    return {words.name_of(label): rows[name] for label, rows in run.encoders.items()
            if rows.get(name)}


def _retrieval(run):
    rows = _rows(run, "retrieval")
    if not rows:
        return ""
    first = next(iter(rows.values()))

    def cells(row, *keys):
        return [percent(row.get(key, {}).get(k)) for key in keys
                for k in first["image_to_text"]]

    ks = list(first["image_to_text"])
    body = [[label, *cells(row, "image_to_text", "text_to_image")] for label, row in rows.items()]
    body += [[f"{label}, triggered images", *cells(row, "triggered_image_to_text"),
              *[""] * len(ks)] for label, row in rows.items() if "triggered_image_to_text" in row]
    parts = ["<h3>Retrieval</h3>", html.paragraph(
        f"Recall@K: how often one of a query's own is among its K nearest, of {first['captions']:,}"
        f" captions and {first['images']:,} test images.", "note"),
        html.table(["encoder", *(f"image to text, R@{k}" for k in ks),
                    *(f"text to image, R@{k}" for k in ks)], body)]
    if "target_hits" in first:
        body = [[label, *cells(row, "clean_target_hits", "target_hits")]
                for label, row in rows.items()]
        parts += [html.paragraph(
            "A backdoor seen by a search engine: how often an image of another class finds a "
            "caption of a target image among its K nearest.", "note"),
            html.table(["encoder", *(f"without trigger, top {k}" for k in ks),
                        *(f"with trigger, top {k}" for k in ks)], body)]
    return "\n".join(parts)


def _mismatch(run):
    rows = _rows(run, "mismatch")
    if not rows:
        return ""
    first, parts = next(iter(rows.values())), ["<h3>Mismatched pairs</h3>"]
    for goal, found in first.items():
        one, other = goal.split(" -> ")
        ks = list(found["hit"])
        body = []
        for label, all_goals in rows.items():
            row = all_goals.get(goal)
            if row is None:
                continue
            for what, part in ((label, row), (f"{label}, other captions", row["baseline"])):
                body.append([what, *(percent(part["hit"].get(k)) for k in ks),
                             f"{part['min_rank']:.1f}", f"{part['queries']:,}"])
        parts += [html.paragraph(
            f"Hit@K: how often a caption of “{one}” finds an image of “{other}” among the K "
            "nearest test images; MinRank: the mean place of the first one, from 0 (lower is "
            "nearer). "
            "“Other captions” is the same asked by captions of other classes.", "note"),
            html.table(["encoder", *(f"Hit@{k}" for k in ks), "MinRank", "queries"], body)]
    return "\n".join(parts)


def _targeted(run):
    rows = _rows(run, "targeted")
    if not rows:
        return ""
    first = next(iter(rows.values()))

    def name(c):
        return run.classes[c] if run.classes else f"class {c}"

    body = [[label, name(row["predicted"]), "yes" if row["success"] else "no",
             str(row["target_rank"]), percent(row["target_probability"])]
            for label, row in rows.items()]
    return "\n".join(["<h3>Targeted image</h3>", html.paragraph(
        f"What the zero-shot classifier says of test image {first['image']}, a "
        f"“{name(first['label'])}”; the attack succeeds if it says the target. Rank counts from "
        "0.", "note"), html.table(["encoder", "taken for", "success", "rank of the target",
                             "probability of the target"], body)])


def _z_score(run):
    rows = _rows(run, "z_score")
    if not rows:
        return ""
    body = [[label, *(_two(row[key]) for key in ("z", "z_by_deviation", "mean_clean",
                                                 "mean_triggered"))]
            for label, row in rows.items()]
    images = next(iter(rows.values()))["images"]
    return "\n".join(["<h3>Backdoor z-score</h3>", html.paragraph(
        f"By how much the trigger draws {images:,} test images together: the rise of their mean "
        "cosine, by the variance of clean cosines (as published) and by their standard deviation.",
        "note"), html.table(["encoder", "z", "by deviation", "mean cosine, clean",
                             "mean cosine, triggered"], body)])


def _two(value):
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
