"""The figures of a run as a few lines of text, for the terminal."""

COLUMNS = (("clean_accuracy", "clean acc"), ("attack_success_rate", "ASR"),
           ("clean_target_rate", "no trigger"), ("occlusion_rate", "grey patch"),
           ("wrong_trigger_rate", "wrong trig"), ("excess", "excess"))


def text(results: dict) -> str:
    """One line for each encoder under each probe, with fractions; the protocol's place first."""
    labels = {label: results[label] for label in ("victim", "control", "untrained")
              if label in results}
    for name, found in results.get("defenses", {}).items():
        labels[name] = found
        if "control" in found:
            labels[f"{name} of control"] = found["control"]
    width = max(len(label) for label in labels)
    lines = []
    for probe in (p for p, row in results["victim"].items() if "clean_accuracy" in row):
        heads = "".join(f"{head:>12}" for _, head in COLUMNS)
        lines.append(f"\n{probe:{width}}{heads}" if lines else f"{probe:{width}}{heads}")
        for label, rows in labels.items():
            if probe in rows:
                cells = (rows[probe].get(name) for name, _ in COLUMNS)
                lines.append(f"{label:{width}}" + "".join(
                    f"{'-':>12}" if c is None else f"{c:12.3f}" for c in cells))
    return "\n".join(lines)
