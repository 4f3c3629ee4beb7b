"""Experiments of launch/ print, with DRY_RUN=1, commands whose configs exist; all scripts of it
refuse bad input; sweeps. More in test_launch_local.py, test_launch_docker.py and
test_launch_clusters.py."""

import ast
import importlib.util

import pytest

from tests.launching import JOBSET, ROOT, SLICE, dry, launch, program

COUNTS = {"layout_law.sh": 24, "cifar10_reduced.sh": 16, "clip_defenses.sh": 554}
LAUNCHERS = {"local.sh", "docker.sh", "slurm.sh", "sweep.sh", "tpu_vm.sh", "xpk.sh",
             "gke_jobset.sh"}


TWIN = ("seed", "data", "augment", "model", "objective", "optim", "train")  # what a twin shares


def commands(script, *flags):
    """What a script would run: words of each command."""
    return dry(script, "runs/x", *flags)


def config_of(words):
    """The config of a command, before its overrides."""
    path, _, arg = words[3].removeprefix("--config=").partition(":")
    spec = importlib.util.spec_from_file_location("experiment", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("script", sorted(COUNTS))
def test_dry_run_prints_commands_that_parse(script):
    printed = commands(script, "--config.seed=1")
    assert len(printed) == COUNTS[script]
    for words in printed:
        assert words[:3] == ["python", "-m", "jax_cl_bd"] and "--config.seed=1" in words
        config_of(words)
    assert not (ROOT / "runs" / "x").exists()


def test_every_script_is_tested():
    assert {path.name for path in (ROOT / "launch").glob("*.sh")} == (
        set(COUNTS) | LAUNCHERS | {"clip_detection.sh", "env.sh"})  # which the others source


@pytest.mark.parametrize("script", sorted(COUNTS))
def test_every_run_has_a_control(script):
    """Its own, or that of an earlier run with the same settings but the attack's; but victims with
    another loss, whose losses and repairs are compared with one another, have none."""
    alone = ("in_modality_", "roclip_", "safeclip_", "longer_")
    trained = {}  # folder -> config of the run that trains a control there
    made = {}  # folder -> config of every victim
    for words in commands(script):
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
        cfg = config_of(words)
        given, victim = flags.get("config.control_from", ""), flags.get("config.victim", "")
        if victim:  # of an earlier line, whose control the defense is measured against
            assert victim in made and flags["stages"] == "defend,report", words
            assert given in trained if given else (
                victim in trained or victim.split("/")[-1].startswith(alone)), words
            assert cfg.defense.name != "none" and flags["workdir"] not in made, words
            continue
        made[flags["workdir"]] = cfg
        if given:
            assert given in trained, words
            assert [cfg[name] for name in TWIN] == [trained[given][name] for name in TWIN]
        elif flags.get("config.control", str(cfg.control)) == "False":
            assert flags["workdir"].split("/")[-1].startswith(alone), words
        else:
            trained[flags["workdir"]] = cfg
    assert trained


def test_the_parts_of_the_defenses_make_the_whole():
    whole = commands("clip_defenses.sh")
    parts = [commands("clip_defenses.sh", part)
             for part in ("victims", "repair", "baselines", "limits", "cleaning", "ablations",
                           "cifar10")]
    assert sum(parts, []) == whole
    assert [len(part) for part in parts] == [24, 66, 336, 42, 30, 36, 20]
    folders = [words[4] for words in whole]
    assert len(set(folders)) == len(folders)
    for words in whole:
        first = words[4].startswith("--workdir") and "_0-" in words[4]
        rates = [w for w in words if w.startswith("--config.defense.rates=")]
        config = config_of(words)
        if "/ablations/" in words[4]:
            assert rates == ["--config.defense.rates=(0.001,)"]
            continue
        if words[4].endswith("-in_modality_only"):
            assert rates == ["--config.defense.rates=(0.00001,0.0001)"]
            continue
        assert rates == ([] if first or "rates" not in config.defense
                         else ["--config.defense.rates=(0.001,0.003)"]), words
        assert "/cifar10_" in words[4] or "--config.evals.other_test_split=shifted" in words
    poisons = [words for words in whole if "_1_" in words[4] and "--stages=defend,report" not in
               words]
    assert all("--config.attack.poisons=80" in words for words in poisons) and len(poisons) == 8
    clean = [words for words in whole if "/none_" in words[4] and "-" not in words[4][2:]]
    assert len({f for f in folders if "/badnets_4_" in f and "-" not in f[2:]}) + len(clean) >= 10


def test_detection_judges_other_encoders_than_those_that_set_the_threshold():
    rows = commands("clip_detection.sh", "runs/y", "rows")
    *encoders, last = commands("clip_detection.sh", "runs/y", "encoders")
    vetting = commands("clip_detection.sh", "runs/y", "vetting")
    assert commands("clip_detection.sh", "runs/y") == [*rows, *encoders, last, *vetting]
    assert len(rows) == 36 and len(encoders) == 30
    made = [(config_of(words), words[4].removeprefix("--workdir=")) for words in encoders]
    assert all(cfg.defense.name == "decree" for cfg, _ in made)
    judged, calibrating = made[:20], made[20:]
    assert len({cfg.seed for cfg, _ in made}) == 30
    assert len({cfg.attack.target for cfg, _ in judged}) == 12
    assert len({cfg.attack.trigger.name + cfg.attack.name for cfg, _ in judged}) == 3
    assert last == ["python", "-m", "jax_cl_bd.reporting.detection",
                    *(folder for _, folder in judged), "--calibrate",
                    *(folder for _, folder in calibrating), "--out=runs/y/decree"]
    for words in rows:
        assert config_of(words).defense.name in ("density", "cosine_filter", "bdetclip")


def test_vetting_judges_encoders_and_their_twins_by_others():
    made = {words[4].removeprefix("--workdir=") for words in
            commands("clip_detection.sh", "runs/y", "encoders") if words[4].startswith("--workdir")}
    judged = []
    for words in commands("clip_detection.sh", "runs/y", "vetting"):
        cfg = config_of(words)
        flags = dict(word.removeprefix("--").split("=", 1) for word in words[4:])
        victim = flags["config.victim"]
        assert victim.removesuffix("/control") in made | {"runs/x/badnets_4_0"}
        if cfg.defense.name == "vet_encoder":
            clean = ast.literal_eval(flags["config.defense.clean_encoders"])
            assert len(clean) == 10 and set(clean) <= made and victim not in clean
            judged.append(victim)
    assert len(set(judged)) == 8 and sum(name.endswith("/control") for name in judged) == 4


def test_a_suspicion_is_no_failure_of_the_script(tmp_path):
    """Exit status 1 of a vetting with a report, unlike one without (the last of the encoders)."""
    ends = """folder=${4#--workdir=}
case $folder in *vet_encoder-encoder_14_control) exit 1 ;; esac
mkdir -p "$folder/report"
touch "$folder/report/done.json"
exit 1"""
    program(tmp_path / "bin", "python", ends)
    done = launch("clip_detection.sh", "runs/x", tmp_path / "y", "vetting", path=tmp_path / "bin")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 12
    assert done.stderr == f"error: 1 runs failed: {tmp_path}/y/vet_encoder-encoder_14_control\n"


def test_an_experiment_goes_on_after_a_run_that_fails_and_names_it(tmp_path):
    fails = 'case $4 in */moco_noisy_alignment_0) exit 1 ;; esac'
    program(tmp_path / "bin", "python", fails)
    done = launch("cifar10_reduced.sh", "runs/a b", path=tmp_path / "bin")
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 16
    assert done.stderr == "error: 1 runs failed: 'runs/a b/moco_noisy_alignment_0'\n"
    program(tmp_path / "bin", "python", fails.replace("exit 1", "exit 2"))  # bad input
    done = launch("cifar10_reduced.sh", "runs/a b", path=tmp_path / "bin")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 5


def test_an_unknown_part_is_refused():
    done = launch("clip_defenses.sh", "runs/x", "victim")
    assert done.returncode == 2 and done.stderr.startswith("error: unknown part victim")


@pytest.mark.parametrize("script", sorted([*COUNTS, "clip_detection.sh"]))
def test_an_experiment_without_a_folder_says_its_usage(script):
    done = launch(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: usage: bash launch/{script} ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script, words, environment", [
    *((script, ("configs/a.py",), SLICE | JOBSET | {"CLUSTER": "c"}) for script in
      sorted(LAUNCHERS - {"tpu_vm.sh"})),
    ("tpu_vm.sh", ("run", "configs/a.py"), SLICE),
    ("tpu_vm.sh", (), SLICE),
    ("tpu_vm.sh", ("start",), SLICE),
    ("tpu_vm.sh", ("delete",), {"ZONE": "us-west4-a"}),
    ("tpu_vm.sh", ("run", "configs/a.py", "runs/a"), SLICE),
    ("xpk.sh", ("configs/a.py", "runs/a"), SLICE | {"CLUSTER": "c", "IMAGE": "i"}),
    ("xpk.sh", ("configs/a.py", "gs://b/a"), SLICE),
    ("gke_jobset.sh", ("configs/a.py", "runs/a"), JOBSET),
    ("gke_jobset.sh", ("configs/a.py", "gs://b/a"), JOBSET | {"NAME": "Pod_1"}),
    ("gke_jobset.sh", ("configs/a.py", "gs://b/a"), JOBSET | {"TPU": "tpu-v6e-slice"}),
    ("gke_jobset.sh", ("configs/a.py", "gs://b/a"), JOBSET | {"NODES": "four"}),
    ("gke_jobset.sh", ("configs/a.py", "gs://b/a\nb"), JOBSET),
    ("local.sh", ("configs/a.py", "runs/a"), {"PROCESSES": "two"}),
    ("local.sh", ("configs/a.py", "runs/a"), {"PROCESSES": "0"}),
    ("docker.sh", ("configs/a.py", "runs/a"), {"GPUS": "two"}),
    ("docker.sh", ("configs/a.py", "runs/a"), {"GPUS": "0"}),
    ("docker.sh", ("configs/a.py", "runs/a"), {"TFDS_DATA_DIR": "no/such/place"}),
    ("docker.sh", ("configs/a.py", "runs/a"), {"MOUNTS": "docs:no/such/place"}),
    ("docker.sh", ("configs/a.py", "runs/a:b"), {}),
    ("sweep.sh", ("configs/a.py", "runs/a", "Wrong"), {}),
    ("sweep.sh", ("configs/a.py", "runs/a", "optim.lr=a b", "optim.lr=a_b"), {})])
def test_bad_input_is_one_line_and_status_2(script, words, environment):
    done = launch(script, *words, DRY_RUN="1", **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_a_sweep_crosses_choices_and_seeds(tmp_path):
    words = ("configs/a.py:small", "runs/a b", "optim.lr=0.1", ":objective=moco", "optim.lr=0.3",
             ":objective=byol", "--config.control=False")
    head, *runs, report = dry("sweep.sh", *words, SEEDS="3 4")
    assert head[0] == "8" and head[-1] == "--array=0-7" and len(runs) == 8
    assert runs[1] == [
        "python", "-m", "jax_cl_bd", "--config=configs/a.py:small,objective=moco",
        "--workdir=runs/a b/optim.lr=0.1+objective=moco+seed=4", "--config.optim.lr=0.1",
        "--config.seed=4", "--config.control=False"]
    folders = [words[4].removeprefix("--workdir=") for words in runs]
    assert len(set(folders)) == 8
    assert report == ["python", "-m", "jax_cl_bd.report", *folders, "--out=runs/a b/report"]
    said, element = dry("sweep.sh", *words, SEEDS="3 4", SLURM_ARRAY_TASK_ID="1")
    assert element[0] == "srun" and element[-8:] == runs[1] and said[-1] == "--out=runs/a b/report"
    done = launch("sweep.sh", *words, DRY_RUN="1", SEEDS="3", SLURM_ARRAY_TASK_ID="4")
    assert done.returncode == 2 and "there are 4 runs" in done.stderr


def test_a_sweep_names_what_failed_and_stops_at_bad_input(tmp_path):
    python = program(tmp_path, "python", f'echo "$*" >>{tmp_path}/ran; case "$*" in\n'
                     "*x=broken*) exit 1 ;; *x=bad*) exit 2 ;; esac")
    done = launch("sweep.sh", "c.py", tmp_path / "s", "x=broken", "x=fine", SEEDS="0",
                  PYTHON=str(python))
    assert done.returncode == 1 and "1 runs failed" in done.stderr
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran[-1] == f"-m jax_cl_bd.report {tmp_path}/s/x=fine+seed=0 --out={tmp_path}/s/report"
    done = launch("sweep.sh", "c.py", tmp_path / "s", "x=bad", "x=fine", SEEDS="0",
                  PYTHON=str(python))
    assert done.returncode == 2
    assert len((tmp_path / "ran").read_text().splitlines()) == len(ran) + 1
