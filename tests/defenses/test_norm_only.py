"""Batch norm alone moves: its statistics against NumPy and flax, and nothing else."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

import jax_cl_bd
from configs import clip_scenes
from jax_cl_bd import parallel
from jax_cl_bd.data import feed, sources, texts
from jax_cl_bd.defenses import norm_only
from jax_cl_bd.defenses.given import Given
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,defense=norm_only")
    cfg.data.scenes_train = 40
    cfg.mesh.data = 1
    return cfg


def passed(cfg, folder, truth=None):
    mesh, source = parallel.make_mesh(cfg.mesh), sources.load(cfg.data, "train")
    suspect = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                               texts.make_tokenizer(cfg, source))
    before = jax.tree.map(np.array, suspect.pair.variables)
    found = norm_only.run(cfg, [suspect], Given(source), truth, mesh, epath.Path(folder),
                          jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, suspect.pair.variables)
    return suspect, source, found


def test_statistics_move_as_by_hand_and_no_parameter_does(cfg, tmp_path):
    mine = ConfigDict(cfg.to_dict())
    mine.defense.steps = 1
    suspect, source, found = passed(mine, tmp_path)
    before = suspect.pair.variables
    jax.tree.map(np.testing.assert_array_equal, before["params"], found.variables["params"])
    # The images of the only batch; augment.view1 leaves them as they are.
    rows = feed.rows_at(0, np.arange(40), 16, mine.seed)
    x = np.stack([source[int(r)]["image"] for r in rows]) / 255
    x = np.float32((x - np.array(mine.data.mean)) / np.array(mine.data.std))
    _, wanted = suspect.module.apply(
        {kind: before[kind]["encoder"] for kind in before}, x, train=True, mutable=["batch_stats"])
    got = found.variables["batch_stats"]["encoder"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                 wanted["batch_stats"], got)
    # The first norm by NumPy: a 3x3 convolution, then 0.9 of the old and 0.1 of the batch.
    kernel = np.asarray(before["params"]["encoder"]["conv1"]["kernel"])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    y = np.einsum("nhwcij,ijco->nhwo", windows, kernel).reshape(-1, kernel.shape[-1])
    old = before["batch_stats"]["encoder"]["bn1"]
    np.testing.assert_allclose(got["bn1"]["mean"], 0.9 * old["mean"] + 0.1 * y.mean(0), rtol=1e-4,
                               atol=1e-5)
    np.testing.assert_allclose(got["bn1"]["var"], 0.9 * old["var"] + 0.1 * y.var(0, ddof=1),
                               rtol=1e-4)


def test_the_truth_changes_nothing_and_a_second_call_neither(cfg, tmp_path):
    truth = small_repair.truth()
    suspect, _, known = passed(cfg, tmp_path / "known", truth)
    _, _, blind = passed(cfg, tmp_path / "blind")
    _, _, again = passed(cfg, tmp_path / "known")
    assert known.verdict == blind.verdict == again.verdict
    assert known.verdict == {"clean_pairs": 40, "steps": 2, "gradient_steps": 0}
    for other in (blind, again):
        jax.tree.map(np.testing.assert_array_equal, known.variables, other.variables)
    opened = jax_cl_bd.load_encoder(tmp_path / "known")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    mine = encoder.of_parts(known.cfg, known.variables, suspect.mesh, suspect.pair.tokenizer)
    np.testing.assert_allclose(opened.image(images), mine.image(images), atol=1e-6)
    assert np.abs(opened.image(images) - suspect.image(images)).max() > 1e-3


def test_bad_settings_are_refused(cfg):
    norm_only.check(cfg, 40)
    for changes, clean, says in (({"defense.steps": 0}, 40, "steps=0"),
                                 ({"defense.batch_size": 0}, 40, "batch_size=0"),
                                 ({}, 15, "15 clean pairs are fewer")):
        mine = ConfigDict(cfg.to_dict())
        mine.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            norm_only.check(mine, clean)
    with pytest.raises(UserError, match="'vit' has none"):
        norm_only.check(clip_scenes.get_config("debug,tower=vit,defense=norm_only"), 40)
    images = ConfigDict(cfg.to_dict())
    images.text = ConfigDict({"name": "none"})
    with pytest.raises(UserError, match="image-text"):
        norm_only.check(images, 40)
