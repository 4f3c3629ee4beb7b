"""The command line: bad input is one line and exit status 2, before anything is compiled."""


import pytest

from configs import clip_scenes
from jax_cl_bd import checks, stages
from jax_cl_bd.errors import UserError
from tests.command_line import BASE, quickstart, refused


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
    assert "did you mean 'configs/quickstart.py'" in refused("--config", "configs/quickstrt.py")


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
    ({"train.batch_size": 0}, "train.batch_size=0 must be at least 1"),
    ({"data.image_size": 0}, "data.image_size=0"),
    ({"train.save_every": -1}, "train.save_every=-1 must be at least 0"),
    ({"objective.dim": 0}, "objective.dim=0"),
    ({"augment.view1.crop_scale": ()}, "two numbers"),
    ({"train.epochs": 3}, "--config.train.steps=0"),
    ({"attack.name": "ssl_backdoor"}, "setting attack.targeted is missing for attack "
     "'ssl_backdoor'; choose it after the colon, --config=FILE:attack=ssl_backdoor"),
    ({"attack.trigger.name": "blend"}, "attack.trigger.fixed is missing for trigger 'blend'; add"),
    ({"defense.name": "decree"}, "defense.images is missing for defense 'decree'"),
    ({"model.name": "vit"}, "model.act is missing for model 'vit'"),
    ({"objective.name": "byol"}, "objective.tau is missing for objective 'byol'"),
    ({"objective.name": "moco"}, "objective.queue_batches is missing"),
    ({"data.name": "cifar10"}, "did you mean 'tfds:cifar10'"),
])
def test_bad_settings_are_found_before_anything_is_compiled(changes, says):
    with pytest.raises(UserError) as refusal:
        checks.check(quickstart(**changes), list(stages.GROUPS))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_setting_missing_deep_in_a_method_names_the_method():
    cfg = clip_scenes.get_config("debug,defense=oracle_finetune")
    del cfg.defense.curate["rho_recurring"]
    with pytest.raises(UserError, match="setting defense.curate.rho_recurring is missing for "
                                        "defense 'oracle_finetune'"):
        checks.check(cfg, ["defend"])


def test_a_config_without_some_settings_says_which():
    cfg = quickstart()
    with cfg.unlocked():
        del cfg.train["chunks"]
    with pytest.raises(UserError, match="setting train.chunks is missing from the config"):
        checks.check(cfg, ["pretrain"])
    cfg = quickstart()
    del cfg["downstream"]
    with pytest.raises(UserError, match="setting downstream is missing from the config; the func"):
        checks.check(cfg, ["evaluate"])


def test_errors_that_are_no_missing_setting_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(checks.sources, "load", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        checks.check(quickstart(), ["poison"])


def test_an_in_modality_term_without_second_captions_is_refused():
    cfg = clip_scenes.get_config("debug")
    cfg.objective.in_modality = 1.0
    with pytest.raises(UserError, match="data.text_augment=eda"):
        checks.check(cfg, list(stages.GROUPS))


def test_more_poisons_than_candidates_is_refused():
    from configs import quickstart as experiment

    cfg = experiment.get_config("debug,attack=ssl_backdoor")
    cfg.attack.poisons = 100
    with pytest.raises(UserError, match="100"):
        checks.check(cfg, ["poison"])


def test_a_full_class_of_errors_does_not_hide_good_settings():
    checks.check(quickstart(), list(stages.GROUPS))
