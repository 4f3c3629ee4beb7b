"""The report of many run folders: a page, a Markdown table and a CSV table."""

import csv
import io

import numpy as np

from jax_cl_bd.reporting import figures, fronts, groups, html, words
from jax_cl_bd.reporting.groups import Statistic
from jax_cl_bd.reporting.html import Picture
from jax_cl_bd.reporting.read import Run

NOTE = ("Mean ± standard deviation over the runs [95 % t-interval], in percent; below, every run. "
        "Runs of one seed with several targets are averaged first, so that the interval is over "
        "seeds; with a single seed it is over targets. Differences are taken within each run "
        "(the control, if it is not another run's, has the same seed) and then summarised. A "
        "difference such as “distill - distill of control” is what a defense leaves of the "
        "attack.")
_NAMES = {"clean_accuracy": "clean accuracy", "triggered_accuracy": "triggered accuracy",
          "attack_success_rate": "attack success rate", "clean_target_rate": "clean target rate",
          "occlusion_rate": "occlusion rate", "wrong_trigger_rate": "wrong trigger rate",
          "excess": "excess"}
Tables = list[tuple[str, list[Run], list[Statistic]]]


def tables(runs: list[Run]) -> Tables:
    """(title, runs, statistics) of every group."""
    return [(title, members, groups.statistics(members)) for title, members in groups.split(runs)]


def markdown(found: Tables, incomplete: list[tuple[str, str]], repairs=()) -> str:
    """The whole as Markdown; `repairs` of fronts.collect."""
    out = []
    for title, runs, stats in found:
        out += [f"### {title}", "", _which(runs), ""]
        for probe in _probes(stats):
            header, body = _grid(stats, probe, _text_cell)
            out += ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
            out += ["| " + " | ".join(row) + " |" for row in body] + [""]
        others = [s for s in stats if not groups.rated(s)]
        if others:
            out += ["| encoder | figure | mean ± deviation [interval] | every run |",
                    "| --- | --- | --- | --- |"]
            out += [f"| {s.encoder} | {_other(s)} | {_plain(s)} | {_points(s)} |" for s in others]
            out += [""]
    if out:
        out += [NOTE, ""]
    if repairs:
        out += [fronts.markdown(repairs)]
    if incomplete:
        out += ["Incomplete, not counted:", ""]
        out += [f"- {folder}: {why}" for folder, why in incomplete] + [""]
    return "\n".join(out)


def table_csv(found: Tables, repairs=()) -> str:
    """One line per figure: fractions in [0, 1], every point as seed/target=value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "encoder", "probe", "figure", "unit", "n", "mean", "std", "low",
                     "high", "points"])
    both = [(title, stats) for title, _, stats in found] + fronts.statistics(repairs)
    for title, stats in both:
        for s in stats:
            numbers = ["" if v is None else repr(v) for v in (s.mean, s.std, s.low, s.high)]
            points = " ".join(f"{seed}/{target}={v!r}" for (seed, target), v in s.points)
            writer.writerow([title, s.encoder, s.probe, s.figure, s.unit, s.n, *numbers, points])
    return out.getvalue()


def build(found: Tables, incomplete: list[tuple[str, str]],
          repairs=()) -> tuple[str, list[Picture]]:
    """Gives the page and its pictures; `repairs` of fronts.collect."""
    total = sum(len(runs) for _, runs, _ in found)
    title = _count(total, "run") + (f" in {len(found)} groups" if len(found) > 1 else "")
    title = title if total else _count(len(repairs), "repair")
    sections, pictures = [f"<h1>{title}</h1>"], _pictures(found)
    sections += [html.paragraph(NOTE, "note")] if total else []
    sections.append(html.figures(pictures))
    repaired, fronts_ = fronts.sections(repairs)
    sections, pictures = sections + repaired, pictures + fronts_
    for name, runs, stats in found:
        parts = [html.paragraph(_which(runs), "note")]
        for probe in _probes(stats):
            header, body = _grid(stats, probe, _html_cell)
            parts += [f"<h3>{html.text(probe)}</h3>", html.table(["encoder", *header[1:]], body)]
        others = [s for s in stats if not groups.rated(s)]
        if others:
            parts.append(html.table(
                ["encoder", "figure", "mean ± deviation", "every run"],
                [[s.encoder, _other(s), _plain(s), _points(s)] for s in others]))
        sections.append(html.section(name, *parts))
    if incomplete:
        sections.append(html.section("Incomplete, not counted", html.pairs(incomplete)))
    return html.page(title, sections), pictures


def _pictures(found):
    out = []
    defenses = sorted({label for _, runs, _ in found for names in groups.called(runs)
                       for label in names.values()})
    for figure in ("attack_success_rate", "clean_accuracy"):
        shown, intervals, probe = [], {}, None
        for title, runs, stats in found:
            quoted = words.protocol_row(runs[0])
            mine = [s for s in stats if quoted and s.probe == quoted[0] and s.figure == figure
                    and " - " not in s.encoder]
            if mine:
                probe = quoted[0]
                shown.append((title, {s.encoder: np.array([v for _, v in s.points])
                                      for s in mine}))
                intervals |= {(title, s.encoder): (s.mean, s.low, s.high) for s in mine}
        if shown:
            means = "; ".join(f"{title}, {label}: {html.number(m)} %"
                              for (title, label), (m, _, _) in intervals.items())
            out.append(Picture(figure, figures.points(shown, intervals, defenses,
                                                      xlabel=f"{_NAMES[figure]}, %"),
                               f"Every run's {_NAMES[figure]}; means: {means}.",
                               f"{_NAMES[figure].capitalize()} ({probe}): every run, mean and "
                               "95 % t-interval."))
    return out


def _which(runs):
    each = ", ".join(f"{run.cfg.seed}/{run.cfg.attack.target}" for run in runs)
    pairs = [(run.cfg.seed, run.cfg.attack.target) for run in runs]
    twice = sorted({p for p in pairs if pairs.count(p) > 1})
    note = "".join(f" Seed {s} with target {t} occurs more than once." for s, t in twice)
    borrowed = [f"{run.cfg.seed}/{run.cfg.attack.target} by {words.source(run.borrowed)}"
                for run in runs if run.borrowed]
    if borrowed:
        note += f" Measured against another run's control: {'; '.join(borrowed)}."
    return f"{_count(len(runs), 'run')} (seed/target): {each}.{note}"


def _count(n, what):
    return f"{n} {what}{'' if n == 1 else 's'}"


def _probes(stats):
    return list(dict.fromkeys(s.probe for s in stats if groups.rated(s)))


def _grid(stats, probe, cell):
    """One probe's table: a row per encoder or difference, a column per figure."""
    stats = [s for s in stats if s.probe == probe]
    columns = [f for f in _NAMES if any(s.figure == f for s in stats)]
    rows = {}
    for s in stats:
        rows.setdefault(s.encoder, {})[s.figure] = s
    body = [[encoder, *(cell(by[c]) if c in by else "–" for c in columns)]
            for encoder, by in rows.items()]
    return [probe, *(_NAMES[c] for c in columns)], body


def _text_cell(s):
    return f"{_rate(s)}{_interval(s)}; {_percents(s)}"


def _html_cell(s):
    interval = f'<span class="interval">{_interval(s).strip()}</span>' if s.low is not None else ""
    return html.Raw(f'{_rate(s)}{interval}<span class="interval runs">{_percents(s)}</span>')


def _rate(s):
    signed = " - " in s.encoder
    deviation = "" if s.std is None else f" ± {html.number(s.std)}"
    return html.number(s.mean, signed=signed) + deviation


def _interval(s):
    if s.low is None:
        return ""
    signed = " - " in s.encoder
    return f" [{html.number(s.low, signed=signed)}, {html.number(s.high, signed=signed)}]"


def _percents(s):
    return ", ".join(html.number(v, signed=" - " in s.encoder) for _, v in s.points)


def _plain(s):
    if s.std is None:
        return _three(s.mean)
    return f"{_three(s.mean)} ± {_three(s.std)} [{_three(s.low)}, {_three(s.high)}]"


def _points(s):
    return ", ".join(_three(v) for _, v in s.points)


def _other(s):
    figure = s.figure.replace("_", " ")
    return figure if s.probe == "alignment" else f"{s.probe.replace('_', ' ')}: {figure}"


def _three(value):
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")
