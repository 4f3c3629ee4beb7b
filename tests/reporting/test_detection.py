"""Encoders told apart over made-up run folders; every number in them is invented."""

import itertools
import json

import numpy as np
import pytest
from etils import epath

from configs import clip_scenes
from jax_cl_bd import run_folder
from jax_cl_bd.errors import UserError
from jax_cl_bd.reporting import detection


def write_run(folder, seed, victim, control, excess=0.9):
    """A finished run whose DECREE verdicts are the two given; control None: a clean run."""
    folder = epath.Path(folder)
    attack = "badnets" if control is not None else "none"
    cfg = clip_scenes.get_config(f"{attack},defense=decree,seed={seed}")
    run_folder.write_config(folder, cfg)
    for place in (folder, folder / "control") if control is not None else (folder,):
        settings = run_folder.settings_of(cfg, run_folder.PRETRAIN_GROUPS)
        run_folder.begin(place / "pretrain", settings)
        run_folder.finish(place / "pretrain", settings)
    (folder / "poison").mkdir()
    run_folder.write_json(folder / "poison" / "summary.json",
                          {"poisons": 0 if control is None else 8, "target_class": "star"})
    found = {"verdict": {"pl1": victim}}
    if control is not None:
        found["control"] = {"verdict": {"pl1": control}}
    rate = {"clean_accuracy": 0.9, "attack_success_rate": 0.9, "excess": excess}
    run_folder.write_json(folder / "results.json",
                          {"victim": {"zero_shot": rate}, "defenses": {"decree": found}})
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """Backdoored 0.01, 0.02, 0.08 and one that is too weak; clean 0.05, 0.09, 0.10, 0.2, 0.12."""
    return [write_run(tmp_path / "a", 0, 0.01, 0.05), write_run(tmp_path / "b", 1, 0.02, 0.09),
            write_run(tmp_path / "c", 2, 0.08, 0.10), write_run(tmp_path / "d", 3, 0.2, None),
            write_run(tmp_path / "weak", 4, 0.001, 0.12, excess=0.3)]


def calibration(tmp_path, count=10):
    return [write_run(tmp_path / f"known_{i}", 100 + i, 0.06 + 0.01 * i, None)
            for i in range(count)]


def test_scores_threshold_and_what_is_left_out(folders, tmp_path, capsys):
    known = calibration(tmp_path)
    detection.main([*folders, "--calibrate", *known, f"--out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out" / "detection.json").read_text())
    backdoored, clean = [0.01, 0.02, 0.08], [0.05, 0.09, 0.10, 0.2, 0.12]
    pairs = [float(b < c) for b, c in itertools.product(backdoored, clean)]
    assert found["auroc"] == pytest.approx(np.mean(pairs))
    assert (found["backdoored"], found["clean"], found["left_out"]) == (3, 5, 1)
    # An eleventh lies beyond the most suspicious of the ten known ones, 0.06, once in eleven.
    assert found["threshold"] == pytest.approx(-0.06)
    assert found["false_alarm"] == pytest.approx(1 / 11)
    assert found["true_positive_rate"] == pytest.approx(2 / 3)
    assert found["false_positive_rate"] == pytest.approx(1 / 5)
    assert found["auroc_interval"][0] <= found["auroc"] <= found["auroc_interval"][1]
    assert (tmp_path / "out" / "detection.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "0.0600" in said and said == (tmp_path / "out" / "table.md").read_text() + "\n"


def test_an_inversion_without_a_finding_is_the_least_suspicious(folders, tmp_path):
    folders.append(write_run(tmp_path / "nothing", 9, None, None))
    detection.main([*folders, "--calibrate", *calibration(tmp_path), f"--out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert found["clean"] == 6 and found["encoders"][-1]["score"] is None
    assert found["auroc"] == pytest.approx((15 * (14 / 15) + 3) / 18)


def test_a_shared_control_counts_once(tmp_path):
    home = write_run(tmp_path / "home", 0, 0.01, 0.05)
    other = write_run(tmp_path / "other", 1, 0.02, 0.05)
    cfg = run_folder.read_config(epath.Path(other))
    cfg.control_from = home
    run_folder.write_config(epath.Path(other), cfg)
    rows = [row for folder in (home, other)
            for row in detection.encoders(epath.Path(folder), "decree", 0.5)]
    assert len(rows) == 4 and len(detection.once(rows)) == 3


def test_what_cannot_be_judged_is_refused(folders, tmp_path):
    known = calibration(tmp_path)
    for arguments, says in (
            ([*folders, "--calibrate", *known[:4]], "4 clean encoders cannot set"),
            ([*folders, "--calibrate", *known[1:], folders[0]], "on both sides"),
            ([folders[3], "--calibrate", *known], "0 backdoored"),
            ([*folders, "--calibrate", *known, "--defense=decre"], "did you mean 'decree'"),
            ([*folders, "--calibrate", *known, "--false-alarm=1"], r"lie in \(0, 1\)")):
        with pytest.raises(UserError, match=says):
            detection.main([*arguments, f"--out={tmp_path / 'out'}"])
    path = epath.Path(folders[0]) / "results.json"
    for broken, says in (({"victim": {"zero_shot": {"clean_accuracy": 0.9}},
                           "defenses": {"decree": {"verdict": {"pl1": 0.1}}}}, "excess"),
                         ({"victim": {}, "defenses": {}}, "was not run there")):
        run_folder.write_json(path, broken)
        with pytest.raises(UserError, match=says):
            detection.main([*folders, "--calibrate", *known, f"--out={tmp_path / 'out'}"])
