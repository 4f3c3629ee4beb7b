"""python -m jax_cl_bd.reporting.layout_law DIR [DIR ...] --out=FOLDER

Holds the layout solver against training: the predicted pair probability of each run's poisons
beside the attack's measured excess, with their rank correlation over the cases. A case is all runs
that are equal but for the seed, by their configs; the name of a folder plays no part.
"""

import collections
import sys

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from scipy import stats

from jax_cl_bd import command_line, errors, run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import groups, pairs
from jax_cl_bd.reporting.read import folders

RESAMPLES = 10_000
ROWS = (("linear_probe", "random", "at random places"),
        ("linear_probe:center", "center", "at the centre"))
USUAL = "usual"  # the case that differs from no setting that most cases have


def read(folder: epath.Path) -> dict:
    """One run: its settings without the seed, the predicted probability, the victim's figures."""
    cfg = run_folder.read_config(folder)
    plan = Plan.load(folder / "poison" / "plan.npz")
    victim = run_folder.read_json(folder / "results.json").get("victim", {})
    for row, _, _ in ROWS:
        if victim.get(row, {}).get("excess") is None:
            raise UserError(f"{folder}: the victim has no excess under {row!r}; run evaluate with "
                            "that probe and place")
    return {"settings": groups.evaluated(cfg), "seed": cfg.seed,
            "predicted": pairs.pair_probability(cfg, plan)[0],
            "figures": {row: victim[row] for row, _, _ in ROWS}}


def cases(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs by case, of increasing prediction; named by the settings that most cases do not have."""
    keys = []
    for run in runs:
        if run["settings"] not in keys:
            keys.append(run["settings"])
    usual = {name: collections.Counter(key.get(name) for key in keys).most_common(1)[0][0]
             for name in {name for key in keys for name in key}}
    out = {}
    for key in keys:
        differs = {name: value for name, value in key.items() if value != usual[name]}
        # Short names will do where they tell enough; mostly both views crop by one law.
        short = ", ".join(dict.fromkeys(f"{name.rpartition('.')[2]}={value}"
                                        for name, value in differs.items()))
        whole = ", ".join(f"{name}={value}" for name, value in differs.items())
        title = (whole if short in out else short) or USUAL
        out[title] = [run for run in runs if run["settings"] == key]
    return dict(sorted(out.items(), key=lambda item: prediction(item[1])))


def prediction(runs: list[dict]) -> float:
    """The predicted pair probability of a case; each seed draws its own mix of layouts."""
    return float(np.mean([run["predicted"] for run in runs]))


def correlation(predicted: list[float],
                measured: list[list[float]]) -> tuple[float, list[float]]:
    """Spearman's rho of prediction and mean measurement of each case, with a 95 % interval.

    The interval is a percentile bootstrap over cases, and over seeds within each case drawn.

    Raises:
        UserError: there is nothing to rank.
    """
    predicted, values = np.asarray(predicted), [np.asarray(v) for v in measured]
    means = [v.mean() for v in values]
    if len(values) < 3 or not np.ptp(predicted) or not np.ptp(means):
        raise UserError("a rank correlation needs at least 3 cases, and of these not all with the "
                        f"same prediction or the same mean; there are {len(values)} cases")
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        pick = rng.integers(0, len(values), len(values))
        again = [rng.choice(values[i], len(values[i])).mean() for i in pick]
        if np.ptp(predicted[pick]) and np.ptp(again):
            drawn.append(stats.spearmanr(predicted[pick], again).statistic)
    rho = stats.spearmanr(predicted, means).statistic
    return float(rho), [float(q) for q in np.percentile(drawn, [2.5, 97.5])]


def draw(found: dict[str, list[dict]], row: str, path: epath.Path, title: str) -> None:
    """Every run a point, every case a mean, over the predicted probability."""
    picture = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = picture.subplots()
    for case, runs in found.items():
        x, y = prediction(runs), [run["figures"][row]["excess"] for run in runs]
        axes.plot([x] * len(y), y, "o", color="#0072B2", alpha=0.35)
        axes.plot(x, np.mean(y), "o", color="#D55E00")
        axes.annotate(case, (x, np.mean(y)), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted pair probability", ylabel="excess", title=title)
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.margins(x=0.16)
    with path.open("wb") as file:
        picture.savefig(file, format="png", dpi=150)


def table(found: dict[str, list[dict]], row: str, rho: float, interval: list[float]) -> str:
    """The correlation and every case, as Markdown."""
    runs = [run for members in found.values() for run in members]
    bare = sum(run["figures"][row]["excess_without_control"] for run in runs)
    lines = [f"`{row}`: Spearman's rho of prediction and mean excess {rho:.2f} (95 % "
             f"{interval[0]:.2f} to {interval[1]:.2f}), {len(found)} cases, {len(runs)} runs"
             + (f"; the excess of {bare} of them is over grey patch and wrong trigger alone, "
                "without a control" if bare else ""), "",
             "| case | predicted | excess by seed | mean | attack success rate |",
             "|---|---|---|---|---|"]
    for case, members in found.items():
        mine = [run["figures"][row] for run in sorted(members, key=lambda run: run["seed"])]
        points = ", ".join(f"{figures['excess']:.3f}" for figures in mine)
        means = [np.mean([figures[name] for figures in mine])
                 for name in ("excess", "attack_success_rate")]
        lines.append(f"| {case} | {prediction(members):.4f} | {points} | {means[0]:.3f} | "
                     f"{means[1]:.3f} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Writes table.md and a picture for the random and the central place of the trigger."""
    parser = command_line.Parser("jax_cl_bd.reporting.layout_law", __doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--out", required=True)
    given = parser.parse_args(argv)
    found = cases([read(folder) for folder in folders(given.folders)])
    out, text = epath.Path(given.out), []
    out.mkdir(parents=True, exist_ok=True)
    for row, name, where in ROWS:
        rho, interval = correlation(
            [prediction(runs) for runs in found.values()],
            [[run["figures"][row]["excess"] for run in runs] for runs in found.values()])
        text.append(table(found, row, rho, interval))
        draw(found, row, out / f"layout_law_{name}.png",
             f"trigger {where}: rho = {rho:.2f} ({interval[0]:.2f} to {interval[1]:.2f})")
    (out / "table.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    errors.end(main, sys.argv[1:])
