"""What a backdoor does to a classifier: rates over the test images, with counts and intervals.

Sources: confusion-matrix measures of Saha et al. (Backdoor Attacks on Self-Supervised Learning,
CVPR 2022; FP of the target is their attack measure); Wilson (1927) for the interval of a rate;
Newcombe (1998, method 10) for the interval of a difference of two rates.
"""

import numpy as np

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

_RATE_OF_VARIANT = {
    "triggered": "attack_success_rate",
    "clean": "clean_target_rate",
    "occluded": "occlusion_rate",
    "wrong": "wrong_trigger_rate",
    "same_kind": "same_kind_rate",
}


def wilson(hits: int, total: int) -> list[float]:
    """95 % Wilson score interval [low, high] of a rate; [0, 1] when nothing was counted."""
    if total == 0:
        return [0.0, 1.0]
    p, z2 = hits / total, _Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * np.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == total else min(1.0, centre + half)
    return [float(low), float(high)]


def figures(predictions: dict[str, np.ndarray], labels: np.ndarray, target: int) -> dict:
    """Measures one placement of the trigger.

    Args:
        predictions: predicted class [N] for "clean" and, where tested, for the same images as
            "triggered", "occluded" (grey patch at the same boxes), "wrong" (another trigger) and
            "same_kind" (others of the trigger's own kind; no part of the excess, since answering
            to them too is what a backdoor with a loose idea of its trigger does).
        labels: true class [N].
        target: class the attack aims at.

    Returns:
        clean_accuracy and triggered_accuracy over all N images (target class included);
        attack_success_rate, clean_target_rate, occlusion_rate and wrong_trigger_rate: share
        predicted as the target among the images of every other class;
        target_false_positives: the numerator of attack_success_rate;
        hits, n, intervals: numerator, denominator and 95 % Wilson interval of every rate.
    """
    labels = np.asarray(labels)
    others = labels != target
    counted = {}
    for variant, name in (("clean", "clean_accuracy"), ("triggered", "triggered_accuracy")):
        if variant in predictions:
            counted[name] = (np.sum(predictions[variant] == labels), len(labels))
    for variant, name in _RATE_OF_VARIANT.items():
        if variant in predictions:
            counted[name] = (np.sum(predictions[variant][others] == target), np.sum(others))

    # A rate over no images (every test image is of the target class) is unknown, not zero.
    row = {name: float(h / n) if n else None for name, (h, n) in counted.items()}
    if "attack_success_rate" in counted:
        row["target_false_positives"] = int(counted["attack_success_rate"][0])
    row["hits"] = {name: int(h) for name, (h, _) in counted.items()}
    row["n"] = {name: int(n) for name, (_, n) in counted.items()}
    row["intervals"] = {name: wilson(int(h), int(n)) for name, (h, n) in counted.items()}
    return row


def add_excess(victim_row: dict, control_row: dict | None) -> dict:
    """Sets `excess`: what of the attack success rate nothing harmless explains.

    excess = attack_success_rate - max(occlusion_rate, wrong_trigger_rate, the control's
    attack_success_rate). `excess_over` names the largest; its 95 % interval is Newcombe's for
    the difference of two independent rates (the images are the same, so it is on the wide side;
    it does not count that the largest of three was taken).

    Args:
        victim_row: from `figures`; changed in place and returned. Without a trigger it stays as
            it is.
        control_row: the control's row of the same probe and placement, or None: then
            `excess_without_control` is true and only the first two are subtracted.
    """
    if victim_row.get("attack_success_rate") is None:
        return victim_row
    rivals = {name: (victim_row[name], victim_row["intervals"][name])
              for name in ("occlusion_rate", "wrong_trigger_rate") if name in victim_row}
    if control_row is not None:
        rivals["control"] = (control_row["attack_success_rate"],
                             control_row["intervals"]["attack_success_rate"])
    victim_row["excess_without_control"] = control_row is None
    if not rivals:
        return victim_row
    name = max(rivals, key=lambda r: rivals[r][0])
    own = victim_row["attack_success_rate"], victim_row["intervals"]["attack_success_rate"]
    victim_row["excess"] = own[0] - rivals[name][0]
    victim_row["excess_over"] = name
    victim_row["intervals"]["excess"] = newcombe(own, rivals[name])
    return victim_row


def newcombe(one: tuple, other: tuple) -> list[float]:
    """95 % interval of a rate minus another, both (rate, its Wilson interval).

    Source: Newcombe (Interval estimation for the difference between independent proportions, 1998,
    method 10).
    """
    (p1, (l1, u1)), (p2, (l2, u2)) = one, other
    return [float(p1 - p2 - np.hypot(p1 - l1, u2 - p2)),
            float(p1 - p2 + np.hypot(u1 - p1, p2 - l2))]


def rows(probe: str, predict, data, encoder, **notes) -> dict[str, dict]:
    """Runs a trained probe on the clean test images and on every placement of the trigger.

    Args:
        probe: name of the row; the protocol's placement (the first) has this bare name, others
            `<probe>:<placement>`.
        predict: features [N, D] -> predicted class [N].
        data: EvalData.
        encoder: has `.image`.
        **notes: settings of the probe, stored in each row.
    """
    clean = predict(data.features(encoder, "test"))
    table = {}
    for i, placement in enumerate(data.placements or ("none",)):
        predictions = {"clean": clean}
        for variant in data.variant_names:
            predictions[variant] = predict(data.features(encoder, f"{placement}/{variant}"))
        row = figures(predictions, data.test_labels, data.target)
        row["protocol"] = {"placement": placement, "labelled_rows": len(data.train_labels),
                           **notes}
        table[probe if i == 0 else f"{probe}:{placement}"] = row
    return table
