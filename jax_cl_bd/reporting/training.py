"""The report's section on training: the loss, and the attack while it grows."""

from jax_cl_bd.reporting import figures, html, words
from jax_cl_bd.reporting.html import Picture
from jax_cl_bd.reporting.read import Run, series

WATCHED = ("zero_shot", "knn")  # probes of evals/during_training.py
# Key, name, whether it is a rate, and the key of the same figure of the images without trigger.
CURVES = (("train/loss", "training loss", False, None),
          *(curve for probe in WATCHED for curve in (
              (f"eval/{probe}/attack_success_rate", "attack success rate", True, None),
              (f"eval/{probe}/clean_accuracy", "clean accuracy", True, None))),
          *((f"eval/alignment/{key}", key.replace("_", " "), False, f"eval/alignment/clean_{key}")
            for key in ("reference_alignment", "noise_norm")),
          ("eval/alignment/spread_ratio", "spread ratio", False, None))
LEVELS = {"eval/alignment/spread_ratio": ("as without trigger", 1.0)}


def section(run: Run, pictures: list[Picture]) -> str:
    """A picture for each curve, and what it was measured by."""
    if not run.metrics:
        return html.section("Training", html.paragraph("There is no metrics.jsonl.", "note"))
    shown = [picture for curve in CURVES if (picture := _picture(run, *curve)) is not None]
    pictures.extend(shown)
    notes = []
    if "control" not in run.metrics:
        notes.append(_no_curves(run))
    elif not run.same_trigger:
        notes.append("The control's run was watched under a trigger or target of its own, so only "
                     "its loss and clean accuracy are drawn.")
    probe = next((p for p in WATCHED for lines in run.metrics.values()
                  if series(lines, f"eval/{p}/clean_accuracy")), None)
    if probe is None:
        notes.append("Nothing was measured while training (train.eval_every = 0).")
    else:
        by = "kNN" if probe == "knn" else "zero-shot classification"
        notes.append(f"Measured while training by {by} and by the test protocol.")
    return html.section("Training", html.figures(shown),
                        *(html.paragraph(note, "note") for note in notes))


def _no_curves(run):
    if run.borrowed:
        return f"{words.control(run)} Its training cannot be read from here, so it is not drawn."
    return "No control was trained, so there is nothing to compare with."


def _picture(run, key, name, rate, baseline):
    """One curve of every encoder, or None if no run measured it."""
    lines = {label: found for label, own in run.metrics.items()
             if (found := series(own, key)) is not None}
    if not lines:
        return None
    clean = {label: found for label in lines
             if baseline and (found := series(run.metrics[label], baseline)) is not None}
    ends = []
    for label, (_, values) in lines.items():
        end = f"{html.number(values[-1])} %" if rate else f"{values[-1]:.3g}"
        if label in clean:
            end += f" ({clean[label][1][-1]:.3g} without trigger)"
        ends.append(f"{label} {end}")
    said = f"at the end: {', '.join(ends)}."
    png = figures.curves(lines, ylabel=f"{name}, %" if rate else name, rate=rate, clean=clean,
                         level=LEVELS.get(key))
    return Picture(key.replace("/", "_"), png, f"{name} over training steps; {said}",
                   f"{name.capitalize()}; {said}")
