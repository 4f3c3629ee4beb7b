"""Fine-tuning starts from the victim, moves it, and leaves the victim as it was."""

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd import parallel
from jax_cl_bd.data import sources, texts
from jax_cl_bd.defenses import distill, fine_tune
from jax_cl_bd.defenses.given import Given
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training
from tests.defenses import small_repair


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,defense=fine_tune")
    cfg.data.scenes_train = 32
    cfg.mesh.data = 1
    return cfg


def tuned(cfg, folder, lr, truth=None):
    mine = ConfigDict(cfg.to_dict())
    mine.defense.optim.update(lr=lr, warmup_steps=0, schedule="constant", weight_decay=0.0)
    mesh = parallel.make_mesh(mine.mesh)
    data = sources.load(mine.data, "train")
    variables = training.first_variables(mine)
    before = jax.tree.map(np.array, variables)
    victim = encoder.of_parts(mine, variables, mesh, texts.make_tokenizer(mine, data))
    outcome = fine_tune.run(mine, [victim], Given(data), truth, mesh, epath.Path(folder),
                            jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, variables))
    return before, outcome, victim


@pytest.mark.slow
def test_moves_the_victims_own_weights(cfg, tmp_path):
    before, still, victim = tuned(cfg, tmp_path / "still", 1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), before["params"],
                 jax.tree.map(np.asarray, still.variables["params"]))
    before, moved, _ = tuned(cfg, tmp_path / "moved", 1e-2)
    for part in ("encoder", "text", "image_projection", "text_projection", "scale"):
        both = zip(jax.tree.leaves(before["params"][part]),
                   jax.tree.leaves(moved.variables["params"][part]))
        assert any(np.abs(a - np.asarray(b)).max() > 1e-4 for a, b in both), part
    assert moved.verdict == {"clean_pairs": 32, "steps": 2, "gradient_steps": 2}
    # The defense's folder opens by itself, tokenizer included.
    opened = encoder.load(tmp_path / "moved", victim.mesh)
    again = encoder.of_parts(moved.cfg, moved.variables, victim.mesh, victim.pair.tokenizer)
    np.testing.assert_allclose(opened.text(["a red star"]), again.text(["a red star"]), atol=1e-6)


@pytest.mark.slow
def test_the_truth_changes_nothing(cfg, tmp_path):
    truth = small_repair.truth()
    found = [tuned(cfg, tmp_path / name, 1e-2, t)[1]
             for name, t in (("with", truth), ("without", None))]
    assert found[0].verdict == found[1].verdict
    jax.tree.map(np.testing.assert_array_equal, found[0].variables, found[1].variables)


def test_defenses_say_which_models_they_are_for(cfg):
    images = ConfigDict(cfg.to_dict())
    images.text = ConfigDict({"name": "none"})
    with pytest.raises(UserError, match="image-text"):
        fine_tune.check(images, 32)
    with pytest.raises(UserError, match="encoders of images"):
        distill.check(cfg, 32)
