"""Training that starts from weights: what is taken, what is drawn, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from ml_collections import ConfigDict

import jax_cl_bd
from configs import clip_scenes, quickstart
from jax_cl_bd import checkpoint, checks, evaluate, parallel, pretrain, run_folder, stages
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, hub, hub_clip, start
from jax_cl_bd.objectives import training
from jax_cl_bd.train import born_sharded
from tests.tiny_hub import made

CAPTIONS = ["a red star", "a blue heart on green", "one"]
TX = optax.sgd(0.1)
MESH = ConfigDict({"data": 1, "fsdp": 1})


def hub_folder(folder, kind):
    """A tiny model as Hugging Face stores it, with a tokenizer.json; gives its variables."""
    described, variables = made(kind, side=32, patch=16, vocab=300, context=12, end=1)
    variables = jax.tree.map(lambda a: 0.3 * a, variables)  # as first values are, not too large
    hub_clip.save(folder, described, variables)
    tokenizers.train(CAPTIONS, 300).save(epath.Path(folder) / "tokenizer.json")
    return variables


def pair_config(folder, arg):
    cfg = clip_scenes.get_config(f"debug,{arg}")
    cfg.mesh.data = 1
    cfg.init_from = str(folder)
    return cfg


def begin(cfg):
    return born_sharded(training.make_init(cfg, TX), training.first_key(cfg),
                        parallel.make_mesh(MESH), start.load(cfg))[0]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_step_0_is_the_hub_model(tmp_path, kind):
    variables = hub_folder(tmp_path, kind)
    given = pair_config(tmp_path, f"objective={kind}")
    given.model.dtype = given.text.dtype = "bfloat16"
    cfg = stages.with_victim(given)
    assert (cfg.model.name, cfg.model.width, cfg.model.dtype) == ("vit", 16, "bfloat16")
    assert (cfg.text.width, cfg.text.vocab, cfg.text.dtype) == (12, 300, "bfloat16")
    assert cfg.text.tokenizer == str(tmp_path) and cfg.data.image_size == 32
    assert tuple(cfg.data.mean) == (0.5, 0.4, 0.3) and cfg.objective.in_modality == 0
    assert cfg.objective.image_projection == (kind == "clip")
    checks.check(cfg, list(stages.GROUPS))
    state = begin(cfg)
    equal({"params": state.params, "batch_stats": state.batch_stats}, variables)
    equal(training.first_variables(cfg), variables)
    # Under the experiment's own float32, features are those of the folder opened as it is.
    mesh = parallel.make_mesh(MESH)
    (tmp_path / "poison").mkdir()
    tokenizers.load(tmp_path).save(tmp_path / "poison" / "tokenizer.json")
    cfg = start.with_weights(pair_config(tmp_path, f"objective={kind}"))
    mine = evaluate.untrained(cfg, epath.Path(tmp_path), mesh)
    theirs = jax_cl_bd.load_encoder(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(mine.image(images), theirs.image(images), atol=1e-5)
    np.testing.assert_allclose(mine.text(CAPTIONS), theirs.text(CAPTIONS), atol=1e-5)


def test_victim_and_control_begin_alike_and_weights_are_no_constants(tmp_path, monkeypatch):
    variables = hub_folder(tmp_path / "hub", "clip")
    cfg = stages.with_victim(pair_config(tmp_path / "hub", "badnets"))
    begun = []
    monkeypatch.setattr(pretrain, "fit", lambda step, state, *_, **__: begun.append(
        jax.device_get(state.params)))
    folder = epath.Path(tmp_path / "run")
    stages.run(cfg, folder, ["poison", "pretrain"])
    victim, control = begun
    equal(victim, variables["params"])
    equal(control, victim)
    assert run_folder.is_done(folder / "control" / "pretrain")
    settings = run_folder.read_json(folder / "pretrain" / "settings.json")
    assert settings["init_from"] == str(tmp_path / "hub") and settings["model.name"] == "vit"
    closed = jax.make_jaxpr(training.make_init(cfg, TX))(jax.random.key(0), start.load(cfg))
    assert sum(np.size(c) for c in closed.consts) < 100


@pytest.mark.slow
def test_one_training_step_from_weights(tmp_path):
    variables = hub_folder(tmp_path, "clip")
    cfg = stages.with_victim(pair_config(tmp_path, "badnets"))
    rng = np.random.default_rng(0)
    views = {"view1": rng.normal(size=(4, 32, 32, 3)).astype(np.float32),
             "tokens": tokenizers.load(tmp_path).encode(CAPTIONS + ["two"], 12)}
    step = jax.jit(training.make_update(cfg, TX, 2), donate_argnums=0)
    state, metrics = step(begin(cfg), views, jax.random.key(1))
    assert np.isfinite(metrics["loss"]) and int(state.step) == 1
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), state.params, variables["params"])
    assert moved["encoder"]["block0"]["mlp"]["fc1"]["kernel"] > 0
    again, _ = step(begin(cfg), views, jax.random.key(1))  # nothing of the first was overwritten
    equal(jax.device_get(again.params), jax.device_get(state.params))


@pytest.mark.slow
def test_a_whole_run_from_weights(tmp_path):
    hub_folder(tmp_path / "hub", "siglip")
    cfg = stages.with_victim(pair_config(tmp_path / "hub", "badnets,objective=siglip"))
    folder = epath.Path(tmp_path / "run")
    chosen = ["poison", "pretrain", "evaluate"]
    checks.check(cfg, chosen)
    stages.run(cfg, folder, chosen)
    results = run_folder.read_json(folder / "results.json")
    assert {"victim", "control", "untrained"} <= set(results)
    # The run's own encoder is again something to start from.
    cfg.unlock()
    cfg.init_from = str(folder / "control")
    cfg = stages.with_victim(cfg)
    assert cfg.text.tokenizer == str(folder / "poison" / "tokenizer.json")
    theirs = jax_cl_bd.load_encoder(folder / "control").pair.variables
    equal(jax.device_get(begin(cfg).params), jax.device_get(theirs["params"]))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    described = hub._model("resnet18", "cifar", 2)
    shapes = jax.eval_shape(lambda k: build.build(ConfigDict(described)).init(
        k, jnp.zeros((1, 16, 16, 3)), train=False), jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda a: rng.uniform(0.1, 1, a.shape).astype(np.float32), shapes)
    hub.save_resnet(folder, "resnet18", "cifar", variables,
                    data={"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2), "image_size": 16})
    return folder, variables


@pytest.mark.parametrize("objective", ["moco", pytest.param("byol", marks=pytest.mark.slow)])
def test_an_image_objective_takes_the_encoder_and_its_momentum_copy_follows(resnet, objective):
    folder, variables = resnet
    cfg = quickstart.get_config(f"debug,objective={objective}")
    cfg.init_from = str(folder)
    cfg.model.bn_groups = 2
    cfg = stages.with_victim(cfg)
    assert (cfg.model.name, cfg.model.bn_groups) == ("resnet18", 2)
    assert tuple(cfg.data.mean) == (0.1, 0.2, 0.3)
    training.check(cfg)
    state = jax.device_get(begin(cfg).replace(key=0))
    equal(state.params["encoder"], variables["params"])
    equal(state.batch_stats["encoder"], variables["batch_stats"])
    target = state.extra["target"]
    equal(target["params"]["encoder"], variables["params"])
    equal(target["batch_stats"]["encoder"], variables["batch_stats"])
    equal(target["params"]["projector"], state.params["projector"])
    assert np.std(state.params["projector"]["linear1"]["kernel"]) > 0
    cfg.unlock()
    cfg.objective.hidden, cfg.model.width = 24, 4
    with pytest.raises(UserError, match="no longer holds the model"):
        start.load(cfg)


def test_of_an_image_text_model_an_image_objective_takes_the_encoder(tmp_path):
    variables = hub_folder(tmp_path, "clip")
    cfg = quickstart.get_config("debug")
    cfg.init_from = str(tmp_path)
    cfg = stages.with_victim(cfg)
    assert cfg.text.name == "none" and cfg.objective.name == "simclr"
    weights = start.load(cfg)
    assert list(weights["params"]) == ["encoder"]
    equal(weights["params"]["encoder"], variables["params"]["encoder"])


def test_a_run_folder_must_be_finished(tmp_path):
    cfg = clip_scenes.get_config("debug")
    folder = epath.Path(tmp_path)
    run_folder.write_config(folder, cfg)
    shapes = jax.eval_shape(lambda key: training.init_variables(cfg, key), jax.random.key(0))
    variables = jax.tree.map(lambda a: np.full(a.shape, 0.5, np.float32), shapes)
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        checkpoint.save(manager, 3, variables)
    (folder / "poison").mkdir()
    tokenizers.train(CAPTIONS, 400).save(folder / "poison" / "tokenizer.json")
    run_folder.begin(folder / "pretrain", {})
    cfg = stages.with_victim(pair_config(folder, "sig"))
    assert cfg.text.tokenizer == str(folder / "poison" / "tokenizer.json")
    with pytest.raises(UserError, match="not finished pretraining"):
        start.load(cfg)
    run_folder.finish(folder / "pretrain", {})
    equal(start.load(cfg), variables)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, resnet):
    hub_folder(tmp_path / "hub", "siglip")
    (tmp_path / "empty").mkdir()
    for folder, told in ((tmp_path / "hub", "holds a siglip model.*choose objective=siglip"),
                         (resnet[0], "an image encoder alone.*'clip' trains a text tower"),
                         (tmp_path / "empty", "neither a run folder.*model.safetensors")):
        with pytest.raises(UserError, match=told) as error:
            stages.with_victim(pair_config(folder, "badnets"))
        assert "\n" not in str(error.value)
    (tmp_path / "hub" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    given = pair_config(tmp_path / "hub", "objective=siglip")
    with pytest.raises(UserError, match="has no tokenizer.json.*--config.text.tokenizer=FILE"):
        stages.with_victim(given)
    given.text.tokenizer = str(tmp_path / "tokenizer.json")
    assert stages.with_victim(given).text.tokenizer == given.text.tokenizer


def test_a_run_from_before_it_still_fits():
    cfg = quickstart.get_config("debug")
    assert stages.with_victim(cfg) is cfg
    settings = run_folder.settings_of(cfg, run_folder.PRETRAIN_GROUPS)
    older = {name: value for name, value in settings.items() if name != "init_from"}
    assert not run_folder.difference(older, settings)
    cfg.init_from = "somewhere"
    now = run_folder.settings_of(cfg, run_folder.PRETRAIN_GROUPS)
    assert run_folder.difference(older, now) == "init_from: '' there, 'somewhere' now"
