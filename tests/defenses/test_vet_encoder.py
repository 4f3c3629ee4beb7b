"""Vetting of hub folders: verdict, calibration that is kept, exit status, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from configs import vet_encoder as experiment
from jax_cl_bd import checks, parallel, run_folder, stages
from jax_cl_bd.data import sources
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.defenses import decree, vet_encoder
from jax_cl_bd.defenses.given import Given
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import hub_clip, start
from tests.defenses import small_repair
from tests.tiny_hub import made

ROOT = Path(__file__).parents[2]


def hub_folder(folder, scale=0.3, *, side=32, tokenizer=True):
    described, variables = made("clip", side=side, patch=16, vocab=300, context=12, end=1)
    hub_clip.save(folder, described, jax.tree.map(lambda a: np.float32(scale) * a, variables))
    if tokenizer:
        tokenizers.train(["a red star", "a photo of a circle"], 300).save(
            epath.Path(folder) / "tokenizer.json")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("hub")
    return {scale: hub_folder(home / f"{scale}", scale) for scale in (0.3, 0.31, 0.32)}


def config(victim, clean=(), **changes):
    cfg = experiment.get_config("debug")
    cfg.mesh.data = 1
    cfg.victim = victim
    cfg.defense.clean_encoders = tuple(clean)
    cfg.update_from_flattened_dict(changes)
    return stages.with_victim(cfg)


def vetted(cfg, folder):
    folder = epath.Path(folder)
    checks.check(cfg, list(stages.GROUPS))
    stages.run(cfg, folder, list(stages.GROUPS))
    return run_folder.read_json(folder / "defenses" / "vet_encoder" / "results.json")["verdict"]


def count_inversions(monkeypatch):
    calls, inner = [], decree.run

    def run(cfg, victims, *rest):
        calls.append(victims[0])
        return inner(cfg, victims, *rest)

    monkeypatch.setattr(decree, "run", run)
    return calls


def test_a_hub_folder_is_vetted_without_calibration_and_again_for_nothing(folders, tmp_path,
                                                                         monkeypatch, capsys):
    calls = count_inversions(monkeypatch)
    cfg = config(folders[0.3])
    assert cfg.model.name == "vit" and tuple(cfg.data.mean) == (0.5, 0.4, 0.3)
    verdict = vetted(cfg, tmp_path)
    assert not verdict["suspicious"] and not verdict["calibrated"]
    assert [f["detector"] for f in verdict["findings"]] and len(verdict["findings"]) == 2
    assert {f["threshold"] for f in verdict["findings"]} == {0.9, 0.5}
    assert any(what.startswith("no clean encoders") for what in verdict["not_checked"])
    assert any("source-specific" in what for what in verdict["not_checked"])
    assert "NOT CALIBRATED" in capsys.readouterr().out
    assert not stages.suspicious(cfg, epath.Path(tmp_path)) and len(calls) == 1
    page = (tmp_path / "report" / "index.html").read_text()
    assert "source-specific" in page and "Vetting of" in page
    assert vetted(config(folders[0.3]), tmp_path) == verdict and len(calls) == 1
    # Killed after the first detector: that one is not run again, and the verdict is the same.
    place = tmp_path / "defenses" / "vet_encoder"
    (place / "done.json").unlink()
    (place / "scan" / "found.json").unlink()
    assert vetted(config(folders[0.3]), tmp_path) == verdict and len(calls) == 1
    with pytest.raises(UserError, match="victim: .* there, .* now"):  # another encoder's verdict
        vetted(config(folders[0.31]), tmp_path)


@pytest.mark.slow
def test_calibration_by_two_encoders_is_kept(folders, tmp_path, monkeypatch):
    calls = count_inversions(monkeypatch)
    clean = [folders[0.31], folders[0.32]]
    home = {"defense.calibration": str(tmp_path / "scores")}
    verdict = vetted(config(folders[0.3], clean, **home), tmp_path / "run")
    assert verdict["calibrated"] and verdict["clean_encoders"] == 2 and len(calls) == 3
    assert verdict["smallest_false_alarm"] == pytest.approx(1 / 3)
    for found in verdict["findings"]:
        assert found["false_alarm"] == pytest.approx(1 / 3) and len(found["clean_scores"]) == 2
        assert found["threshold"] >= max(found["clean_scores"])
        assert found["threshold_by"] == "normal"
        assert found["suspicious"] == (found["score"] > found["threshold"])
    assert not any("no clean encoders" in what for what in verdict["not_checked"])
    # In another order, over the same folder: only what is new is computed, here nothing.
    cfg = config(folders[0.3], clean[::-1], **home)
    checks.check(cfg, ["defend"])
    stages.run(cfg, epath.Path(tmp_path / "run"), ["defend"], "defend")
    assert len(calls) == 4  # the suspect's own was dropped by --force
    (tmp_path / "run" / "defenses" / "vet_encoder" / "done.json").unlink()
    again = vetted(cfg, tmp_path / "run")
    assert again["smallest_false_alarm"] == pytest.approx(1 / 3) and len(calls) == 4
    # Another suspect, elsewhere: its own scores alone are computed.
    other = vetted(config(hub_folder(tmp_path / "other", 0.29), clean, **home), tmp_path / "more")
    assert other["clean_encoders"] == 2 and len(calls) == 5


@pytest.mark.parametrize("score, clean, suspicious, rate", [
    (0.95, [], True, None), (0.85, [], False, None), (0.95, [0.2, 0.21], True, 1 / 3),
    (0.97, [0.96, 0.2], False, 1 / 3)])
def test_the_verdict_follows_from_the_scores(score, clean, suspicious, rate):
    found = {"score": score, "default": 0.9, "says": "", "details": {}, "pictures": {}}
    judged = vet_encoder._judged(found, clean, 0.05)
    assert judged["suspicious"] == suspicious and judged["calibrated"] == bool(clean)
    assert judged["false_alarm"] == (None if rate is None else pytest.approx(rate))
    assert json.loads(json.dumps(judged)) == judged


def test_what_cannot_be_asked_is_listed_and_not_run(tmp_path):
    victim = hub_folder(tmp_path / "hub", tokenizer=False)
    verdict = vetted(config(victim, **{"defense.decree.threshold": 0.999}), tmp_path / "run")
    assert [f["detector"] for f in verdict["findings"]] == ["decree"]
    assert any(what.startswith("scan: there is no tokenizer.json")
               for what in verdict["not_checked"])


def test_the_truth_changes_nothing(folders, tmp_path, monkeypatch):
    def detect(cfg, suspect, clean, mesh, folder, key):
        return {"score": float(len(clean)), "default": 0.1, "says": "", "details": {},
                "pictures": {}}

    monkeypatch.setattr(vet_encoder, "DETECTORS", (("decree", vet_encoder._any_encoder, detect),))
    cfg = config(folders[0.3])
    mesh = parallel.make_mesh(cfg.mesh)
    suspect = start.open_victim(cfg, epath.Path(cfg.victim), mesh)
    data = Given(sources.load(cfg.data, "train"))
    found = [vet_encoder.run(cfg, [suspect], data, truth, mesh, epath.Path(tmp_path) / "a/b" / name,
                             jax.random.key(0)).verdict
             for name, truth in (("known", small_repair.truth()), ("blind", None))]
    assert found[0] == found[1]


@pytest.mark.parametrize("score, status", [(0.2, 1), (0.1, 0)])
def test_the_exit_status_is_the_verdict_of_a_complete_run_too(folders, tmp_path, monkeypatch,
                                                             score, status):
    def detect(*_):
        return {"score": score, "default": 0.1, "says": "a patch", "details": {}, "pictures": {}}

    monkeypatch.setattr(vet_encoder, "DETECTORS", (("decree", vet_encoder._any_encoder, detect),))
    cfg, folder = config(folders[0.3]), epath.Path(tmp_path)
    assert vetted(cfg, tmp_path)["suspicious"] == bool(status)
    assert stages.suspicious(cfg, folder) == bool(status)
    found = subprocess.run(
        [sys.executable, "-m", "jax_cl_bd", "--config=configs/vet_encoder.py:debug",
         f"--config.victim={folders[0.3]}", f"--workdir={tmp_path}"], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    assert found.returncode == status, (found.stdout, found.stderr)
    assert "defend: complete" in found.stdout and "decree:" in found.stdout
    assert not found.stderr
    (folder / "defenses" / "vet_encoder" / "done.json").unlink()
    assert not stages.suspicious(cfg, folder)  # no verdict yet


def test_bad_input_is_refused_in_one_line(folders, tmp_path):
    other = hub_folder(tmp_path / "other", 0.4, side=48)
    copy = hub_folder(tmp_path / "copy", 0.31)
    for cfg, says in (
            (lambda: config(""), "--config.victim=FOLDER"),
            (lambda: config(str(tmp_path)), "neither a run folder"),
            (lambda: config(folders[0.3], **{"defense.false_alarm": 0.0}), "false_alarm=0.0"),
            (lambda: config(folders[0.3], [str(tmp_path)]), "clean_encoders=.*neither a run"),
            (lambda: config(folders[0.3], [other]), "at 48 px that is not built as the suspect"),
            (lambda: config(folders[0.3], [folders[0.3]]), "whose weights are those of"),
            (lambda: config(folders[0.3], [folders[0.31], copy]), "whose weights are those of"),
            (lambda: config(folders[0.3], **{"defense.decree.lr": -1.0}), "lr=-1.0"),
            (lambda: config(folders[0.3], **{"defense.scan.scan.limit": 0}), "scan.limit=0"),
            (lambda: config(folders[0.3], **{"defense.scan.oracle.name": "classifier"}),
             "must be 'ground_truth'"),
            (lambda: config(folders[0.3], [folders[0.31]]), "one encoder")):
        with pytest.raises(UserError, match=says) as error:
            checks.check(cfg(), list(stages.GROUPS))
        assert "\n" not in str(error.value)
