"""python -m jax_cl_bd.reporting.layout_law DIR [DIR ...] --out=FOLDER

Holds the layout solver against training: the predicted pair probability of each run's poisons
beside the attack's measured excess, with their rank correlation over the layouts.
"""

import argparse
import sys

import numpy as np
from etils import epath
from scipy import stats

from jax_cl_bd import run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import pairs

RESAMPLES = 10_000


def read(folder: epath.Path, row: str) -> dict:
    """One run: its name without the seed, the predicted probability, and the measured excess."""
    cfg = run_folder.read_config(folder)
    plan = Plan.load(folder / "poison" / "plan.npz")
    figures = run_folder.read_json(folder / "results.json")["victim"][row]
    return {"case": folder.name.rpartition("_")[0], "seed": cfg.seed,
            "predicted": pairs.pair_probability(cfg, plan)[0], "excess": figures["excess"],
            "attack_success_rate": figures["attack_success_rate"]}


def correlation(runs: list[dict], figure: str) -> tuple[float, list[float]]:
    """Spearman's rho of prediction and the mean figure of each case, with a 95 % interval.

    The interval is a percentile bootstrap over cases, and over seeds within each case drawn.
    """
    cases = sorted({r["case"] for r in runs})
    predicted = np.array([next(r["predicted"] for r in runs if r["case"] == c) for c in cases])
    values = [np.array([r[figure] for r in runs if r["case"] == c]) for c in cases]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        pick = rng.integers(0, len(cases), len(cases))
        means = [rng.choice(values[i], len(values[i])).mean() for i in pick]
        if np.ptp(predicted[pick]) and np.ptp(means):
            drawn.append(stats.spearmanr(predicted[pick], means).statistic)
    rho = stats.spearmanr(predicted, [v.mean() for v in values]).statistic
    return float(rho), [float(q) for q in np.percentile(drawn, [2.5, 97.5])]


def draw(runs: list[dict], figure: str, path: epath.Path, title: str) -> None:
    """Every run a point, every case a mean, over the predicted probability."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for case in sorted({r["case"] for r in runs}):
        mine = [r for r in runs if r["case"] == case]
        x, y = mine[0]["predicted"], [r[figure] for r in mine]
        axes.plot([x] * len(y), y, "o", color="#0072B2", alpha=0.35)
        axes.plot(x, np.mean(y), "o", color="#D55E00")
        axes.annotate(case, (x, np.mean(y)), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted pair probability", ylabel=figure.replace("_", " "), title=title)
    axes.axhline(0, color="0.8", lw=0.8, zorder=0)
    axes.margins(x=0.16)
    with path.open("wb") as file:
        picture.savefig(file, format="png", dpi=150)
    plt.close(picture)


def main(argv: list[str]) -> None:
    """Writes table.md and a picture for the random and the central place of the trigger."""
    parser = argparse.ArgumentParser(prog="python -m jax_cl_bd.reporting.layout_law")
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--out", required=True)
    given = parser.parse_args(argv)
    out = epath.Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    text = []
    for row, name in (("linear_probe", "random"), ("linear_probe:center", "center")):
        runs = [read(epath.Path(f), row) for f in given.folders]
        if len({r["case"] for r in runs}) < 3:
            raise UserError("a rank correlation needs at least 3 cases")
        rho, (low, high) = correlation(runs, "excess")
        text.append(f"`{row}`: Spearman's rho of prediction and mean excess {rho:.2f} "
                    f"(95 % {low:.2f} to {high:.2f}), {len({r['case'] for r in runs})} cases\n")
        text.append("| case | predicted | excess by seed | mean | attack success rate |\n"
                    "|---|---|---|---|---|")
        for case in sorted({r["case"] for r in runs},
                           key=lambda c: next(r["predicted"] for r in runs if r["case"] == c)):
            mine = sorted((r for r in runs if r["case"] == case), key=lambda r: r["seed"])
            points = ", ".join(f"{r['excess']:.3f}" for r in mine)
            text.append(f"| {case} | {mine[0]['predicted']:.4f} | {points} | "
                        f"{np.mean([r['excess'] for r in mine]):.3f} | "
                        f"{np.mean([r['attack_success_rate'] for r in mine]):.3f} |")
        text.append("")
        draw(runs, "excess", out / f"layout_law_{name}.png",
             f"trigger at {'random places' if name == 'random' else 'the centre'}: "
             f"rho = {rho:.2f} ({low:.2f} to {high:.2f})")
    (out / "table.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
