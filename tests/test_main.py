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

from jax_cl_bd import run_folder, stages
from jax_cl_bd.errors import UserError

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


def test_a_victim_brings_what_made_it_and_leaves_the_rest(tmp_path):
    run_folder.write_config(epath.Path(tmp_path), quickstart(seed=5, **{"attack.poisons": 6}))
    given = quickstart(victim=str(tmp_path), **{"data.workers": 2, "evals.knn_k": 3})
    cfg = stages.with_victim(given)
    assert (cfg.seed, cfg.attack.poisons, cfg.data.workers, cfg.evals.knn_k) == (5, 6, 2, 3)


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

    from jax_cl_bd import evaluate, poison

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
