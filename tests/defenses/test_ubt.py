"""UBT: whom it suspects, what it is trained on, and that it decides without the truth."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd import defend, parallel
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import images, sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import ubt
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training

ROWS = 60


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,defense=ubt")
    cfg.data.scenes_train = ROWS
    cfg.mesh.data = 1
    cfg.defense.optim.update(warmup_steps=0, schedule="constant")
    cfg.defense.update(suspects=6, weight=3.0)
    cfg.defense.overfit.fraction = 0.4
    return cfg


@pytest.fixture(scope="module")
def pool(cfg):
    return Pool(sources.load(cfg.data, "train"))


@pytest.fixture(scope="module")
def suspect(cfg):
    return encoder.of_parts(cfg, training.first_variables(cfg), parallel.make_mesh(cfg.mesh),
                            texts.make_tokenizer(cfg, sources.load(cfg.data, "train")))


def repaired(cfg, suspect, pool, folder, truth=None):
    return ubt.run(cfg, [suspect], Given(None, defend.validation(cfg), pool), truth, suspect.mesh,
                   epath.Path(folder), jax.random.key(0))


@pytest.mark.slow
def test_suspects_resumes_and_the_truth_changes_nothing(cfg, suspect, pool, tmp_path):
    start = jax.tree.map(np.array, suspect.pair.variables)
    poison = np.where(np.arange(ROWS) % 3 == 0, np.arange(ROWS), -1)
    known = repaired(cfg, suspect, pool, tmp_path / "known", Truth(Plan.empty(), 3, None, poison))
    blind = repaired(cfg, suspect, pool, tmp_path / "blind")
    jax.tree.map(np.testing.assert_array_equal, start, suspect.pair.variables)
    jax.tree.map(np.testing.assert_array_equal, known.variables, blind.variables)
    scored = {k: v for k, v in known.verdict.items() if k not in blind.verdict}
    assert {k: v for k, v in known.verdict.items() if k not in scored} == blind.verdict
    with np.load(tmp_path / "known" / "scores.npz") as found:
        scores = found["after"] - found["before"]
    bad = np.argsort(-scores, kind="stable")[:6].tolist()
    assert known.verdict["most_suspicious"] == bad and known.verdict["suspected"] == 6
    assert known.report["suspected"] == [pool.order[row] for row in bad]
    hits = sum(poison[row] >= 0 for row in bad)
    assert scored == {"suspect_precision": hits / 6, "suspect_recall": hits / 20}
    assert known.verdict["clean_looking"] == 30 and known.verdict["overfit_pairs"] == 24
    assert known.verdict["overfit_steps"] == 2 and len(known.points) == 2
    assert known.verdict["gradient_steps"] == 2 + cfg.defense.steps * len(cfg.defense.rates)
    lines = (tmp_path / "known" / "rate_0.0003" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["train/ascending"] for x in lines if "train/ascending" in x]
    assert known.cfg.objective.first_bad == 30 and len(known.cfg.objective.special) == 3
    # The same command computes nothing anew, and ends with the same bits.
    before = {p: p.read_text() for p in (tmp_path / "known").glob("**/metrics.jsonl")}
    assert len(before) == 2
    again = repaired(cfg, suspect, pool, tmp_path / "known")
    assert again.verdict == blind.verdict
    assert all(path.read_text() == content for path, content in before.items())
    jax.tree.map(np.testing.assert_array_equal, again.variables, known.variables)


def test_similarities_are_means_over_a_rows_captions(suspect, pool):
    found = ubt.similarities(suspect, pool, "test")
    for row in (0, 7, ROWS - 1):
        item = pool[row]
        x = images.test_image(item["image"], suspect.image_size)[None]
        z, t = suspect.project(suspect.image(x))[0], suspect.text(item["captions"])
        np.testing.assert_allclose(found[row], np.mean([z @ own for own in t]), atol=1e-5)


def test_bad_settings_are_refused(cfg):
    ubt.check(cfg, 0)
    for changes, says in (({"suspects": 1}, "suspects=1"), ({"suspects": 31}, "suspects=31"),
                          ({"clean_looking": 1.0}, "clean_looking"), ({"bad_share": 0.0}, "share"),
                          ({"tokens": 0}, r"defense\.tokens"), ({"floor": "zero"}, "floor"),
                          ({"ascend": "all"}, "ascend"), ({"in_modality": 1.0}, "in_modality"),
                          ({"points": 3}, "points")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.update(changes)
        with pytest.raises(UserError, match=says):
            ubt.check(mine, 0)
    for changes, says in (({"fraction": 0.2}, "12, fewer than one batch"),
                          ({"fraction": 0.0}, "fraction"), ({"steps": 0}, "steps=0"),
                          ({"lr": 0.0}, "lr=0.0"), ({"objective": "clap"}, "overfit.objective")):
        mine = ConfigDict(cfg.to_dict())
        mine.defense.overfit.update(changes)
        with pytest.raises(UserError, match=says):
            ubt.check(mine, 0)
    mine = ConfigDict(cfg.to_dict())
    mine.objective.name = "siglip"
    with pytest.raises(UserError, match="'clip'"):
        ubt.check(mine, 0)
