"""Sentences built from results."""

from jax_cl_bd.reporting.html import number
from jax_cl_bd.reporting.read import Run, probes

RIVALS = {"control": "the clean control under the same trigger",
          "occlusion_rate": "a grey patch at the same places",
          "wrong_trigger_rate": "another trigger at the same places"}
ENCODERS = {"victim": "victim", "control": "control (clean twin)",
            "untrained": "untrained"}


def title(run: Run) -> str:
    """What was run, in a line."""
    attack = run.cfg.attack.name
    what = "Clean pretraining" if attack == "none" else attack.replace("_", " ").capitalize()
    return f"{what} on {run.cfg.data.name}, {run.cfg.objective.name}"


def what(run: Run) -> str:
    """Model, length, seed and poison counts, in a line."""
    cfg, parts = run.cfg, []
    lines = run.metrics.get("victim")
    steps = cfg.train.steps or (lines[-1]["step"] if lines else 0)
    length = f"{steps:,} steps" if steps else f"{cfg.train.epochs} epochs"
    parts.append(f"{cfg.model.name}, {length} of {cfg.train.batch_size} images, seed {cfg.seed}")
    if run.summary is not None and run.summary["poisons"]:
        s = run.summary
        parts.append(f"target class “{s['target_class']}”")
        parts.append(f"{s['poisons']:,} poisons ({number(s['rate_of_dataset'])} % of the data set, "
                     f"{number(s['rate_of_target_class'])} % of the target class)")
    return " · ".join(parts)


def protocol_row(run: Run) -> tuple[str, dict] | None:
    """The probe that the headline quotes and the victim's figures: the config's first probe."""
    if run.results is None or "victim" not in run.results:
        return None
    rows = probes(run.results["victim"])
    names = [name for name in run.cfg.evals.probes if name in rows] or list(rows)
    return (names[0], rows[names[0]]) if names else None


def headline(run: Run) -> str:
    """What the run shows, with intervals; a backdoor is claimed on the excess alone."""
    found = protocol_row(run)
    if found is None:
        return "This run is not evaluated yet: there is no results.json."
    probe, row = found
    accuracy = (f"Clean accuracy is {_rate(row, 'clean_accuracy')}, by {probe.replace('_', ' ')}.")
    if row.get("attack_success_rate") is None:
        return accuracy + " No trigger was tested."
    target = run.summary["target_class"] if run.summary else run.cfg.attack.target
    success = (f"{_rate(row, 'attack_success_rate')} of {row['n']['attack_success_rate']:,} "
               f"triggered test images of other classes are taken for “{target}”")
    if "excess" not in row:
        return f"{success[0].upper()}{success[1:]}. {accuracy}"
    low, high = row["intervals"]["excess"]
    rival = RIVALS[row["excess_over"]]
    excess = (f"an excess of {number(row['excess'], signed=True)} points ({number(low)} to "
              f"{number(high)}) over {rival}")
    caveat = (" No control was trained, so a part of this may be what the trigger does to any "
              "encoder." if row["excess_without_control"] else "")
    if low > 0:
        return f"The backdoor works: {success}, {excess}. {accuracy}{caveat}"
    return (f"No backdoor is shown: {success}, {excess}, whose interval reaches zero or below. "
            f"{accuracy}{caveat}")


def name_of(encoder: str) -> str:
    """How a table calls an encoder."""
    return ENCODERS.get(encoder, f"after {encoder}")


def _rate(row, name):
    low, high = row["intervals"][name]
    return f"{number(row[name])}\N{NO-BREAK SPACE}% ({number(low)} to {number(high)})"
