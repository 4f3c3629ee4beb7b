"""What a vetting says, in the terminal and in the report."""

from jax_cl_bd.reporting import html
from jax_cl_bd.reporting.read import Run


def of(row: dict) -> bool:
    """Whether a row of results.json under `defenses` is a vetting's."""
    return "not_checked" in row.get("verdict", {})


def text(name: str, row: dict) -> str:
    """A vetting in lines: the answer, what was found, the suspects, what was not checked."""
    verdict = row["verdict"]
    lines = [f"{name}: {answer(verdict)}", *(f"  {says(f)}" for f in verdict["findings"])]
    for place, suspect in enumerate(verdict.get("suspects", ()), 1):
        lines.append(f"  suspect {place}: {described(suspect)}")
    lines += [f"  {basis(verdict)}", "  not checked:"]
    return "\n".join(lines + [f"    - {what}" for what in verdict["not_checked"]])


def answer(verdict: dict) -> str:
    """The verdict in a word, with how many detectors say so."""
    many = len(verdict["findings"])
    found = sum(f["suspicious"] for f in verdict["findings"])
    if verdict["suspicious"]:
        return f"SUSPICIOUS, by {found} of {many} detectors"
    return f"nothing suspicious found by {many} detector{'s' * (many != 1)}, which proves nothing"


def basis(verdict: dict) -> str:
    """What the thresholds rest on."""
    if "clean_rows" in verdict:
        return (f"{verdict['rows']:,} rows; thresholds flag {100 * verdict['false_alarm']:g} % of "
                f"the {verdict['clean_rows']:,} rows of {verdict['clean_rows_from']}")
    if not verdict["calibrated"]:
        return "NOT CALIBRATED: no known clean encoders, so thresholds have no known false alarms"
    rate, least = verdict["false_alarm"], verdict["smallest_false_alarm"]
    many = verdict["clean_encoders"]
    few = ""
    if least > rate:
        law = f" {100 * rate:g} % holds if clean scores are normal;" if many > 1 else ""
        few = f";{law} {round(1 / rate) - 1} clean encoders would do without that"
    return (f"thresholds from {many} known clean encoder{'s' * (many > 1)}, for false alarms of "
            f"{100 * rate:g} % of each detector; so many are sure of {100 * least:.3g} %{few}")


def says(finding: dict) -> str:
    """One detector's finding, in a line."""
    mark = "SUSPICIOUS" if finding["suspicious"] else "ok"
    if "p" in finding:
        what = f"; {finding['says']}" if "says" in finding else ""
        return (f"{finding['detector']}: {mark}; {finding['flagged']:,} rows flagged, clean data "
                f"would have about {finding['expected']:,} (p = {finding['p']:.2g}){what}")
    clean = ", ".join(f"{score:.4f}" for score in finding["clean_scores"])
    limit = "the detector's default"
    if finding["calibrated"]:
        by = {"ranks": "by rank", "normal": "by a normal law"}[finding["threshold_by"]]
        limit = f"{by} from clean encoders: {clean}"
    return (f"{finding['detector']}: {mark}; score {finding['score']:.4f}, threshold "
            f"{finding['threshold']:.4f} ({limit}); {finding['says']}")


def described(suspect: dict) -> str:
    """A suspected row: where it is, its captions, and its rank by each score."""
    ranks = ", ".join(f"{name} {rank + 1}" for name, rank in suspect["ranks"].items())
    file = f", {suspect['file']}" if "file" in suspect else ""
    texts = "".join(f", {caption!r}" for caption in suspect.get("captions", ())[:1])
    return f"row {suspect['row']}{file}{texts} (rank by {ranks})"


def verdict_parts(row: dict) -> list[str]:
    """The same as pieces of a page, without the pictures."""
    verdict = row["verdict"]
    parts = [html.paragraph(f"{answer(verdict)[0].upper()}{answer(verdict)[1:]}.", "headline"),
             html.paragraph(f"{basis(verdict)[0].upper()}{basis(verdict)[1:]}.", "note")]
    parts.append(html.pairs([(f["detector"], says(f).partition(": ")[2])
                             for f in verdict["findings"]]))
    if verdict.get("suspects"):
        parts.append(html.pairs([(f"suspect {place}", described(suspect))
                                 for place, suspect in enumerate(verdict["suspects"], 1)]))
    items = "".join(f"<li>{html.text(what)}</li>" for what in verdict["not_checked"])
    return [*parts, html.paragraph("Not checked:"), f"<ul>{items}</ul>"]


def section(run: Run, pictures: list[html.Picture]) -> str:
    """Every vetting of a run folder, with its pictures."""
    parts = []
    for name, row in run.defenses.items():
        if not of(row):
            continue
        shown = [html.Picture(f"{name}_{stem}", png, caption, caption)
                 for stem, (png, caption) in run.shown.get(name, {}).items()]
        pictures.extend(shown)
        parts += [f"<h3>{html.text(name)}</h3>", *verdict_parts(row), html.figures(shown)]
        if row.get("seconds") is not None:
            parts.append(html.paragraph(f"{row['seconds']:,.0f} seconds.", "note"))
    return html.section("Vetting", *parts) if parts else ""
