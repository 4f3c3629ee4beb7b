"""python -m jax_cl_bd.reporting.detection DIR [DIR ...] --calibrate DIR [DIR ...] --out=FOLDER

How well a defense tells backdoored encoders from clean ones, over many runs that it was run on.
Backdoored is a victim whose excess under the test protocol is at least --least-excess; a victim
below that is left out, since nobody could call it either. Clean are controls, each once, and the
encoders of runs without an attack. The threshold comes from the clean encoders of the --calibrate
folders alone, at a stated false alarm rate. Writes detection.json, detection.png and table.md.
"""

import os
import sys

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from jax_cl_bd import command_line, errors, run_folder
from jax_cl_bd.defenses import _vetting
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.reporting import read, words

RESAMPLES = 10_000
# What of a verdict is scored, and whether high or low is suspicious; without a finding it is None.
SCORES = {"decree": ("pl1", "low")}


def encoders(folder: epath.Path, defense: str, least_excess: float) -> list[dict]:
    """The victim and the control of a run: {"encoder": where it lies, "kind": "backdoored", "clean"
    or "left out", "score", "seed", "target", "attack", "excess"}.

    Raises:
        UserError: the defense was not run there, or the excess was not measured.
    """
    found = read.load(folder)
    results, cfg = found.results or {}, found.cfg
    if defense not in results.get("defenses", {}):
        raise UserError(f"{folder}: defense {defense} was not run there; add --stages=defend with "
                        f"defense={defense}")
    row = results["defenses"][defense]
    shared = {"seed": cfg.seed, "target": cfg.attack.target, "attack": cfg.attack.name}
    victim = epath.Path(cfg.victim) if cfg.victim else folder
    out = []
    if run_folder.is_clean(victim):
        kind, excess = "clean", None
    else:
        quoted = words.protocol_row(found)
        if not quoted or quoted[1].get("excess") is None:
            raise UserError(f"{folder}: the victim's excess is not known; run evaluate, with a "
                            "control or control_from")
        excess = quoted[1]["excess"]
        kind = "backdoored" if excess >= least_excess else "left out"
    out.append({"encoder": os.path.abspath(victim), "kind": kind, "excess": excess,
                "score": _score(row["verdict"], defense), **shared})
    control = run_folder.control_of(cfg, victim)
    if "control" in row and control not in (None, victim):
        out.append({"encoder": os.path.abspath(control), "kind": "clean", "excess": None,
                    "score": _score(row["control"]["verdict"], defense), **shared})
    return out


def _score(verdict, defense) -> float:
    """Higher is more suspicious; an inversion that found nothing is the least suspicious."""
    name, suspicious = SCORES[defense]
    value = verdict[name]
    if value is None:
        return float("-inf")
    return -value if suspicious == "low" else value


def once(rows: list[dict]) -> list[dict]:
    """Every encoder once: a control may serve many victims."""
    return list({row["encoder"]: row for row in rows}.values())


def judge(rows: list[dict], calibration: list[dict], false_alarm: float) -> dict:
    """AUROC with a bootstrap interval, and the rates at the threshold.

    The threshold is that of _vetting.threshold by ranks: one more clean encoder exceeds it with a
    probability of at most `false_alarm`.

    Raises:
        UserError: no encoder of one kind, too few for that rate, or one that is on both sides.
    """
    backdoored = np.array([r["score"] for r in rows if r["kind"] == "backdoored"])
    clean = np.array([r["score"] for r in rows if r["kind"] == "clean"])
    known = np.array([r["score"] for r in calibration if r["kind"] == "clean"])
    if not len(backdoored) or not len(clean):
        raise UserError(f"there are {len(backdoored)} backdoored and {len(clean)} clean encoders; "
                        "some of both are needed")
    both = {r["encoder"] for r in rows} & {r["encoder"] for r in calibration}
    if both:
        raise UserError(f"the threshold must come from other encoders: {min(both)} is on both "
                        "sides")
    least = int(np.ceil(1 / false_alarm - 1e-9)) - 1
    if len(known) < least:
        raise UserError(f"{len(known)} clean encoders cannot set a threshold for a false alarm "
                        f"rate of {false_alarm:g}; {least} are needed")
    threshold, certain, _ = _vetting.threshold(known, false_alarm)
    wins, rng = above(backdoored, clean), np.random.default_rng(0)
    drawn = [wins[rng.integers(0, len(wins), len(wins))][
        :, rng.integers(0, len(clean), len(clean))].mean() for _ in range(RESAMPLES)]
    return {"auroc": float(wins.mean()),
            "auroc_interval": [float(q) for q in np.percentile(drawn, [2.5, 97.5])],
            "threshold": threshold, "false_alarm_wanted": false_alarm, "false_alarm": certain,
            "true_positive_rate": float((backdoored > threshold).mean()),
            "false_positive_rate": float((clean > threshold).mean()),
            "backdoored": len(backdoored), "clean": len(clean), "calibration": len(known),
            "left_out": sum(r["kind"] == "left out" for r in rows)}


def above(backdoored: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Whether each backdoored encoder scores higher than each clean one, [B, C]; a tie is 1/2. The
    mean of this is the AUROC."""
    return np.where(backdoored[:, None] == clean, 0.5, backdoored[:, None] > clean)


def draw(rows: list[dict], calibration: list[dict], found: dict, defense: str,
         path: epath.Path) -> None:
    """Every encoder a point, by kind; the threshold a line. Without a finding: at the edge."""
    name, suspicious = SCORES[defense]
    sign = -1 if suspicious == "low" else 1
    groups = {"backdoored": [r for r in rows if r["kind"] == "backdoored"],
              "clean": [r for r in rows if r["kind"] == "clean"],
              "clean, for the threshold": [r for r in calibration if r["kind"] == "clean"]}
    picture = Figure(figsize=(6.5, 3.0), layout="constrained")
    axes = picture.subplots()
    for at, (label, members) in enumerate(groups.items()):
        values = [sign * r["score"] for r in members if np.isfinite(r["score"])]
        offsets = 0.12 * np.sin(2.4 * np.arange(len(values)))  # so that equal ones are seen
        axes.plot(values, at + offsets, "o", alpha=0.6,
                  color="#D55E00" if label == "backdoored" else "#0072B2")
    if np.isfinite(found["threshold"]):
        axes.axvline(sign * found["threshold"], color="0.3", lw=1, ls="--")
    low, high = found["auroc_interval"]
    axes.set(yticks=range(len(groups)), yticklabels=[f"{label} ({len(members)})"
                                                     for label, members in groups.items()],
             xlabel=f"{defense}: {name} ({suspicious} is suspicious)",
             title=f"AUROC {found['auroc']:.3f} ({low:.3f} to {high:.3f})")
    axes.set_ylim(len(groups) - 0.5, -0.5)
    with path.open("wb") as file:
        picture.savefig(file, format="png", dpi=150)


def table(rows: list[dict], found: dict, defense: str) -> str:
    """The figures and every encoder, as Markdown."""
    name, suspicious = SCORES[defense]
    sign = -1 if suspicious == "low" else 1
    low, high = found["auroc_interval"]
    lines = [f"`{defense}` on {found['backdoored']} backdoored and {found['clean']} clean encoders "
             f"({found['left_out']} with too little excess left out): AUROC {found['auroc']:.3f} "
             f"(95 % {low:.3f} to {high:.3f}). At the threshold of {found['calibration']} other "
             f"clean encoders, beyond which one more lies at a rate of {found['false_alarm']:.3f} "
             f"at most ({name} {sign * found['threshold']:.4f}): "
             f"{found['true_positive_rate']:.3f} found, "
             f"{found['false_positive_rate']:.3f} false alarms.", "",
             f"| encoder | kind | attack | target | seed | excess | {name} |",
             "|---|---|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: -r["score"]):
        excess = "-" if r["excess"] is None else f"{r['excess']:.3f}"
        value = "none" if not np.isfinite(r["score"]) else f"{sign * r['score']:.4f}"
        attack = r["attack"] if r["kind"] != "clean" else "-"
        lines.append(f"| {r['encoder']} | {r['kind']} | {attack} | {r['target']} | {r['seed']} | "
                     f"{excess} | {value} |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Reads the command line; see the top of this file."""
    parser = command_line.Parser("jax_cl_bd.reporting.detection", __doc__)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--calibrate", nargs="+", metavar="DIR", required=True)
    parser.add_argument("--defense", default="decree")
    parser.add_argument("--least-excess", type=float, default=0.5)
    parser.add_argument("--false-alarm", type=float, default=0.1)
    parser.add_argument("--out", required=True)
    given = parser.parse_args(argv)
    if given.defense not in SCORES:
        raise unknown("--defense", given.defense, tuple(SCORES))
    if not 0 < given.false_alarm < 1:
        raise UserError(f"--false-alarm={given.false_alarm} must lie in (0, 1)")

    def every(folders):
        return once([row for folder in folders
                     for row in encoders(epath.Path(folder), given.defense, given.least_excess)])

    rows, calibration = every(given.folders), every(given.calibrate)
    found = judge(rows, calibration, given.false_alarm)
    out = epath.Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    run_folder.write_json(out / "detection.json", _plain({
        "defense": given.defense, "least_excess": given.least_excess, **found,
        "encoders": [_plain(r) for r in rows],
        "calibration_encoders": [_plain(r) for r in calibration]}))
    draw(rows, calibration, found, given.defense, out / "detection.png")
    text = table(rows, found, given.defense)
    (out / "table.md").write_text(text)
    print(text)


def _plain(row):
    """A row for JSON, which knows no infinity."""
    return {name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in row.items()}


if __name__ == "__main__":
    errors.end(main, sys.argv[1:])
