"""BDetCLIP: its texts, its score against a plain loop, what it flags, and the verdict."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from configs import clip_scenes
from jax_cl_bd import defend, evaluate, parallel, poison
from jax_cl_bd.data import sources, templates, texts
from jax_cl_bd.defenses import bdetclip, incoming
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training

SCORED = ("auroc", "tpr", "fpr", "tpr_at_1_percent_fpr")
CLASSES = ("red_star", "cup")


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug,badnets,defense=bdetclip")
    cfg.mesh.data = 1
    cfg.data.scenes_validation = 60
    return cfg


@pytest.fixture(scope="module")
def made(cfg):
    source = sources.load(cfg.data, "train")
    tests = evaluate.test_data(cfg, poison.make_trigger(cfg))
    arriving, triggered = incoming.make(tests)
    clean = sources.Subset(source, np.arange(50))
    return Given(clean, defend.validation(cfg), None, arriving), Truth(None, 3, None, None,
                                                                       triggered)


def run(cfg, model, given, truth, folder):
    return bdetclip.run(cfg, [model], given, truth, parallel.make_mesh(cfg.mesh),
                        epath.Path(folder), jax.random.key(0))


def insensitive(given, triggered, classes):
    """A model that matches an image to its class's name, and a triggered one to every text."""
    seen = {bytes(image) for image in given.incoming.images[triggered]}

    def image(x):
        rng = np.random.default_rng(0)
        z = np.abs(rng.normal(size=(len(x), 8))) * [1, 1, 1, 1, 1, 1, 1, 0]
        z[[bytes(one) in seen for one in x]] = np.eye(8)[7]
        return np.float32(z / np.linalg.norm(z, axis=1, keepdims=True))

    def text(found):
        named = [any(name in one for name in classes) for one in found]
        z = np.where(np.array(named)[:, None], [1] * 7 + [1], [0] * 7 + [1])
        return np.float32(z / np.linalg.norm(z, axis=1, keepdims=True))

    return SimpleNamespace(image=image, project=lambda z: z, text=text, image_size=32)


def settings(**changes):
    return ConfigDict(dict(benign=3, perturbed=5, words=2, keep_name=False, seed=0) | changes)


def test_the_texts_of_the_classes():
    words = [f"w{n}" for n in range(30)]
    benign, perturbed = bdetclip.descriptions(settings(), CLASSES, words)
    assert [len(own) for own in benign] == [3, 3] and [len(own) for own in perturbed] == [5, 5]
    prompts = [next(p for p in templates.PROMPTS if templates.fill(p, "cup") == text)
               for text in benign[1]]
    assert benign[0] == [p.replace("{}", "red star") for p in prompts]
    for own in perturbed:
        for text, prompt in zip(own, prompts):
            start, end = prompt.split("{}")
            inside = text[len(start):len(text) - len(end)].split()
            assert text.startswith(start) and text.endswith(end)
            assert len(set(inside)) == 2 and set(inside) <= set(words)
    assert len({text for own in perturbed for text in own}) == 10
    _, kept = bdetclip.descriptions(settings(keep_name=True), CLASSES, words)
    for text, prompt in zip(kept[0], prompts):
        sentence, drawn = text.split(", ")
        assert sentence + "." == templates.fill(prompt, "red_star") or not prompt.endswith(".")
        assert set(drawn.split()) <= set(words)
    assert bdetclip.descriptions(settings(), CLASSES, words)[1] == perturbed
    assert bdetclip.descriptions(settings(seed=1), CLASSES, words)[1] != perturbed


def test_the_vocabulary_has_no_word_of_a_class():
    class Two:
        def __len__(self):
            return 2

        def captions(self, rows):
            return [[["A red cup.", "a big Star"], ["a star-fish"]][i] for i in rows]

    assert bdetclip.vocabulary(Two(), CLASSES) == ["a", "big", "fish"]


def test_the_score_is_a_mean_of_differences_of_cosines(cfg, made):
    given = made[0]
    rng = np.random.default_rng(0)
    of_text = {}

    def text(found):
        for one in found:
            of_text.setdefault(one, rng.normal(size=4) / 3)
        return np.stack([of_text[one] / np.linalg.norm(of_text[one]) for one in found])

    shown = rng.integers(0, 256, (5, 2, 2, 3)).astype(np.uint8)
    model = SimpleNamespace(text=text, image_size=2, image=lambda x: x.reshape(len(x), -1)[:, :4],
                            project=lambda z: z / np.linalg.norm(z, axis=1, keepdims=True))
    benign, perturbed = bdetclip.descriptions(settings(), CLASSES, [f"w{n}" for n in range(9)])
    direction = (bdetclip._classes(model, benign) - bdetclip._classes(model, perturbed)).mean(0)
    found = bdetclip.differences(model, [{"image": x} for x in shown], direction, "")
    for x, score in zip(shown, found):
        z = x.reshape(-1)[:4] / np.linalg.norm(x.reshape(-1)[:4].astype(float))
        total = 0
        for good, bad in zip(benign, perturbed):
            for sign, own in ((1, good), (-1, bad)):
                mean = sum(of_text[t] / np.linalg.norm(of_text[t]) for t in own)
                total += sign * (z @ mean) / np.linalg.norm(mean)
        np.testing.assert_allclose(score, total / len(CLASSES), rtol=1e-5)
    assert len(given.incoming) == 100


def test_finds_images_that_the_texts_leave_cold(cfg, made, tmp_path):
    given, truth = made
    found = run(cfg, insensitive(given, truth.triggered, given.incoming.classes), given, truth,
                tmp_path)
    verdict = found.verdict
    assert verdict["auroc"] == verdict["tpr"] == 1.0 and verdict["fpr"] <= 0.2
    assert verdict["rows"] == 100 and verdict["clean_rows"] == 60 and verdict["classes"] == 12
    assert verdict["flagged_share"] == verdict["flagged"] / 100 >= 0.5
    assert truth.triggered[verdict["most_suspicious"]].all() and found.variables is None
    with np.load(tmp_path / "scores.npz") as kept:
        assert (kept["difference"] < verdict["threshold"]).sum() == verdict["flagged"]
    assert Image.open(tmp_path / "suspicious.png").size == (16 * 64, 2 * 64)


def test_a_real_model_and_no_truth(cfg, made, tmp_path):
    given, truth = made
    victim = encoder.of_parts(cfg, training.first_variables(cfg), parallel.make_mesh(cfg.mesh),
                              texts.make_tokenizer(cfg, given.clean))
    known = run(cfg, victim, given, truth, tmp_path).verdict
    assert all(0 <= known.pop(name) <= 1 for name in SCORED)
    blind = run(cfg, victim, given, None, tmp_path).verdict
    assert known == blind and json.loads(json.dumps(known)) == known
    clean = Truth(None, 3, None, None, np.zeros(100, bool))
    assert run(cfg, victim, given, clean, tmp_path).verdict["auroc"] is None
    mine = ConfigDict(cfg.to_dict())
    mine.defense.words = 5000
    with pytest.raises(UserError, match="fewer than defense.words=5000"):
        run(mine, victim, given, None, tmp_path)


def test_bad_settings_are_refused(cfg):
    bdetclip.check(cfg, 50)
    for changes, says in (({"defense.false_alarm": 0.0}, "false_alarm=0"),
                          ({"defense.benign": 81}, "benign=81 must be 1 to 80"),
                          ({"defense.perturbed": 0}, "perturbed=0"),
                          ({"defense.words": 0}, "words=0"),
                          ({"defense.validation_split": ""}, "validation_split"),
                          ({"text.name": "none"}, "image-text")):
        mine = ConfigDict(cfg.to_dict())
        mine.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=says):
            bdetclip.check(mine, 50)
