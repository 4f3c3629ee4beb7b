"""Encoders opened from folders: padding changes nothing, hub folders and bad folders."""

import jax
import numpy as np
import pytest
from etils import epath

import jax_cl_bd
from configs import quickstart
from jax_cl_bd import checkpoint, parallel, run_folder
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import build, encoder, hub
from jax_cl_bd.objectives import training


@pytest.fixture(scope="module")
def opened():
    cfg = quickstart.get_config("debug")
    start = training.first_variables(cfg)
    variables = {c: start[c]["encoder"] for c in start}
    return cfg, start, encoder.make(cfg, variables, parallel.make_mesh(cfg.mesh))


def images(count, side=16):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def test_features_are_the_modules_own(opened):
    cfg, _, made = opened
    x = (images(5) / 255.0 - cfg.data.mean) / np.array(cfg.data.std)
    own = build.build(cfg.model).apply(made.variables, x.astype(np.float32), train=False)
    np.testing.assert_allclose(made.image(images(5)), own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 7, 8, 64, 70, 129])
def test_no_image_is_dropped_or_changed_by_its_batch(opened, count):
    made = opened[2]  # batches of 64 on 8 devices
    whole = made.image(images(129))
    got = made.image(images(129)[:count])
    assert got.shape == (count, whole.shape[1])
    np.testing.assert_allclose(got, whole[:count], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong, says", [
    (images(2) / 255.0, "images are float64; an encoder takes uint8"),
    (images(2).astype(np.int32), "int32"), (images(2).tolist(), "images are list"),
    (images(2, side=17), r"shape \[2, 17, 17, 3\]; this encoder takes \[N, 16, 16, 3\]"),
    (images(1)[0], r"\[16, 16, 3\]"), (images(2)[..., :1], r"\[2, 16, 16, 1\]"),
    (images(0), "N at least 1")])
def test_other_images_than_it_was_made_for_are_refused(opened, wrong, says):
    with pytest.raises(UserError, match=says):
        opened[2].image(wrong)


def test_watchers_see_every_image_once(opened):
    seen = []
    opened[2].watchers.append(seen.append)
    opened[2].image(images(129))
    opened[2].watchers.clear()
    assert seen == [64, 64, 1]


def test_run_folder_opens_from_the_public_face(opened, tmp_path, capsys):
    cfg, start, made = opened
    folder = epath.Path(tmp_path)
    run_folder.write_config(folder, cfg)
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        checkpoint.save(manager, 3, {"params": start["params"], "batch_stats":
                                     start["batch_stats"], "other": np.zeros(3)})
    found = jax_cl_bd.load_encoder(tmp_path)
    np.testing.assert_array_equal(found.image(images(4)), made.image(images(4)))
    assert found.step == 3 and not capsys.readouterr().err
    run_folder.begin(folder / "pretrain", {})
    jax_cl_bd.load_encoder(tmp_path)
    warning, = capsys.readouterr().err.splitlines()
    assert "is not complete; this is its encoder of step 3" in warning
    run_folder.finish(folder / "pretrain", {}, step=4)
    with pytest.raises(UserError, match="trained to step 4.*of step 3: .*--stages=pretrain"):
        jax_cl_bd.load_encoder(tmp_path)


def test_hub_folder_opens_from_the_public_face(opened, tmp_path):
    cfg = opened[0].copy_and_resolve_references()
    with cfg.unlocked():
        cfg.model.update(name="resnet18", width=8, stem="cifar", bn_groups=1)
    module = build.build(cfg.model)
    variables = jax.jit(lambda k: module.init(k, np.zeros((1, 16, 16, 3), np.float32),
                                              train=False))(jax.random.key(1))
    hub.save_resnet(tmp_path, "resnet18", "cifar", variables,
                    data={"mean": cfg.data.mean, "std": cfg.data.std, "image_size": 16})
    mesh = parallel.make_mesh(cfg.mesh)
    mine = encoder.make(cfg, variables, mesh).image(images(3))
    np.testing.assert_allclose(jax_cl_bd.load_encoder(tmp_path).image(images(3)), mine, rtol=1e-5)


def test_folders_without_an_encoder_are_refused(opened, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        jax_cl_bd.load_encoder(tmp_path)
    run_folder.write_config(epath.Path(tmp_path), opened[0])
    with pytest.raises(UserError, match="no good checkpoint"):
        jax_cl_bd.load_encoder(tmp_path)
