"""Repairs side by side: fronts of one victim in one figure, their cost, and differences over seeds.

Attack success is compared at matched clean accuracy: for a loss d the lowest attack success rate
among a repair's points, and the suspect left as it is, that lose at most d of the suspect's clean
accuracy on the test set (defenses/front.py), which takes knowledge of the attack; and at the points
that the defenders chose, whose clean accuracy stands beside it. Nothing is interpolated. Zero-shot
figures under the test protocol; of a repair without a text tower those of its own head.
"""

import dataclasses
import itertools
import os

import numpy as np
from etils import epath

from jax_cl_bd import run_folder
from jax_cl_bd.reporting import figures, groups, html
from jax_cl_bd.reporting.html import Picture, percent
from jax_cl_bd.reporting.read import Run

LOSSES = ("0.01", "0.02", "0.03")
# What is compared over seeds: its name, where (`Repair.at`), and of which figure.
COMPARED = (("clean_accuracy@choice", "choice", "clean_accuracy"),
            ("attack_success_rate@choice", "choice", "attack_success_rate"),
            *((f"lowest_attack_success_rate@{d}", d, "attack_success_rate") for d in LOSSES))
RANKED_BY = "lowest_attack_success_rate@0.02"
OVER_SEEDS = "Repairs at the defenders' choices and at matched clean accuracy"
NOTE = ("One line per defense: its points that no other of its points beats in both figures; its "
        "other points are pale, and the ring is the defender's choice. “Within d” is the lowest "
        "attack success rate among its points that lose at most d points of the suspect's clean "
        "accuracy, a choice that takes knowledge of the attack; where all lose more, the suspect's "
        "own. More points can only lower it. “Own head”: answers by a classifier of its own.")
# What may differ among the runs of one defense: more rates are more points; the number of pairs
# may follow another repair's, so only whether one is given counts.
_FREE, _GIVEN = ("defense.name", "defense.rates"), ("defense.pairs",)


@dataclasses.dataclass(frozen=True)
class Repair:
    """One defense of one victim.

    points: {"clean_accuracy", "attack_success_rate", "chosen"} each; a repair without a sweep has
    one. start: the same two figures of the suspect, or None. pairs: how many were trained on;
    steps: gradient steps over all rates; seconds: of the defense on the victim, without what the
    benchmark measures. None where a run does not say.
    """
    victim: str
    seed: int
    target: int
    group: str
    label: str
    points: list[dict]
    start: dict | None
    control: dict | None
    pairs: int | None
    steps: int | None
    seconds: float | None

    def at(self, which: str) -> dict | None:
        """The defender's choice, or the point of lowest attack success within a loss; the suspect
        itself is one."""
        if which == "choice":
            return next(p for p in self.points if p["chosen"])
        if self.start is None:
            return None
        least = self.start["clean_accuracy"] - float(which)
        within = [p for p in [self.start, *self.points] if p["clean_accuracy"] >= least]
        return min(within, key=lambda p: p["attack_success_rate"])


def collect(runs: list[Run]) -> list[Repair]:
    """Every repair with figures of its answers that a list of runs holds, whether or not a run's
    own folder holds its victim."""
    rows = [(group, run, name) for group, members in groups.split(runs, _made) for run in members
            for name, row in run.defenses.items() if _answers(row)]
    labels = _labels([(run, name) for _, run, name in rows])
    return [_repair(group, run, name, label) for (group, run, name), label in zip(rows, labels)]


def _made(cfg):
    """The key of what victims were made with, and of the place of the trigger."""
    settings = run_folder.settings_of(cfg, run_folder.PRETRAIN_GROUPS + ("downstream",))
    return groups.key_of(settings | {"evals.placements": cfg.evals.placements[:1]})


def _answers(row):
    """The figures of a repaired model's answers: zero-shot, or by its own head; None without."""
    return _figures(row.get("zero_shot")) or _figures(row.get("own_head"))


def _labels(rows):
    """Names of defenses, with the settings in which one differs from others of its name; what more
    than half of those have goes without saying."""
    keys, out = [], []
    for run, name in rows:
        alike = [other.settings[name] for other, same in rows if same == name]
        settings = groups.completed([run.settings[name], *alike])[0]
        keys.append({k.removeprefix("defense."): ("some" if v else "all") if k in _GIVEN
                     else repr(v) for k, v in settings.items()
                     if k.startswith("defense.") and k not in _FREE})
    for (run, name), key in zip(rows, keys):
        own = [k for (_, other), k in zip(rows, keys) if other == name]
        differs = [n for n in sorted(key) if 2 * sum(k.get(n) == key[n] for k in own) <= len(own)]
        said = ", ".join([f"{n}={key[n]}" for n in differs[:groups.MOST_TOLD]]
                         + ["own head"] * (_figures(run.defenses[name].get("zero_shot")) is None))
        out.append(f"{name} ({said})".replace("'", "") if said else name)
    return out


def _repair(group, run, name, label):
    row, settings = run.defenses[name], run.settings[name]
    victim = epath.Path(run.cfg.victim) if run.cfg.victim else run.folder
    own = run_folder.read_json(victim / "results.json") if (
        victim / "results.json").exists() else {}
    start = _figures(own.get("victim", {}).get("zero_shot"))
    points = [{**_answers(row), "chosen": True}]
    if "front" in row:
        start = row["front"]["start"]
        points = [p for p in row["front"]["points"] if p["attack_success_rate"] is not None]
    pairs, steps = cost(row["verdict"], settings)
    return Repair(os.path.abspath(victim), run.cfg.seed, run.cfg.attack.target, group, label,
                  points, start, _figures(own.get("control", {}).get("zero_shot")), pairs, steps,
                  row.get("seconds"))


def _figures(row):
    if not row or row.get("attack_success_rate") is None:
        return None
    return {name: row[name] for name in ("clean_accuracy", "attack_success_rate")}


def cost(verdict: dict, settings: dict) -> tuple[int | None, int | None]:
    """Pairs trained on and gradient steps over all rates; of runs that do not say, from what their
    defense called its pairs and from its settings."""
    names = ("training_pairs", "compact_set_pairs", "clean_pairs", "clean_images")
    pairs = next((verdict[n] for n in names if n in verdict), None)
    if "gradient_steps" in verdict:
        return pairs, verdict["gradient_steps"]
    if "rate" in verdict and "defense.rates" in settings:
        return pairs, settings["defense.steps"] * len(settings["defense.rates"])
    return pairs, 0 if pairs == 0 else None


def front(points: list[dict]) -> list[dict]:
    """The points that no other beats in one figure without losing in the other, by attack
    success."""
    kept = []
    for p in sorted(points, key=lambda p: (p["attack_success_rate"], -p["clean_accuracy"])):
        if not kept or p["clean_accuracy"] > kept[-1]["clean_accuracy"]:
            kept.append(p)
    return kept


def by_victim(repairs: list[Repair]) -> list[tuple[str, list[Repair]]]:
    """(title, repairs) of every victim, in their order."""
    out = {}
    for r in repairs:
        out.setdefault(r.victim, []).append(r)
    titles = [f"{epath.Path(victim).name}, seed {own[0].seed}" for victim, own in out.items()]
    return list(zip(groups.numbered(titles), out.values()))


def statistics(repairs: list[Repair]) -> list[tuple[str, list[groups.Statistic]]]:
    """For every group of runs: what is COMPARED of each defense, then the differences of any two,
    paired by seed and target. Those with most seeds come first, among them those that leave least
    within 2 points of clean accuracy."""
    out = []
    for group in dict.fromkeys(r.group for r in repairs):
        mine = [r for r in repairs if r.group == group]
        labels = list(dict.fromkeys(r.label for r in mine))
        values = {(label, figure): _by_run([r for r in mine if r.label == label], at, of)
                  for label in labels for figure, at, of in COMPARED}
        ranks = {label: [*values[label, RANKED_BY].values()] for label in labels}
        labels.sort(key=lambda label: (-len(ranks[label]), np.mean(ranks[label] or np.inf)))
        found = {(label, figure): {k: [v] for k, v in values[label, figure].items()}
                 for label in labels for figure, _, _ in COMPARED}
        for one, other in itertools.combinations(labels, 2):
            for figure, _, _ in COMPARED:
                both = values[one, figure].keys() & values[other, figure].keys()
                found[f"{one} - {other}", figure] = {
                    k: [values[one, figure][k] - values[other, figure][k]] for k in both}
        out.append((group, [groups.summarise(v, encoder=label, probe="front", figure=figure)
                            for (label, figure), v in found.items() if v]))
    return out


def _by_run(repairs, at, of):
    # Two runs of one seed, target and label count once, by their mean.
    found = {}
    for r in repairs:
        if (point := r.at(at)) is not None:
            found.setdefault((r.seed, r.target), []).append(point[of])
    return {key: float(np.mean(v)) for key, v in found.items()}


def cost_table(repairs: list[Repair]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one victim's repairs."""
    def cell(point, name="attack_success_rate"):
        return "–" if point is None else html.number(point[name])

    def count(value):
        return "–" if value is None else f"{value:,.0f}"

    header = ["defense", "pairs", "gradient steps", "seconds", "points", "choice: ASR, %",
              "choice: clean accuracy, %", *(f"ASR within {100 * float(d):g}, %" for d in LOSSES)]
    body = [[r.label, count(r.pairs), count(r.steps), count(r.seconds), count(len(r.points)),
             cell(r.at("choice")), cell(r.at("choice"), "clean_accuracy"),
             *(cell(r.at(d)) for d in LOSSES)] for r in repairs]
    first = next((r for r in repairs if r.start is not None), None)
    for name, point in (("suspect", first and first.start),
                        ("control", next((r.control for r in repairs if r.control), None))):
        if point:
            body.insert(0 if name == "suspect" else 1,
                        [name, *"––––", cell(point), cell(point, "clean_accuracy"), *"–––"])
    return header, body


def seeds_table(stats: list[groups.Statistic]) -> tuple[list[str], list[list[str]]]:
    """Header and rows over seeds: mean ± deviation [t-interval] (number) of all COMPARED; of the
    differences those of the first defense from the others."""
    rows = {}
    for s in stats:
        if " - " not in s.encoder or s.encoder.startswith(f"{stats[0].encoder} - "):
            rows.setdefault(s.encoder, {})[s.figure] = s
    header = ["defense or difference", "clean accuracy at the choices", "ASR at the choices",
              *(f"ASR within {100 * float(d):g}" for d in LOSSES)]
    return header, [[label, *(_cell(own.get(figure)) for figure, _, _ in COMPARED)]
                    for label, own in rows.items()]


def _cell(s):
    if s is None:
        return "–"
    signed = " - " in s.encoder
    text = html.number(s.mean, signed=signed)
    if s.std is not None:
        low, high = (html.number(v, signed=signed) for v in (s.low, s.high))
        text += f" ± {html.number(s.std)} [{low}, {high}]"
    return f"{text} ({s.n} {s.unit if s.n > 1 else s.unit.removesuffix('s')})"


def markdown(repairs: list[Repair]) -> str:
    """All tables as Markdown."""
    out = []
    for title, own in by_victim(repairs):
        out += [f"### Repairs of {title}", "", *_lines(*cost_table(own)), ""]
    for group, stats in statistics(repairs):
        out += [f"### {OVER_SEEDS}, %: {group}", "",
                *_lines(*seeds_table(stats)), ""]
    return "\n".join(out + [NOTE, ""]) if out else ""


def _lines(header, body):
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]


def sections(repairs: list[Repair]) -> tuple[list[str], list[Picture]]:
    """The sections of a page, and its pictures."""
    out, pictures = [], []
    for i, (title, own) in enumerate(by_victim(repairs)):
        start = next((r.start for r in own if r.start), None)
        control = next((r.control for r in own if r.control), None)
        lines = [(r.label, r.points, front(r.points)) for r in own]
        png, hidden = figures.fronts(lines, start, control)
        said = "; ".join(f"{r.label} {percent(r.at('choice')['attack_success_rate'])} and "
                         f"{percent(r.at('choice')['clean_accuracy'])}" for r in own)
        below = (f" {hidden} points of lower clean accuracy are left out." if hidden else "")
        picture = Picture(f"fronts_{i}", png, "Attack success rate and clean accuracy at the "
                          f"defenders' choices: {said.replace('&nbsp;', ' ')}.",
                          f"Clean accuracy against attack success rate, zero-shot.{below}")
        pictures.append(picture)
        out.append(html.section(f"Repairs of {title}", html.paragraph(NOTE, "note"),
                                html.figure(picture), html.table(*cost_table(own))))
    for group, stats in statistics(repairs):
        out.append(html.section(
            f"{OVER_SEEDS}: {group}",
            html.paragraph("In percent, over seeds: mean ± standard deviation [95 % t-interval]. "
                           "Differences are taken within each seed, of the first defense, which "
                           "leaves least within 2 points of clean accuracy, from the others "
                           "(table.csv has those of any two).", "note"),
            html.table(*seeds_table(stats))))
    return out, pictures
