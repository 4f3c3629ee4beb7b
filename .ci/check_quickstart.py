"""Asserts what the quickstart must show: python .ci/check_quickstart.py RESULTS_JSON"""

import json
import sys

# Another kind or number of CPU threads gives other bits, and here other outcomes, as another seed
# does. Of six seeds (docs/results.md) the weakest had excess 0.037 at random places and an attack
# success rate of 0.207 at the centre, the strongest control 0.000 and 0.054: the limits lie
# between.
CLEAN_ACCURACY, EXCESS, CENTRE_RATE = 0.90, 0.02, 0.15
PROBES = ("linear_probe", "linear_probe:center")
INTERVALS = ("clean_accuracy", "attack_success_rate", "excess")


def faults(results: dict) -> list[str]:
    """What is missing or too small, a line each."""
    distilled = results.get("defenses", {}).get("distill", {})
    encoders = {name: results.get(name, {}) for name in ("victim", "control", "untrained")}
    encoders |= {"distilled victim": distilled, "distilled control": distilled.get("control", {})}
    missing = [f"{name}: {probe} has no {figure} with its interval"
               for name, rows in encoders.items() for probe in PROBES for figure in INTERVALS
               if not has(rows.get(probe, {}), figure)]
    if missing:
        return missing
    random, centre = (encoders["victim"][probe] for probe in PROBES)
    found = (("clean accuracy", random["clean_accuracy"] >= CLEAN_ACCURACY,
              random["clean_accuracy"], f"at least {CLEAN_ACCURACY}"),
             ("excess at random places", random["excess"] > EXCESS, random["excess"],
              f"above {EXCESS}"),
             ("attack success rate at the centre", centre["attack_success_rate"] > CENTRE_RATE,
              centre["attack_success_rate"], f"above {CENTRE_RATE}"))
    return [f"victim: {name} is {value:.3f}, must be {limit}"
            for name, good, value, limit in found if not good]


def has(row: dict, figure: str) -> bool:
    return figure in row and len(row.get("intervals", {}).get(figure, ())) == 2


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        found = faults(json.load(file))
    print("\n".join(found) or "the quickstart shows what it must")
    sys.exit(bool(found))
