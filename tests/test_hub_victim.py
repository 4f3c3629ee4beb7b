"""Victims that are weights alone: what is taken from them, what is measured, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import cifar10, clip_scenes, quickstart
from jax_cl_bd import checks, load_encoder, report, run_folder, stages
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, hub, hub_clip, start
from tests.tiny_hub import made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"clip", "siglip", "resnet": a hub folder}."""
    home, found = tmp_path_factory.mktemp("hub"), {}
    for kind in ("clip", "siglip"):
        described, variables = made(kind, side=32, patch=16, vocab=300, context=12, end=1)
        hub_clip.save(home / kind, described, jax.tree.map(lambda a: 0.3 * a, variables))
        tokenizers.train(["a red star", "a photo of a circle"], 300).save(
            epath.Path(home) / kind / "tokenizer.json")
        found[kind] = str(home / kind)
    shapes = jax.eval_shape(lambda k: build.build(ConfigDict(hub._model("resnet18", "cifar", 2))
                                                  ).init(k, jnp.zeros((1, 16, 16, 3)), train=False),
                            jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: np.float32(rng.uniform(0.1, 0.2, a.shape)), shapes)
    hub.save_resnet(home / "resnet", "resnet18", "cifar", variables,
                    data={"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2), "image_size": 32})
    found["resnet"] = str(home / "resnet")
    return found


def config(experiment, arg, victim, **changes):
    cfg = experiment.get_config(f"debug,{arg}")
    cfg.mesh.data = 1
    cfg.victim = victim
    cfg.update_from_flattened_dict(changes)
    return stages.with_victim(cfg)


def run(cfg, folder, chosen=stages.GROUPS):
    checks.check(cfg, list(chosen))
    stages.run(cfg, epath.Path(folder), list(chosen))
    return run_folder.read_json(epath.Path(folder) / "results.json")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_model_comes_from_the_folder_whatever_the_config_has(folders, kind):
    cfg = config(clip_scenes, "badnets", folders[kind])
    assert (cfg.model.name, cfg.model.width, cfg.text.width) == ("vit", 16, 12)
    assert cfg.objective.name == kind and cfg.text.tokenizer == folders[kind]
    assert cfg.objective.get("bias_init", None) == (-10.0 if kind == "siglip" else None)
    assert (cfg.attack.name, cfg.attack.poisons, cfg.attack.trigger.name) == ("none", 0, "none")
    assert cfg.data.name == "scenes" and tuple(cfg.data.std) == (0.2, 0.2, 0.1)
    other = config(clip_scenes, "objective=siglip", folders[kind])  # the other way round
    assert other.objective.name == kind


def test_evaluate_defend_and_report(folders, tmp_path):
    cfg = config(clip_scenes, "defense=density", folders["clip"],
                 **{"defense.pool": "data", "evals.probes": ("zero_shot", "retrieval"),
                    "defense.k": 4, "defense.false_alarm": 0.1})
    results = run(cfg, tmp_path)
    assert results["victim"]["zero_shot"]["clean_accuracy"] >= 0 and "control" not in results
    assert results["victim"]["zero_shot"].get("attack_success_rate") is None
    assert results["poison"]["count"] is None and "untrained" in results
    found = results["defenses"]["density"]
    assert found["verdict"]["rows"] == 200 and "control" not in found
    assert "auroc" not in found["verdict"]["slof"]  # no truth to score by
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Nothing is known of how this encoder was made" in page and "backdoor works" not in page
    assert "| victim |" in report.compare([epath.Path(tmp_path)], epath.Path(tmp_path / "table"))
    # The weights belong to the settings: another folder's verdict is not taken for this one's.
    with pytest.raises(UserError, match="victim: .* there, .* now"):
        run(config(clip_scenes, "defense=density,objective=siglip", folders["siglip"],
                   **{"defense.pool": "data"}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind, name", [
    ("clip", "clean_clip"), ("siglip", "clean_clip"), ("clip", "par"), ("clip", "abd"),
    ("clip", "cleaner_clip"), ("clip", "ubt"), ("clip", "invertune"), ("clip", "supervised"),
    ("clip", "fine_tune"), ("clip", "retrain"),
    ("clip", "oracle_filter"), ("clip", "oracle_finetune")])
def test_a_repair_of_a_hub_model(folders, tmp_path, kind, name):
    cfg = config(clip_scenes, f"defense={name}", folders[kind], **{"evals.probes": ("zero_shot",)})
    if "pool" in cfg.defense:  # which rows it was trained on, nobody else says
        cfg.defense.pool = "data"
    row = run(cfg, tmp_path, ["defend", "report"])["defenses"][name]
    answers = "own_head" if name == "supervised" else "zero_shot"
    assert row[answers]["clean_accuracy"] >= 0 and "front" not in row
    assert row["seconds"] > 0 and "target_label_correct" not in row["verdict"]
    opened = load_encoder(tmp_path / "defenses" / name)
    if name != "supervised":  # whose classifier takes the place of a text tower
        assert opened.text(["a star"]).shape[0] == 1


@pytest.mark.slow
def test_an_experiment_on_images_takes_the_image_tower(folders, tmp_path):
    cfg = config(quickstart, "", folders["clip"], **{"data.name": "scenes"})
    assert cfg.text.name == "none" and cfg.objective.name == "simclr"
    assert start.open_victim(cfg, epath.Path(folders["clip"])).pair is None
    row = run(cfg, tmp_path, ["evaluate", "defend", "report"])["defenses"]["distill"]
    assert row["linear_probe"]["clean_accuracy"] >= 0


@pytest.mark.slow
def test_an_encoder_of_images_in_an_image_text_experiment(folders, tmp_path):
    cfg = config(clip_scenes, "defense=decree", folders["resnet"],
                 **{"evals.probes": ("linear_probe",)})
    assert cfg.text.name == "none" and cfg.model.name == "resnet18"
    results = run(cfg, tmp_path)
    assert results["defenses"]["decree"]["verdict"]["steps"] == 2
    assert results["untrained"]["linear_probe"]["clean_accuracy"] >= 0


def test_what_cannot_work_is_refused_in_one_line(folders, tmp_path):
    image_text = {"evals.probes": ("linear_probe",)}
    for make, says in (
            (lambda: config(clip_scenes, "defense=density", folders["clip"]),
             "needs the rows that the suspect was trained on.*--config.defense.pool=data"),
            (lambda: config(clip_scenes, "defense=oracle_finetune", folders["clip"]),
             "--config.defense.pool=data"),
            (lambda: config(clip_scenes, "defense=density", folders["clip"],
                            **{"defense.pool": "dta"}), "did you mean 'data'"),
            (lambda: config(clip_scenes, "", folders["resnet"]), "take it out"),
            *((lambda d=d: config(clip_scenes, f"defense={d}", folders["resnet"], **image_text),
               says) for d, says in (
                   ("clean_clip", "image-text models; text.name is 'none'"),
                   ("fine_tune", "image-text models; text.name is 'none'"),
                   ("retrain", "objective 'clip' needs a text tower"))),
            (lambda: config(clip_scenes, "defense=fine_tune", folders["clip"],
                            **{"data.name": "digits", "evals.probes": ("linear_probe",)}),
             "needs captions"),
            (lambda: config(clip_scenes, "", str(tmp_path)), "not a run folder")):
        with pytest.raises(UserError, match=says) as error:
            checks.check(make(), list(stages.GROUPS))
        assert "\n" not in str(error.value)


def test_a_run_folder_knows_what_it_was_trained_on(tmp_path):
    cfg = clip_scenes.get_config("debug,badnets,defense=density")
    run_folder.write_config(epath.Path(tmp_path), cfg)
    cfg.victim, cfg.defense.pool = str(tmp_path), "data"
    cfg.mesh.data = 1
    with pytest.raises(UserError, match="is a run folder, which knows what it was trained on"):
        checks.check(stages.with_victim(cfg), ["defend"])


def test_a_trigger_can_still_be_named(folders, tmp_path):
    given = cifar10.get_config("debug,target=2")
    given.victim, given.attack.trigger_from = folders["resnet"], str(tmp_path)
    cfg = stages.with_victim(given)
    assert (cfg.attack.trigger.name, cfg.attack.target, cfg.attack.name) == ("patch", 2, "none")
