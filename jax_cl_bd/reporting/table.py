"""The figures of a run as a few lines of text, for the terminal."""

from jax_cl_bd.reporting import differences, read, words
from jax_cl_bd.reporting.read import OF_CONTROL

COLUMNS = (("clean_accuracy", "clean acc"), ("attack_success_rate", "ASR"),
           ("clean_target_rate", "no trigger"), ("occlusion_rate", "grey patch"),
           ("wrong_trigger_rate", "wrong trig"), ("excess", "excess"))


def text(results: dict) -> str:
    """One line for each encoder under each probe, with fractions; the protocol's place first.

    Then what the attack success rate is above the control's, with its 95 % interval.
    """
    labels = {label: results[label] for label in ("victim", "control", "untrained")
              if label in results}
    for name, found in results.get("defenses", {}).items():
        labels[name] = found
        if "control" in found:
            labels[f"{name}{OF_CONTROL}"] = found["control"]
    # A repaired encoder may have a row that no other has, of a head of its own.
    probes = list(dict.fromkeys(name for rows in labels.values() for name in read.probes(rows)))
    width = max(len(name) for name in (*labels, *probes))
    lines = []
    for probe in probes:
        heads = "".join(f"{head:>12}" for _, head in COLUMNS)
        lines.append(f"\n{probe:{width}}{heads}" if lines else f"{probe:{width}}{heads}")
        for label, rows in labels.items():
            if probe in rows:
                cells = (rows[probe].get(name) for name, _ in COLUMNS)
                lines.append(f"{label:{width}}" + "".join(
                    f"{'-':>12}" if c is None else f"{c:12.3f}" for c in cells))
        rows = {label: found[probe] for label, found in labels.items() if probe in found}
        for one, other in differences.compared(rows):
            found = differences.newcombe(rows[one], rows[other], "attack_success_rate")
            if found is not None:
                lines.append("ASR, {} - {}: {:+.3f} [{:+.3f}, {:+.3f}]".format(one, other, *found))
    if borrowed := results.get("run", {}).get("control"):
        lines.append(f"control: {words.source(borrowed)}")
    return "\n".join(lines)
