"""The command line: bad input is one line and exit status 2; a killed run goes on to the bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from jax_cl_bd import poison, run_folder, stages
from jax_cl_bd.data import sources
from jax_cl_bd.data.images import CorruptRow
from jax_cl_bd.errors import UserError
from jax_cl_bd.train import NonFinite

ROOT = Path(__file__).parents[1]
BASE = ["--config=configs/quickstart.py:debug,defense=none"]


def command(*arguments, **changes):
    """Runs the program on one simulated device."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "jax_cl_bd", *arguments], cwd=ROOT, text=True,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **changes)


def refused(*arguments):
    process = command(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, (out, err)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.parametrize("arguments, says", [
    (["--config.optim.lr_rate=1"], "lr_rate"),
    (["--config.optim.lr=fast"], "optim.lr"),
    (["--stages=poisson"], "poison"),
    (["pretrain"], "--stages=pretrain"),
    (["--config.attack.name=noisy_alignmen"], "did you mean 'noisy_alignment'"),
])
def test_bad_flags_are_one_line_and_status_2(tmp_path, arguments, says):
    assert says in refused(*BASE, f"--workdir={tmp_path}/run", *arguments)
    assert not (tmp_path / "run" / "poison").exists()


def test_bad_config_argument_and_missing_workdir():
    assert "allowed: attack" in refused("--config=configs/quickstart.py:objctive=moco",
                                        "--workdir=x")
    assert "objctive" in refused("--config=configs/quickstart.py:objctive=moco", "--workdir=x")
    assert "--workdir is missing" in refused(*BASE)
    assert "did you mean 'configs/quickstart.py'" in refused("--config=configs/quickstrt.py")


def quickstart(**changes):
    from configs import quickstart as experiment

    cfg = experiment.get_config("debug")
    cfg.update_from_flattened_dict(changes)
    return cfg


@pytest.mark.parametrize("changes, says", [
    ({"objective.name": "simclrr"}, "did you mean 'simclr'"),
    ({"data.name": "digit"}, "digits"),
    ({"data.name": "folder:/no/such/place"}, "/no/such/place"),
    ({"attack.target": 10}, "target"),
    ({"attack.target": -1}, "target"),
    ({"attack.poisons": -3}, "poisons"),
    ({"train.batch_size": 12}, "8 devices"),
    ({"evals.probes": ("alignment",)}, "unknown eval"),
    ({"evals.probes": ("linear_prob",)}, "did you mean 'linear_probe'"),
    ({"defense.name": "distil"}, "did you mean 'distill'"),
    ({"defense.clean_fraction": 0.0}, "clean_fraction"),
    ({"model.name": "resnet19"}, "did you mean 'resnet18'"),
    ({"optim.name": "sdg"}, "did you mean 'sgd'"),
    ({"attack.trigger.id": 9}, "trigger"),
    ({"attack.trigger.size": 40}, "size"),
    ({"augment.view1.crop_scale": (0.0, 1.0)}, "crop_scale"),
    ({"train.steps_per_dispatch": 3}, "steps_per_dispatch"),
    ({"mesh.fsdp": 3}, "8 devices"), ({"mesh.data": 16}, "8 devices"),
    ({"seed": -1}, "seed"),
    ({"data.feed": "residnt"}, "did you mean 'resident'"),
    ({"evals.label_list": "nope.txt"}, "nope.txt"),
    ({"evals.wrong_trigger": 14}, "wrong_trigger"),
    ({"evals.fraction": 0.0}, "fraction"),
    ({"evals.placements": ("corner",)}, "corner"),
    ({"evals.placements": ()}, "placements"),
    ({"evals.knn_k": 0}, "knn_k"),
    ({"downstream": "nope"}, "nope"),
    ({"defense.optim.name": "sdg"}, "did you mean 'sgd'"),
    ({"defense.clean_fraction": 0.01}, "clean images"),
    ({"defense.steps": 0, "defense.epochs": 0}, "defense.steps"),
    ({"train.batch_size": 4096}, "4096"),
    ({"train.steps": 0, "train.epochs": 0}, "train.steps"),
    ({"evals.probes": ("zero_shot",)}, "needs an image-text model"),
    ({"evals.probes": ("retrieval",)}, "needs an image-text model"),
    ({"evals.probes": ("targeted",)}, "measures the attack targeted_poisoning"),
    ({"evals.probes": ("mismatch",)}, "measures the attack mismatched_pairs"),
    ({"control_from": "no/such/run"}, "control_from"),
    ({"optim.name": "adamw"}, "needs optim.b1"),
])
def test_bad_settings_are_found_before_anything_is_compiled(changes, says):
    with pytest.raises(UserError) as refusal:
        stages.check(quickstart(**changes), list(stages.GROUPS))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_in_modality_term_without_second_captions_is_refused():
    from configs import clip_scenes

    cfg = clip_scenes.get_config("debug")
    cfg.objective.in_modality = 1.0
    with pytest.raises(UserError, match="data.text_augment=eda"):
        stages.check(cfg, list(stages.GROUPS))


def test_more_poisons_than_candidates_is_refused():
    from configs import quickstart as experiment

    cfg = experiment.get_config("debug,attack=ssl_backdoor")
    cfg.attack.poisons = 100
    with pytest.raises(UserError, match="100"):
        stages.check(cfg, ["poison"])


def test_a_full_class_of_errors_does_not_hide_good_settings():
    stages.check(quickstart(), list(stages.GROUPS))


def test_finished_run_refuses_other_settings_and_shows_them(tmp_path):
    folder = epath.Path(tmp_path)
    stages.run(quickstart(), folder, ["poison"])
    with pytest.raises(UserError, match=r"attack.poisons: 8 there, 7 now"):
        stages.run(quickstart(**{"attack.poisons": 7}), folder, ["poison"])
    stages.drop(quickstart(), folder, "poison")
    stages.run(quickstart(**{"attack.poisons": 7}), folder, ["poison"])
    assert run_folder.read_json(folder / "poison" / "summary.json")["poisons"] == 7


def test_a_stage_refuses_what_its_predecessors_were_made_with(tmp_path):
    folder = epath.Path(tmp_path)
    stages.run(quickstart(), folder, ["poison"])
    for stage in ("pretrain", "report"):
        with pytest.raises(UserError, match="seed: 0 there, 1 now"):
            stages.run(quickstart(seed=1), folder, [stage])
    assert run_folder.read_config(folder).seed == 0


def test_what_depends_on_a_stage_is_unmarked_and_the_rest_is_not(tmp_path):
    folder = epath.Path(tmp_path)
    for place in ("poison", "pretrain", "evaluate", "defenses/a", "defenses/b", "report"):
        run_folder.finish(folder / place, {})

    def marked():
        return sorted(str(p.parent.relative_to(folder)) for p in folder.glob("*/done.json")) + [
            p.parent.name for p in sorted(folder.glob("defenses/*/done.json"))]

    stages.undo(folder, "evaluate")
    assert marked() == ["evaluate", "poison", "pretrain", "a", "b"]
    stages.undo(folder, "pretrain")
    assert marked() == ["poison", "pretrain"]


def test_force_drops_what_it_says_and_no_more(tmp_path):
    folder = epath.Path(tmp_path)
    cfg = quickstart()
    for place in ("poison", "pretrain", "evaluate", "defenses/distill", "defenses/b", "report"):
        run_folder.finish(folder / place, {})
    (folder / "results.json").write_text("{}")
    stages.drop(cfg, folder, "defend")
    assert not (folder / "defenses" / "distill").exists()
    assert (folder / "defenses" / "b" / "done.json").exists()
    stages.drop(cfg, folder, "evaluate")
    assert not (folder / "evaluate").exists() and (folder / "results.json").exists()
    stages.drop(cfg, folder, "pretrain")
    assert [p.name for p in folder.iterdir()] == ["poison"]


def test_force_needs_its_stage(tmp_path):
    assert "--stages" in refused(*BASE, f"--workdir={tmp_path}", "--force=pretrain",
                                 "--stages=evaluate")


def test_nothing_is_dropped_before_all_settings_are_checked(tmp_path):
    folder = epath.Path(tmp_path)
    stages.run(quickstart(), folder, ["poison"])
    for place in ("pretrain", "evaluate"):
        run_folder.begin(folder / place, run_folder.settings_of(quickstart(), stages.GROUPS[place]))
        run_folder.finish(folder / place, {})
    before = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="optim.lr"):
        stages.run(quickstart(**{"optim.lr": 9.0}), folder, ["evaluate"], "evaluate")
    assert (folder / "evaluate" / "done.json").exists()
    (folder / "pretrain" / "done.json").unlink()
    with pytest.raises(UserError, match="evaluate needs the pretrain stage"):
        stages.run(quickstart(), folder, ["evaluate"], "evaluate")
    assert (folder / "evaluate" / "done.json").exists()
    assert (folder / "config.json").read_text() == before


def measured(folder, cfg, *defenses):
    """A folder whose stages are all marked complete, but nothing was made."""
    for stage in ("poison", "pretrain", "evaluate"):
        run_folder.begin(folder / stage, run_folder.settings_of(cfg, stages.GROUPS[stage]))
        run_folder.finish(folder / stage, {})
    run_folder.finish(folder / "control" / "pretrain", {})
    run_folder.write_json(folder / "poison" / "summary.json", {"poisons": 8})
    for name in defenses:
        place = folder / "defenses" / name
        run_folder.begin(place, run_folder.settings_of(cfg, stages.GROUPS["defend"]))
        run_folder.finish(place, {})
        for kept in (place / "checkpoints", place / "control" / "checkpoints"):
            kept.mkdir(parents=True)
    run_folder.write_json(folder / "results.json",
                          {"victim": {}, "defenses": {name: {} for name in defenses}})
    run_folder.write_config(folder, cfg)


def test_settings_of_complete_stages_are_checked_whatever_is_chosen(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    monkeypatch.setattr(stages.report, "run", lambda cfg, folder: None)
    measured(folder, quickstart(), "distill")
    for changes in ({"evals.fraction": 0.5}, {"defense.steps": 7}):
        for chosen in ("report", "defend"):
            with pytest.raises(UserError, match=f"{[*changes][0]}: .* now"):
                stages.run(quickstart(**changes), folder, [chosen])
    assert run_folder.read_config(folder).evals.fraction == 1.0
    from configs import quickstart as experiment

    stages.run(experiment.get_config("debug,defense=retrain"), folder, ["report"])
    assert run_folder.read_config(folder).defense.name == "retrain"


def test_defenses_that_were_measured_otherwise_are_measured_anew(tmp_path, monkeypatch):
    def evaluated(cfg, folder, victim):
        run_folder.write_json(folder / "results.json",
                              {"victim": {}, "defenses": run_folder.kept_defenses(folder)})

    def defended(cfg, folder, victim):
        assert (folder / "defenses" / "distill" / "checkpoints").exists()

    folder = epath.Path(tmp_path)
    monkeypatch.setattr(stages.evaluate, "run", evaluated)
    monkeypatch.setattr(stages.defend, "run", defended)
    measured(folder, quickstart(), "distill", "retrain")
    stages.run(quickstart(), folder, ["evaluate"], "evaluate")  # the same once more
    assert set(run_folder.read_json(folder / "results.json")["defenses"]) == {"distill", "retrain"}
    other = quickstart(**{"evals.fraction": 0.5})
    stages.run(other, folder, ["evaluate"], "evaluate")
    assert not run_folder.read_json(folder / "results.json")["defenses"]
    for name in ("distill", "retrain"):
        assert not (folder / "defenses" / name / "done.json").exists()
        assert (folder / "defenses" / name / "control" / "checkpoints").exists()
    stages.run(other, folder, ["defend"])
    assert (folder / "defenses" / "distill" / "done.json").exists()
    with pytest.raises(UserError, match="evals.fraction"):
        stages.run(quickstart(), folder, ["defend"])


def test_other_data_are_noticed(tmp_path):
    from PIL import Image

    folder, data = epath.Path(tmp_path / "run"), tmp_path / "data"
    for split, count in (("train", 30), ("test", 4)):
        for name in ("a", "b"):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(data / split / name / f"{i:02d}.png")

    def cfg():
        return quickstart(**{"data.name": f"folder:{data}", "attack.target": 1, "attack.poisons": 4,
                             "attack.references": 4, "data.limit": 0})

    stages.run(cfg(), folder, ["poison"])
    recorded = run_folder.read_json(folder / "poison" / "summary.json")["data"]
    assert recorded["rows"] == 60 and len(recorded["sha256"]) == 64
    (data / "train" / "a" / "00.png").rename(data / "train" / "a" / "x.png")
    sources._open.cache_clear()  # as another process would
    with pytest.raises(UserError, match="sha256: '.* there, '.* now"):
        stages.run(cfg(), folder, ["pretrain"])
    (data / "train" / "a" / "x.png").unlink()
    sources._open.cache_clear()
    with pytest.raises(UserError, match="rows: 60 there, 59 now"):
        stages.run(cfg(), folder, ["pretrain"])
    for place in (folder, folder / "control"):
        run_folder.finish(place / "pretrain", {})
    for stage in ("evaluate", "defend"):
        with pytest.raises(UserError, match="rows: 60 there"):
            stages.run(cfg(), folder, [stage])
    summary = run_folder.read_json(folder / "poison" / "summary.json")
    del summary["data"]  # an older run
    run_folder.write_json(folder / "poison" / "summary.json", summary)
    poison.check_data(cfg(), folder)


def test_a_report_reads_no_data():
    stages.check(quickstart(**{"data.name": "folder:/no/such/place"}), ["report"])


@pytest.mark.parametrize("error, ends", [
    (OSError("no route"), "the same command goes on where it stopped"),
    (CorruptRow(3, "a.png", "cut short"), "--config.data.skip_corrupt=True"),
    (NonFinite("lower optim.lr"), "lower optim.lr")])
def test_the_way_on_is_the_errors_own(error, ends):
    assert stages.explain(error).endswith(ends)


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_trained_again(tmp_path, capsys):
    folder = epath.Path(tmp_path / "run")
    cfg = quickstart(**{"defense.name": "none", "mesh.data": 1})
    stages.run(cfg, folder, ["poison", "pretrain", "evaluate"])
    results = run_folder.read_json(folder / "results.json")
    assert results["run"]["steps"] == {"victim": 2, "control": 2, "untrained": 0}
    assert results["run"]["control"] is None  # its own twin
    weights = weights_of(folder)
    (folder / "checkpoints" / "2" / "digests.json").unlink()
    with pytest.raises(UserError, match="to step 2.*of step 1.*--stages=pretrain"):
        weights_of(folder)
    cfg.evals.fraction = 0.5
    with pytest.raises(UserError, match="evaluate needs the pretrain stage"):
        stages.run(cfg, folder, ["evaluate"], "evaluate")
    assert "damaged" in capsys.readouterr().err
    weights_of(folder)
    assert "not complete; this is its encoder of step 1" in capsys.readouterr().err
    cfg.evals.fraction = 1.0
    stages.run(cfg, folder, ["pretrain", "evaluate"])
    for before, after in zip(weights, weights_of(folder)):
        np.testing.assert_array_equal(before, after)
    assert run_folder.read_json(folder / "results.json")["victim"] == results["victim"]


@pytest.mark.slow
def test_without_poisons_the_victim_is_its_own_control(tmp_path):
    from configs import quickstart as experiment

    folder = epath.Path(tmp_path)
    cfg = experiment.get_config("debug,attack=none")
    cfg.mesh.data = 1
    stages.run(cfg, folder, ["poison", "pretrain", "evaluate", "defend", "report"])
    assert not (folder / "control").exists()
    results = run_folder.read_json(folder / "results.json")
    for rows in (results, {"victim": results["defenses"]["distill"],
                           "control": results["defenses"]["distill"]["control"]}):
        victim, control = (rows[label]["linear_probe"] for label in ("victim", "control"))
        assert victim["excess"] <= 0
        assert victim["attack_success_rate"] == control["attack_success_rate"]
    assert results["run"]["steps"] == {"victim": 2, "control": 2, "untrained": 0}


def test_sigterm_outside_training_says_how_to_go_on(tmp_path):
    code = ("import signal, sys, os, runpy, types; "
            "kill = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
            "sys.modules['jax_cl_bd.stages'] = types.SimpleNamespace("
            "with_victim=lambda cfg: cfg, check=lambda *_: None, run=kill); "
            f"sys.argv = ['jax_cl_bd', {BASE[0]!r}, '--workdir={tmp_path}', '--stages=report']; "
            "runpy.run_module('jax_cl_bd', run_name='__main__')")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                             timeout=120)
    assert process.returncode == 143, process.stderr
    assert process.stderr == "stopped by SIGTERM; the same command goes on where it stopped\n"


def test_a_victim_brings_what_made_it_and_leaves_the_rest(tmp_path):
    run_folder.write_config(epath.Path(tmp_path), quickstart(
        seed=5, **{"attack.poisons": 6, "data.workers": 8, "data.data_dir": "there"}))
    given = quickstart(victim=str(tmp_path), **{"data.workers": 0, "evals.knn_k": 3})
    cfg = stages.with_victim(given)
    assert (cfg.seed, cfg.attack.poisons, cfg.data.workers, cfg.evals.knn_k) == (5, 6, 0, 3)
    assert cfg.data.data_dir == "there"
    given.data.data_dir = "here"
    assert stages.with_victim(given).data.data_dir == "here"


@pytest.mark.slow
def test_a_victim_is_measured_against_the_control_of_another_run(tmp_path):
    stages_ = ["poison", "pretrain", "evaluate"]
    first, second = epath.Path(tmp_path / "first"), epath.Path(tmp_path / "second")
    stages.run(quickstart(), first, stages_)
    stages.run(quickstart(seed=1, control_from=str(first)), second, stages_)
    assert not (second / "control").exists()
    mine, theirs = (run_folder.read_json(f / "results.json") for f in (second, first))
    clean = {who: [found[who]["linear_probe"]["clean_accuracy"] for found in (mine, theirs)]
             for who in ("control", "victim")}
    assert clean["control"][0] == clean["control"][1] and clean["victim"][0] != clean["victim"][1]


def test_a_stage_without_its_predecessor_says_which(tmp_path):
    with pytest.raises(UserError, match="needs the poison stage"):
        stages.run(quickstart(), epath.Path(tmp_path), ["pretrain"])


def test_a_full_disk_says_so_and_the_same_command_goes_on(tmp_path):
    short = [*BASE, "--stages=poison,pretrain", "--config.control=False",
             f"--workdir={tmp_path}/run"]
    blocked = tmp_path / "run" / "poison" / ".summary.json.partial"
    blocked.parent.mkdir(parents=True)
    blocked.symlink_to("/dev/full")  # every write to it finds the disk full
    process = command(*short)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the disk is full" in err and "the same command goes on" in err
    assert "Traceback" not in err
    blocked.unlink(missing_ok=True)
    process = command(*short)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "run" / "pretrain" / "done.json").exists()


def test_ctrl_c_saves_and_ends_with_130(tmp_path):
    process = command(*LONG, f"--workdir={tmp_path}")
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in out, (out, err)
    assert "Traceback" not in err


LONG = [*BASE, "--stages=poison,pretrain,evaluate", "--config.control=False",
        "--config.train.steps=60", "--config.train.save_every=5", "--config.train.log_every=1",
        "--config.train.eval_every=20"]


def finish(folder):
    process = command(*LONG, f"--workdir={folder}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def lines_of(folder):
    lines = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def weights_of(folder):
    from jax_cl_bd.models import encoder

    encoded = encoder.load(folder).variables
    import jax

    return jax.tree.leaves(encoded)


def test_kill_9_then_the_same_command_gives_the_same_bits(tmp_path):
    finish(tmp_path / "whole")
    killed = command(*LONG, f"--workdir={tmp_path}/killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 22):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "pretrain" / "done.json").exists()
    assert "going on from step" in finish(tmp_path / "killed")

    for whole, resumed in zip(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")):
        np.testing.assert_array_equal(whole, resumed)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")
    results = [json.loads((tmp_path / run / "results.json").read_text())
               for run in ("whole", "killed")]
    for result in results:
        del result["run"]
    assert results[0] == results[1]


def test_another_data_set_needs_a_class_of_the_targets_name(tmp_path):
    from PIL import Image

    from jax_cl_bd import evaluate

    cfg = quickstart(**{"attack.target": 1})
    stages.run(cfg, epath.Path(tmp_path / "run"), ["poison"])
    for split in ("train", "test"):
        for name in ("0", "zebra"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / split / name / "a.png")
    trigger = poison.load_trigger(cfg, epath.Path(tmp_path / "run"))
    cfg.downstream = f"folder:{tmp_path / 'data'}"
    with pytest.raises(UserError, match="no class '1'.*0, zebra"):
        evaluate.test_data(cfg, trigger)
    cfg.attack.target = 0
    assert evaluate.test_data(cfg, trigger).classes == ("0", "zebra")
