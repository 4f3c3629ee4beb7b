"""Runs that are equal but for seed and target: means, deviations, intervals, paired differences."""

import dataclasses

import ml_collections
import numpy as np
from scipy import stats

from jax_cl_bd import run_folder
from jax_cl_bd.reporting.read import OF_CONTROL, Run, probes

FREE = ("seed", "attack.target", "control_from")  # what may differ within a group
# Folders, of which each seed may name its own: whether there is one tells runs apart, not which.
FOLDERS = ("init_from", "attack.trigger_from", "attack.surrogate")
MOST_TOLD = 4  # a few differences tell groups apart; a long list belongs to the settings
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


def key_of(settings: dict) -> dict[str, str]:
    """What the runs of a group share: every setting that is hashed, but seed, target, folders."""
    return {k: ("given" if v else "''") if k in FOLDERS else repr(v)
            for k, v in sorted(settings.items()) if k not in FREE}


def evaluated(cfg: ml_collections.ConfigDict) -> dict[str, str]:
    """The key of what victim, control and untrained encoder were made and measured with."""
    names = tuple(group for group in run_folder.EVALUATE_GROUPS if group != "control_from")
    key = key_of(run_folder.settings_of(cfg, names))
    return key | ({"victim": repr(cfg.victim)} if run_folder.from_elsewhere(cfg) else {})


def split(runs: list[Run], key_of_run=evaluated) -> list[tuple[str, list[Run]]]:
    """Groups runs by a key of their config, in the order of their first folder, with titles that
    tell them apart.

    The defense that a folder's config names last plays no part: `statistics` tells defenses apart
    by their own settings.
    """
    keys, groups = [], []
    for run in runs:
        key = key_of_run(run.cfg)
        if key not in keys:
            keys.append(key)
            groups.append([])
        groups[keys.index(key)].append(run)
    told = ("attack.name", "objective.name", "data.name")
    titles = [", ".join(members[0].cfg[name.partition(".")[0]].name for name in told)
              for members in groups]
    titles = ["; ".join(filter(None, parts)) for parts in zip(titles, _differences(keys, told))]
    return list(zip(numbered(titles), groups))


def _differences(keys, told=()):
    """For each key, the settings in which it differs from some other, as text."""
    names = sorted({n for key in keys for n in key if len({k.get(n) for k in keys}) > 1})
    return ["; ".join([f"{n}={key[n]}" for n in names if n in key and n not in told][:MOST_TOLD])
            for key in keys]


def completed(settings: list[dict]) -> list[dict]:
    """Settings of one defense from runs of several ages: what an older run lacks is what it was
    before there was a choice (run_folder.BEFORE)."""
    names = {name for one in settings for name in one}
    return [{name: run_folder.BEFORE.get(name, "") for name in names} | one for one in settings]


def numbered(titles):
    """Numbers the titles that occur more than once."""
    return [title if titles.count(title) == 1 else f"{title} ({i + 1})"
            for i, title in enumerate(titles)]


def called(runs: list[Run]) -> list[dict[str, str]]:
    """For each run, what its defenses are called: by name, and where runs of the group have one
    with several settings (defenses/<name>/settings.json), by name and differences."""
    out = [{} for _ in runs]
    for name in dict.fromkeys(name for run in runs for name in run.defenses):
        having = [i for i, run in enumerate(runs) if name in run.defenses]
        whole = completed([runs[i].settings[name] for i in having])
        mine = {i: key_of(settings) for i, settings in zip(having, whole)}
        keys = [key for i, key in enumerate(mine.values()) if key not in list(mine.values())[:i]]
        labels = numbered([f"{name} [{more}]" if more else name for more in _differences(keys)])
        for i, key in mine.items():
            out[i][name] = labels[keys.index(key)]
    return out


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

    Paired: "victim - control"; for every defense "<defense> - victim" and, where the control was
    defended too, "<defense> - <defense> of control". A figure that some runs lack is summarised
    over those that have it; its points say which.
    """
    found = {}  # (encoder, probe, figure) -> {(seed, target): [values]}
    for run, names in zip(runs, called(runs)):
        key = (run.cfg.seed, run.cfg.attack.target)
        table = {_renamed(label, names): _figures(rows) for label, rows in run.encoders.items()}
        pairs = [("victim", "control"),
                 *((name, other) for name in names.values()
                   for other in ("victim", f"{name}{OF_CONTROL}"))]
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


def _renamed(label, names):
    base = label.removesuffix(OF_CONTROL)
    return names.get(base, base) + label[len(base):]


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
