"""Thresholds and surpluses hold their rates on clean draws; what was made is not made again."""

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from jax_cl_bd.defenses import _detection, _vetting


@pytest.mark.parametrize("clean, false_alarm, place, rate", [
    (19, 0.05, 1, 1 / 20), (39, 0.05, 2, 2 / 40), (40, 0.05, 2, 2 / 41), (2, 0.5, 1, 1 / 3)])
def test_the_threshold_is_the_kth_largest_clean_score(clean, false_alarm, place, rate):
    scores = np.random.default_rng(0).permutation(clean) / 100
    limit, got, by = _vetting.threshold(scores, false_alarm)
    assert limit == sorted(scores)[-place] and got == pytest.approx(rate) and by == "ranks"


def test_a_few_clean_scores_are_taken_for_normal():
    scores = np.array([0.8948, 0.8970, 0.9059])
    limit, rate, by = _vetting.threshold(scores, 0.05)
    # t of 2 degrees of freedom at 0.95 is 2.919986 in every table.
    assert limit == pytest.approx(scores.mean() + 2.919986 * scores.std(ddof=1) * (4 / 3)**0.5)
    assert rate == 1 / 4 and by == "normal"
    assert _vetting.threshold(np.array([0.2, 0.2]), 0.05)[0] == 0.2
    wide = np.array([0.0, 0.0, 0.0, 0.0, 1.0])  # never below the largest
    assert _vetting.threshold(wide, 0.16)[0] == 1.0


def test_clean_scores_exceed_the_threshold_at_the_rate_that_is_stated():
    rng = np.random.default_rng(1)

    def above(draws):
        return np.mean([row[0] > _vetting.threshold(row[1:], 0.1)[0] for row in draws])

    assert _vetting.threshold(np.arange(29.0), 0.1)[1:] == (pytest.approx(0.1), "ranks")
    assert above(rng.exponential(size=(20_000, 30))) == pytest.approx(0.1, abs=0.007)
    assert above(rng.normal(size=(20_000, 4))) == pytest.approx(0.1, abs=0.01)
    assert above(rng.exponential(size=(20_000, 4))) < 1 / 4


def test_a_surplus_is_as_likely_as_simulated_and_grows_with_what_is_flagged():
    rng = np.random.default_rng(2)
    rows, clean_rows, alarm = 300, 150, 0.05
    flagged = np.array([_detection.judge(rng.normal(size=rows), rng.normal(size=clean_rows), alarm)
                        ["flagged"] for _ in range(4000)])
    for count in (10, 20, 30):
        p, mean = _vetting.surplus(count, rows, clean_rows, alarm)
        assert p == pytest.approx(np.mean(flagged >= count), abs=0.025)
        assert mean == pytest.approx(flagged.mean(), abs=1)
    values = [_vetting.surplus(count, rows, clean_rows, alarm)[0] for count in (0, 5, 20, 60, 200)]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)
    assert values[-1] < 1e-9


def test_what_was_made_for_the_same_facts_is_kept(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"score": len(made)}

    place = epath.Path(tmp_path)
    facts = {"settings": {"milestones": (0.2, 0.5)}}
    assert _vetting.kept(place, facts, make) == {"score": 1}
    assert _vetting.kept(place, facts, make) == {"score": 1} and made == [0]
    assert _vetting.kept(place, facts | {"seed": 1}, make) == {"score": 2}


def test_a_detector_reads_its_own_settings():
    cfg = ConfigDict({"seed": 3, "defense": {"name": "vet", "decree": {"steps": 7}}})
    own = _vetting.part(cfg, "decree", clean_fraction=1.0)
    assert own.seed == 3
    assert own.defense.to_dict() == {"steps": 7, "name": "decree", "clean_fraction": 1.0}
    own.defense.steps = 8
    assert cfg.defense.decree.steps == 7
