"""Tables that several sections of a report have."""

from collections.abc import Sequence

from jax_cl_bd.reporting import differences, html, words
from jax_cl_bd.reporting.html import percent

COLUMNS = (("clean_accuracy", "clean accuracy"), ("triggered_accuracy", "triggered accuracy"),
           ("attack_success_rate", "attack success rate"),
           ("clean_target_rate", "clean target rate"), ("occlusion_rate", "occlusion rate"),
           ("wrong_trigger_rate", "wrong trigger rate"), ("same_kind_rate", "same kind rate"),
           ("excess", "excess"))


def heading(name: str, rows: dict) -> str:
    """Probe, placement and settings of one table."""
    protocol = next(iter(rows.values())).get("protocol", {})
    probe, _, placement = name.partition(":")
    placement = placement or protocol.get("placement", "")
    wording, split = "", protocol.get("split", "")
    if split:
        placement, split = protocol.get("placement", ""), f"test split “{split}”"
    if probe == "zero_shot":  # no labelled image is used
        wording = (f"{protocol['templates']} {'held-out ' if placement == 'held_out' else ''}"
                   "templates" if "templates" in protocol else "")
        placement = protocol.get("placement", "") if placement == "held_out" else placement
        protocol = {}
    known = [f"trigger {'at the centre' if placement == 'center' else 'at random places'}"
             if placement in ("random", "center") else "", wording,
             f"{protocol['labelled_rows']:,} labelled images" if "labelled_rows" in protocol
             else "", f"k = {protocol['k']}" if "k" in protocol else ""]
    return " · ".join(filter(None, (words.probe_name(probe), split, *known)))


def rates_table(rows: dict[str, dict], names: dict[str, str] | None = None) -> str:
    """Encoders as rows, rates with intervals as columns, false positives as counts."""
    columns = [(key, label) for key, label in COLUMNS if any(key in r for r in rows.values())]
    body = []
    for encoder, row in rows.items():
        cells = [percent(row.get(key), row["intervals"].get(key), signed=key == "excess")
                 if row.get(key) is not None else "–" for key, _ in columns]
        if "target_false_positives" in row:
            cells.append(f"{row['target_false_positives']:,} of "
                         f"{row['n']['attack_success_rate']:,}")
        body.append([(names or {}).get(encoder, words.name_of(encoder)), *cells])
    header = ["encoder", *(label for _, label in columns)]
    if any("target_false_positives" in r for r in rows.values()):
        header.append("target false positives")
    body = [cells + ["–"] * (len(header) - len(cells)) for cells in body]
    return html.table(header, body)


def differences_table(rows: dict[str, dict]) -> str:
    """Each encoder against its control, with intervals; empty without a control."""
    body = []
    for one, other in differences.compared(rows):
        found = [differences.newcombe(rows[one], rows[other], key)
                 for key, _ in differences.FIGURES]
        body.append([f"{words.name_of(one)} \N{MINUS SIGN} {words.name_of(other)}",
                     *(percent(d[0], d[1:], signed=True) if d else "–" for d in found)])
    return html.table(["difference", *(name for _, name in differences.FIGURES)],
                      body) if body else ""


def flat(tree: dict, prefix: str = "") -> Sequence[tuple[str, object]]:
    """Nested settings as (dotted name, value)."""
    out = []
    for key, value in tree.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value))
    return out
