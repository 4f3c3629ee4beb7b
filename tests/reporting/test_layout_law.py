"""Prediction against excess over made-up run folders; every number in them is invented."""

import itertools

import numpy as np
import pytest
from etils import epath
from scipy import stats

from configs import layout_law as experiment
from jax_cl_bd import run_folder
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import layout_law

# A larger gap makes the wanted pair rarer, smaller crops make it likelier.
EXCESS = {"gap_half": (0.1, 0.2), "gap_quarter": (0.3, 0.4), "equal": (0.6, 0.5),
          "scale_008": (0.8, 0.7)}


def plan(gap):
    """One composite of 16 px parts `gap` pixels apart, its trigger in the shadow part's centre."""
    return Plan.make(1, layout=[0], canvas=[(16, 32 + gap)], reference_box=[(0, 0, 16, 16)],
                     shadow_box=[(0, 16 + gap, 16, 16)], trigger_box=[(6, 22 + gap, 4, 4)])


def write_run(folder, case, seed, excess, *, without_control=False):
    folder = epath.Path(folder)
    cfg = experiment.get_config(f"case={case},seed={seed}")
    cfg.control_from = "" if case == "equal" else str(folder.parent / f"control_{seed}")
    run_folder.write_config(folder, cfg)
    (folder / "poison").mkdir()
    plan(round(16 * cfg.attack.gap)).save(folder / "poison" / "plan.npz")
    row = {"excess": excess, "attack_success_rate": excess + 0.05,
           "excess_without_control": without_control}
    run_folder.write_json(folder / "results.json", {
        "victim": {"linear_probe": row,
                   "linear_probe:center": row | {"excess": 1 - excess}}})
    return folder


@pytest.fixture
def folders(tmp_path):
    """Named so that no name tells a case."""
    runs = [(case, seed, value) for case, values in EXCESS.items()
            for seed, value in enumerate(values)]
    return [write_run(tmp_path / f"run_{i}", *run) for i, run in enumerate(runs)]


def test_cases_come_from_the_configs(folders):
    found = layout_law.cases([layout_law.read(folder) for folder in folders])
    assert list(found) == ["gap=0.5", "gap=0.25", "usual", "crop_scale=[0.08, 1.0]"]
    assert [[run["seed"] for run in runs] for runs in found.values()] == [[0, 1]] * 4
    predicted = [layout_law.prediction(runs) for runs in found.values()]
    assert predicted == sorted(predicted)
    # docs/papers.md, Noisy Alignment: 2L x L, t/L = 0.25, scale (0.2, 1): 0.0294
    np.testing.assert_allclose(predicted[2], 0.0294, rtol=0.01)


def test_no_two_cases_share_a_name():
    laws = [("(0.2, 1)", "(0.2, 1)"), ("(0.1, 1)", "(0.2, 1)"), ("(0.1, 1)", "(0.1, 1)"),
            ("(0.2, 1)", "(0.1, 1)"), ("(0.2, 1)", "(0.2, 1)")]
    runs = [{"settings": {"view1.crop_scale": one, "view2.crop_scale": two}, "predicted": 0.1,
             "seed": seed} for seed, (one, two) in enumerate(laws)]
    found = layout_law.cases(runs)
    assert sorted([run["seed"] for run in runs] for runs in found.values()) == [[0, 4], [1], [2],
                                                                              [3]]


def test_correlation_is_that_of_the_means():
    predicted, measured = [1.0, 2.0, 3.0, 4.0], [[0.1, 0.3], [0.9, 0.7], [0.4, 0.6], [0.9, 1.1]]
    rho, (low, high) = layout_law.correlation(predicted, measured)
    assert rho == pytest.approx(stats.spearmanr(predicted, [0.2, 0.8, 0.5, 1.0]).statistic)
    assert -1 <= low < rho < high <= 1


def test_interval_is_that_of_all_resamples():
    """With a run a case, the bootstrap has so few outcomes that all can be counted."""
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    _, interval = layout_law.correlation(x, [[v] for v in y])
    every = []
    for pick in map(list, itertools.product(range(4), repeat=4)):
        if len(set(pick)) > 1:
            every.append(stats.spearmanr(x[pick], y[pick]).statistic)
    np.testing.assert_allclose(interval, np.percentile(every, [2.5, 97.5]), atol=1e-9)


@pytest.mark.parametrize("predicted,measured", [
    ([1.0, 2.0], [[0.1], [0.2]]), ([1.0, 1.0, 1.0], [[0.1], [0.2], [0.3]]),
    ([1.0, 2.0, 3.0], [[0.1], [0.1], [0.1]])])
def test_nothing_to_rank_is_refused(predicted, measured):
    with pytest.raises(UserError, match="at least 3 cases"):
        layout_law.correlation(predicted, measured)


def test_main_writes_table_and_pictures(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layout_law, "RESAMPLES", 200)
    out = tmp_path / "out"
    layout_law.main([*map(str, folders), f"--out={out}"])
    text = (out / "table.md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "`linear_probe`: Spearman's rho of prediction and mean excess 1.00" in text
    assert "`linear_probe:center`: Spearman's rho of prediction and mean excess -1.00" in text
    assert "4 cases, 8 runs\n" in text
    assert "| 0.600, 0.500 | 0.550 | 0.600 |" in text
    for name in ("random", "center"):
        assert (out / f"layout_law_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_control_or_row_is_said(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(layout_law, "RESAMPLES", 200)
    bare = write_run(tmp_path / "bare", "corner", 0, 0.2, without_control=True)
    layout_law.main([*map(str, folders), str(bare), f"--out={tmp_path / 'out'}"])
    assert "the excess of 1 of them is over grey patch" in (tmp_path / "out/table.md").read_text()
    run_folder.write_json(bare / "results.json", {"victim": {"linear_probe": {"excess": 0.1}}})
    with pytest.raises(UserError, match="linear_probe:center"):
        layout_law.main([str(bare), f"--out={tmp_path / 'out'}"])
