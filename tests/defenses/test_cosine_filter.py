"""The cosine filter: its score against a plain loop, what it drops, and the verdict."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from configs import clip_scenes, quickstart
from jax_cl_bd import defend, parallel, poison, run_folder
from jax_cl_bd.data import mentions, sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses import cosine_filter
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training

SCORED = ("auroc", "tpr", "fpr", "tpr_at_1_percent_fpr", "remaining_poisons")


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,badnets,defense=cosine_filter")
    cfg.mesh.data = 1
    return cfg


@pytest.fixture(scope="module")
def made(cfg):
    source = sources.load(cfg.data, "train")
    plan, rows = poison.make(cfg, source, sources.table(source), poison.make_trigger(cfg))
    pool = Pool(source, plan, rows)
    clean = sources.Subset(source, defend.clean_rows(plan, len(source), 0.25, 0))
    return source, plan, Given(clean, None, pool)


def independent(source):
    """A model that knows the class of an image (of the nearest clean one) and of a caption."""
    known = np.stack([source[i]["image"].ravel() for i in range(len(source))]).astype(np.float32)
    labels, classes = np.asarray(source.table(np.arange(len(source)))[0]), source.classes

    def image(x):
        flat = x.reshape(len(x), -1).astype(np.float32)
        return np.eye(len(classes), dtype=np.float32)[
            labels[((known**2).sum(1) - 2 * flat @ known.T).argmin(1)]]

    def text(captions):
        named = np.stack([mentions.naming([[c] for c in captions], name) for name in classes], 1)
        return np.float32(named / np.maximum(np.linalg.norm(named, axis=1, keepdims=True), 1))

    return SimpleNamespace(image=image, project=lambda z: z, text=text,
                           image_size=source[0]["image"].shape[0])


def run(cfg, model, given, truth, folder):
    return cosine_filter.run(cfg, [model], given, truth, parallel.make_mesh(cfg.mesh),
                             epath.Path(folder), jax.random.key(0))


def test_the_score_is_the_cosine_of_a_row_and_its_first_caption():
    rng = np.random.default_rng(0)
    vectors = {text: v / np.linalg.norm(v) for text, v in zip("abc", rng.normal(size=(3, 3)))}
    captions = [["a"], ["b", "c"], ["c", "a", "b"], ["a"]]
    shown = rng.integers(1, 255, (4, 1, 1, 3)).astype(np.uint8)
    model = SimpleNamespace(
        image_size=1, image=lambda x: x.reshape(-1, 3) - 100.0,
        project=lambda z: z / np.linalg.norm(z, axis=1, keepdims=True),
        text=lambda found: np.stack([vectors[text] for text in found]))
    source = [{"image": x, "captions": own} for x, own in zip(shown, captions)]
    expected = []
    for x, own in zip(shown.reshape(4, 3) - 100.0, captions):
        expected.append(sum(a * b for a, b in zip(x, vectors[own[0]])) / np.sqrt(sum(x * x)))
    np.testing.assert_allclose(cosine_filter.first_cosines(model, source, ""), expected,
                               rtol=1e-6)


def test_an_independent_model_finds_pairs_that_do_not_match(cfg, made, tmp_path):
    source, plan, given = made
    truth = Truth(plan, 3, None, given.pool.poison)
    found = run(cfg, independent(source), given, truth, tmp_path)
    verdict = found.verdict
    assert verdict["auroc"] == verdict["tpr"] == 1.0 and verdict["fpr"] == 0.0
    assert verdict["dropped"] == 8 and verdict["remaining_poisons"] == 0
    poisons = np.flatnonzero(given.pool.poison >= 0).tolist()
    assert verdict["most_suspicious"][:8] == poisons
    assert found.variables is None
    with np.load(tmp_path / "scores.npz") as kept:
        assert np.flatnonzero(kept["cosine"] < verdict["threshold"]).tolist() == poisons
    assert Image.open(tmp_path / "suspicious.png").size == (16 * 64, 2 * 64)
    assert set(found.report["pictures"]) == {"suspicious.png"}


def test_the_suspect_itself_and_no_truth(cfg, made, tmp_path):
    source, plan, given = made
    victim = encoder.of_parts(cfg, training.first_variables(cfg), parallel.make_mesh(cfg.mesh),
                              texts.make_tokenizer(cfg, source))
    cosine_filter.check(cfg, 50)
    known = run(cfg, victim, given, Truth(plan, 3, None, given.pool.poison), tmp_path).verdict
    said = {name: known.pop(name) for name in SCORED}
    assert 0 <= said["auroc"] <= 1 and said["remaining_poisons"] == round(8 * (1 - said["tpr"]))
    blind = run(cfg, victim, given, None, tmp_path).verdict
    assert known == blind and json.loads(json.dumps(known)) == known
    assert known["model"] == "suspect" and -1 <= known["threshold"] <= 1
    assert known["rows"] == 200 and known["clean_rows"] == 50
    clean = run(cfg, victim, Given(given.clean, None, Pool(source)),
                Truth(plan, 3, None, np.full(200, -1)), tmp_path).verdict
    assert all(clean[name] is None for name in SCORED)


def test_another_scorer(cfg, made, tmp_path, monkeypatch):
    source, _, given = made
    mine = ConfigDict(cfg.to_dict())
    mine.defense.scorer = str(tmp_path)
    run_folder.write_config(epath.Path(tmp_path), cfg)
    cosine_filter.check(mine, 50)
    model = independent(source)
    monkeypatch.setattr(cosine_filter.encoders, "load", lambda path, mesh: model)
    verdict = run(mine, None, given, None, tmp_path / "out").verdict
    assert verdict["model"] == "another" and verdict["dropped"] == 8
    run_folder.write_config(epath.Path(tmp_path), quickstart.get_config("debug"))
    with pytest.raises(UserError, match="scorer=.* is an encoder of images alone"):
        cosine_filter.check(mine, 50)


def test_bad_settings_are_refused(cfg, tmp_path):
    for changes, says in (({"defense.false_alarm": 1.5}, "false_alarm=1.5"),
                          ({"defense.scorer": str(tmp_path)}, "neither a run folder"),
                          ({"text.name": "none"}, "image-text model"),
                          ({"data.name": "digits", "data.scenes_train": 0}, "no captions|none")):
        mine = ConfigDict(cfg.to_dict())
        mine.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            cosine_filter.check(mine, 50)
    with pytest.raises(UserError, match="clean_fraction"):
        cosine_filter.check(cfg, 1)
