"""Runs that are equal but for seed and target: means, deviations, intervals, paired differences."""

import dataclasses

import numpy as np
from scipy import stats

from jax_cl_bd import run_folder
from jax_cl_bd.reporting.read import Run, probes

FREE = ("seed", "attack.target")  # what may differ within a group
FIGURES = ("clean_accuracy", "triggered_accuracy", "attack_success_rate", "clean_target_rate",
           "occlusion_rate", "wrong_trigger_rate", "excess")
ALIGNMENT = ("reference_alignment", "noise_norm", "spread_ratio")
# Figures of rows that are no classifier's, as their path in the row; @K stands for a rate at K.
OTHERS = {"alignment": ALIGNMENT, "z_score": ("z", "z_by_deviation"),
          "retrieval": ("image_to_text@1", "image_to_text@5", "image_to_text@10",
                        "text_to_image@1", "text_to_image@5", "text_to_image@10",
                        "clean_target_hits@10", "target_hits@10"),
          "targeted": ("success", "target_rank", "target_probability"),
          "mismatch": ("hit@1", "hit@5", "hit@10", "min_rank")}


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One figure of one encoder (or a difference of two) over the runs of a group.

    points: ((seed, target), value) of every run. mean, std (n - 1), low and high (95 % t-interval)
    are over the `unit`: seeds, each averaged over its targets, or targets if there is one seed.
    std, low and high are None for a single unit.
    """
    encoder: str
    probe: str
    figure: str
    points: tuple[tuple[tuple[int, int], float], ...]
    unit: str
    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


def key_of(run: Run) -> tuple:
    """What runs of one group share: every setting that is hashed, but seed and target."""
    settings = run_folder.settings_of(run.cfg, run_folder.DEFEND_GROUPS)
    return tuple((k, repr(v)) for k, v in sorted(settings.items()) if k not in FREE)


def split(runs: list[Run]) -> list[tuple[str, list[Run]]]:
    """Groups runs, in the order of their first folder, with titles that tell them apart."""
    groups = {}
    for run in runs:
        groups.setdefault(key_of(run), []).append(run)
    keys = [dict(key) for key in groups]
    names = sorted({n for key in keys for n in key
                    if len({k.get(n) for k in keys}) > 1})
    titles = []
    for key, members in zip(keys, groups.values()):
        cfg = members[0].cfg
        title = f"{cfg.attack.name}, {cfg.objective.name}, {cfg.data.name}"
        told = {"attack.name", "objective.name", "data.name"}
        differs = [f"{n}={key[n]}" for n in names if n in key and n not in told]
        # A few differences tell groups apart; a long list belongs to the settings.
        titles.append("; ".join([title, *differs[:4]]))
    return [(title if titles.count(title) == 1 else f"{title} ({i + 1})", members)
            for i, (title, members) in enumerate(zip(titles, groups.values()))]


def summarise(values: dict[tuple[int, int], list[float]], **names: str) -> Statistic:
    """Mean, deviation and t-interval of one figure.

    Args:
        values: (seed, target) -> values of the run or runs with it.
        names: encoder, probe and figure.
    """
    points = tuple((key, v) for key in sorted(values) for v in values[key])
    seeds = sorted({seed for seed, _ in values})
    unit = "seeds" if len(seeds) > 1 or len(values) == 1 else "targets"
    place = 0 if unit == "seeds" else 1
    by_unit = {}
    for key, v in points:
        by_unit.setdefault(key[place], []).append(v)
    x = np.array([np.mean(v) for v in by_unit.values()])
    mean, std, low, high = float(np.mean(x)), None, None, None
    if len(x) > 1:
        std = float(np.std(x, ddof=1))
        half = float(stats.t.ppf(0.975, len(x) - 1)) * std / np.sqrt(len(x))
        low, high = float(mean - half), float(mean + half)
    return Statistic(points=points, unit=unit, n=len(x), mean=mean, std=std, low=low, high=high,
                     **names)


def statistics(runs: list[Run]) -> list[Statistic]:
    """All figures of a group, then the differences of encoders paired within each run.

    Paired: "victim - control", and "<defense> - victim" for every defense. A figure that some runs
    lack is summarised over those that have it; its points say which.
    """
    found = {}  # (encoder, probe, figure) -> {(seed, target): [values]}
    for run in runs:
        key = (run.cfg.seed, run.cfg.attack.target)
        table = {label: _figures(rows) for label, rows in run.encoders.items()}
        pairs = [("victim", "control"), *((name, "victim") for name in run.defenses)]
        for one, other in pairs:
            both = table.get(one, {}).keys() & table.get(other, {}).keys()
            if both:
                table[f"{one} - {other}"] = {
                    name: table[one][name] - table[other][name] for name in both}
        for label, figures in table.items():
            for (probe, name), value in figures.items():
                if " - " in label and name == "excess":
                    continue  # the excess is a difference already
                found.setdefault((label, probe, name), {}).setdefault(key, []).append(value)
    order = list(dict.fromkeys(label for label, _, _ in found))
    order.sort(key=lambda label: " - " in label)
    names = {n: i for i, n in enumerate((*FIGURES, *(n for own in OTHERS.values() for n in own)))}
    keys = sorted(found, key=lambda k: (order.index(k[0]), k[1], names[k[2]]))
    return [summarise(found[k], encoder=k[0], probe=k[1], figure=k[2]) for k in keys]


def _figures(rows):
    out = {(probe, name): row[name] for probe, row in probes(rows).items() for name in FIGURES
           if row.get(name) is not None}
    for probe, names in OTHERS.items():
        row = rows.get(probe) or {}
        # Mismatched pairs have a row for each of their goals.
        named = ({f"{probe} {goal}": own for goal, own in row.items()} if probe == "mismatch"
                 else {probe: row})
        for label, own in named.items():
            found = {name: _at(own, name) for name in names}
            out |= {(label, name): float(v) for name, v in found.items() if v is not None}
    return out


def rated(statistic: Statistic) -> bool:
    """Whether a figure is one of a classifier's rates, which have tables of their own."""
    return statistic.figure in FIGURES


def _at(row, name):
    """A figure of a row, "name" or "name@K"; None where it is missing."""
    name, _, k = name.partition("@")
    value = row.get(name)
    return value.get(k) if k and value is not None else value
