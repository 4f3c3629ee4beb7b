"""Tables over seeds against NumPy and SciPy, from made-up run folders."""

import csv

import numpy as np
import pytest
from etils import epath
from scipy import stats

from jax_cl_bd import report, run_folder
from jax_cl_bd.errors import UserError
from tests.reporting.made_up import Page, config, write_run


def write_many(tmp_path, asrs):
    """(seed, target, objective) -> attack success rate."""
    folders = []
    for i, ((seed, target, objective), asr) in enumerate(asrs.items()):
        folders.append(write_run(tmp_path / f"r{i}", config(seed, target, objective), asr=asr,
                                 whole=False))
    return folders


def rows_of(out):
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def pick(rows, **names):
    found = [r for r in rows if all(names[n] in r[n] for n in names if n == "group")
             and all(r[n] == names[n] for n in names if n != "group")]
    assert len(found) == 1, (names, len(found))
    return found[0]


def test_seeds_are_summarised_as_numpy_and_scipy_do(tmp_path, capsys):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.9, (1, 3, "simclr"): 0.7,
                                    (2, 3, "simclr"): 0.8, (0, 3, "byol"): 0.3,
                                    (1, 3, "byol"): 0.2})
    out = epath.Path(tmp_path / "out")
    report.main([*map(str, folders), f"--out={out}"])
    printed = capsys.readouterr().out
    assert printed.strip() == (out / "table.md").read_text().strip()
    rows = rows_of(out)
    results = [run_folder.read_json(f / "results.json") for f in folders]
    for group, members in (("simclr", results[:3]), ("byol", results[3:])):
        for probe, name in (("knn", "attack_success_rate"), ("linear_probe:center", "excess")):
            x = np.array([r["victim"][probe][name] for r in members])
            row = pick(rows, group=group, encoder="victim", probe=probe, figure=name)
            low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
            np.testing.assert_allclose([float(row[c]) for c in ("mean", "std", "low", "high")],
                                       [x.mean(), x.std(ddof=1), low, high], rtol=1e-12)
            assert (row["unit"], int(row["n"])) == ("seeds", len(x))
            np.testing.assert_allclose([float(p.split("=")[1]) for p in row["points"].split()], x)
    paired = pick(rows, group="simclr", encoder="victim - control", probe="knn",
                  figure="attack_success_rate")
    d = np.array([r["victim"]["knn"]["attack_success_rate"]
                  - r["control"]["knn"]["attack_success_rate"] for r in results[:3]])
    test = stats.ttest_rel([r["victim"]["knn"]["attack_success_rate"] for r in results[:3]],
                           [r["control"]["knn"]["attack_success_rate"] for r in results[:3]])
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose([float(paired[c]) for c in ("mean", "std", "low", "high")],
                               [d.mean(), d.std(ddof=1), interval.low, interval.high], rtol=1e-9)
    assert any(r["encoder"] == "distill - victim" for r in rows)
    assert f"{100 * np.mean(d):+.1f}" in printed
    page = Page((out / "index.html").read_text())
    assert len(page.images) == 2 and all(i["src"].startswith("data:") for i in page.images)
    assert "2 groups" in page.text


def test_targets_are_averaged_within_a_seed(tmp_path):
    asrs = {(s, t, "simclr"): 0.1 + 0.2 * s + 0.1 * t for s in (0, 1) for t in (3, 5)}
    folders = write_many(tmp_path, asrs)
    report.compare(folders, epath.Path(tmp_path / "out"))
    row = pick(rows_of(epath.Path(tmp_path / "out")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    x = [run_folder.read_json(f / "results.json")["victim"]["knn"]["attack_success_rate"]
         for f in folders]
    seeds = np.reshape(x, (2, 2)).mean(1)
    assert (row["unit"], row["n"]) == ("seeds", "2")
    np.testing.assert_allclose([float(row["mean"]), float(row["std"])],
                               [seeds.mean(), seeds.std(ddof=1)], rtol=1e-12)
    assert len(row["points"].split()) == 4

    report.compare(folders[:2], epath.Path(tmp_path / "one"))  # one seed: over targets
    row = pick(rows_of(epath.Path(tmp_path / "one")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    assert (row["unit"], row["n"]) == ("targets", "2")
    np.testing.assert_allclose(float(row["std"]), np.std(x[:2], ddof=1), rtol=1e-12)


def test_single_run_has_no_deviation(tmp_path):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.5})
    text = report.compare(folders, epath.Path(tmp_path / "out"))
    assert "±" not in text.replace(report.many_runs.NOTE, "").replace("mean ± deviation", "")
    row = pick(rows_of(epath.Path(tmp_path / "out")), encoder="victim", probe="knn",
               figure="attack_success_rate")
    assert row["std"] == row["low"] == row["high"] == ""


def test_incomplete_runs_are_listed(tmp_path):
    folders = write_many(tmp_path, {(0, 3, "simclr"): 0.5, (1, 3, "simclr"): 0.6})
    (folders[1] / "results.json").unlink()
    nothing = epath.Path(tmp_path / "nothing")
    nothing.mkdir()
    out = epath.Path(tmp_path / "out")
    text = report.compare([*folders, nothing], out)
    assert "1 run (seed" in text and "Incomplete" in text
    for folder in (folders[1], nothing):
        assert str(folder) in text and str(folder) in (out / "index.html").read_text()
    with pytest.raises(UserError, match="no complete run"):
        report.compare([nothing], out)


def test_groups_differ_by_any_other_setting(tmp_path):
    one, two = config(), config(seed=1)
    two.attack.poisons = 80
    folders = [write_run(tmp_path / "a", one, whole=False),
               write_run(tmp_path / "b", two, whole=False)]
    text = report.compare(folders, epath.Path(tmp_path / "out"))
    assert "attack.poisons=40" in text and "attack.poisons=80" in text


def test_folders_that_each_seed_names_for_itself_make_no_groups(tmp_path):
    folders = []
    for seed in (0, 1, 2):
        cfg = config(seed)
        cfg.control_from = str(tmp_path / f"clean_{seed}")
        cfg.attack.trigger_from, cfg.attack.surrogate = f"trigger_{seed}", f"surrogate_{seed}"
        folders.append(write_run(tmp_path / f"r{seed}", cfg, whole=False))
    out = epath.Path(tmp_path / "out")
    text = report.compare(folders, out)
    row = pick(rows_of(out), encoder="victim", probe="knn", figure="excess")
    assert (row["unit"], row["n"]) == ("seeds", "3")
    assert "another run's control: 0/3 by clean_0; 1/3 by clean_1" in text


def test_defenses_are_grouped_by_their_own_settings(tmp_path):
    """Whatever defense each folder's config names last."""
    folders = []
    for seed, last, fraction in ((0, "distill", 0.25), (1, "retrain", 0.25), (2, "distill", 0.05)):
        cfg = config(seed)
        cfg.defense.name = last
        folders.append(write_run(tmp_path / f"r{seed}", cfg, whole=False))
        run_folder.write_json(folders[-1] / "defenses" / "distill" / "settings.json",
                              {"seed": seed, "control_from": f"c{seed}", "defense.name": "distill",
                               "defense.clean_fraction": fraction})
    out = epath.Path(tmp_path / "out")
    report.compare(folders, out)
    rows = rows_of(out)
    assert len({r["group"] for r in rows}) == 1
    seeds = {r["encoder"]: [p.split("/")[0] for p in r["points"].split()] for r in rows}
    assert seeds["victim"] == seeds["victim - control"] == ["0", "1", "2"]
    for tail in ("", " of control", " - victim"):
        assert seeds[f"distill [defense.clean_fraction=0.25]{tail}"] == ["0", "1"]
        assert seeds[f"distill [defense.clean_fraction=0.05]{tail}"] == ["2"]


def test_a_defended_victim_is_paired_with_the_defended_control(tmp_path):
    folders = write_many(tmp_path, {(s, 3, "simclr"): 0.7 + 0.1 * s for s in (0, 1, 2)})
    out = epath.Path(tmp_path / "out")
    text = report.compare(folders, out)
    results = [run_folder.read_json(f / "results.json")["defenses"]["distill"] for f in folders]
    x = [r["knn"]["attack_success_rate"] for r in results]
    y = [r["control"]["knn"]["attack_success_rate"] for r in results]
    test = stats.ttest_rel(x, y)
    interval = test.confidence_interval(0.95)
    names = dict(probe="knn", figure="attack_success_rate")
    row = pick(rows_of(out), encoder="distill - distill of control", **names)
    np.testing.assert_allclose([float(row[c]) for c in ("mean", "low", "high")],
                               [np.mean(x) - np.mean(y), interval.low, interval.high], rtol=1e-9)
    row = pick(rows_of(out), encoder="distill of control", **names)
    np.testing.assert_allclose(float(row["mean"]), np.mean(y), rtol=1e-12)
    assert "| distill - distill of control |" in text


def test_many_folders_need_a_place(tmp_path):
    two = [tmp_path / "runs" / name for name in ("a", "b")]
    for folder in two:
        folder.mkdir(parents=True)
    with pytest.raises(UserError, match="--out"):
        report.main([str(folder) for folder in two])


def test_a_run_counts_once_and_must_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run_0", "run_1"):
        (tmp_path / name).mkdir()
    for folders, says in ((["run_0", "run_1", f"{tmp_path}/run_0/"], "given twice, the first time"),
                          (["run_0", "rnu_1"], "'rnu_1' does not exist; did you mean 'run_1'"),
                          (["run_0", "zzz"], "'zzz' does not exist$"),
                          (["nowhere/run_0"], "does not exist")):
        with pytest.raises(UserError, match=says):
            report.main([*folders, "--out=out"])
    assert not (tmp_path / "out").exists()
