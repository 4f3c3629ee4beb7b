"""Rates, intervals and excess on predictions made by hand."""

import numpy as np
import pytest
from scipy import stats

from jax_cl_bd.evals import attack_metrics


@pytest.mark.parametrize("hits,total", [(0, 7), (7, 7), (3, 7), (1, 1000), (450, 4950), (0, 1)])
def test_wilson_matches_scipy(hits, total):
    reference = stats.binomtest(hits, total).proportion_ci(method="wilson")
    np.testing.assert_allclose(attack_metrics.wilson(hits, total),
                               [reference.low, reference.high], rtol=1e-9, atol=1e-12)


def test_wilson_of_nothing_is_everything():
    assert attack_metrics.wilson(0, 0) == [0.0, 1.0]


# Ten test images, target 0; the first two are of the target class.
LABELS = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
PREDICTIONS = {
    "clean": np.array([0, 1, 1, 1, 1, 0, 2, 2, 2, 1]),
    "triggered": np.array([0, 0, 0, 0, 0, 1, 0, 0, 2, 2]),
    "occluded": np.array([0, 0, 0, 1, 1, 1, 0, 2, 2, 2]),
    "wrong": np.array([0, 0, 0, 0, 0, 1, 2, 2, 2, 2]),
}


def test_figures_by_hand():
    row = attack_metrics.figures(PREDICTIONS, LABELS, 0)
    assert row["clean_accuracy"] == 0.7
    assert row["triggered_accuracy"] == 0.5
    assert row["attack_success_rate"] == 5 / 8
    assert row["target_false_positives"] == 5
    assert row["clean_target_rate"] == 1 / 8
    assert row["occlusion_rate"] == 2 / 8
    assert row["wrong_trigger_rate"] == 3 / 8
    assert row["n"]["clean_accuracy"] == row["n"]["triggered_accuracy"] == 10
    assert row["n"]["attack_success_rate"] == row["n"]["occlusion_rate"] == 8
    for name, (low, high) in row["intervals"].items():
        assert row[name] == row["hits"][name] / row["n"][name]
        assert low < row[name] < high
    reference = stats.binomtest(5, 8).proportion_ci(method="wilson")
    np.testing.assert_allclose(row["intervals"]["attack_success_rate"], reference, rtol=1e-9)


def test_target_images_never_count_as_success():
    predictions = {name: np.zeros(10, int) for name in PREDICTIONS}
    predictions["triggered"] = np.where(LABELS == 0, 0, LABELS)
    assert attack_metrics.figures(predictions, LABELS, 0)["attack_success_rate"] == 0


def test_untriggered_model_has_asr_near_chance():
    # A model blind to the trigger that guesses among 10 classes: ASR equals the clean target rate.
    rng = np.random.default_rng(0)
    labels, guess = rng.integers(10, size=20_000), rng.integers(10, size=20_000)
    row = attack_metrics.figures({v: guess for v in PREDICTIONS}, labels, 3)
    assert row["attack_success_rate"] == row["clean_target_rate"]
    low, high = row["intervals"]["attack_success_rate"]
    assert low < 0.1 < high
    assert attack_metrics.add_excess(row, dict(row))["excess"] == 0


def test_excess_subtracts_the_largest():
    control = attack_metrics.figures({**PREDICTIONS, "triggered": PREDICTIONS["occluded"]},
                                     LABELS, 0)
    row = attack_metrics.add_excess(attack_metrics.figures(PREDICTIONS, LABELS, 0), control)
    assert row["excess"] == 5 / 8 - 3 / 8
    assert row["excess_over"] == "wrong_trigger_rate"
    assert row["excess_without_control"] is False
    control["attack_success_rate"], control["intervals"]["attack_success_rate"] = 0.5, [0.2, 0.8]
    row = attack_metrics.add_excess(attack_metrics.figures(PREDICTIONS, LABELS, 0), control)
    assert row["excess"] == 5 / 8 - 0.5
    assert row["excess_over"] == "control"


def test_excess_without_control_says_so():
    row = attack_metrics.add_excess(attack_metrics.figures(PREDICTIONS, LABELS, 0), None)
    assert row["excess"] == 0.25
    assert row["excess_without_control"] is True


def test_excess_interval_is_newcombes():
    # Newcombe 1998, table II, case (a): 56/70 against 48/80 has [0.0524, 0.3339].
    row = {"attack_success_rate": 56 / 70, "occlusion_rate": 48 / 80,
           "intervals": {"attack_success_rate": attack_metrics.wilson(56, 70),
                         "occlusion_rate": attack_metrics.wilson(48, 80)}}
    attack_metrics.add_excess(row, None)
    np.testing.assert_allclose(row["intervals"]["excess"], [0.0524, 0.3339], atol=5e-5)


def test_clean_only_run_has_no_attack_figures():
    row = attack_metrics.figures({"clean": PREDICTIONS["clean"]}, LABELS, 0)
    assert "attack_success_rate" not in row and "target_false_positives" not in row
    assert "excess" not in attack_metrics.add_excess(row, None)


def test_only_target_images_gives_an_unknown_rate():
    row = attack_metrics.figures({v: np.zeros(3, int) for v in PREDICTIONS}, np.zeros(3, int), 0)
    assert row["attack_success_rate"] is None
    assert row["n"]["attack_success_rate"] == 0
    assert "excess" not in attack_metrics.add_excess(row, None)
