"""What the optimised patch of badclip.py is optimised on, and how."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from etils import epath

from configs import clip_scenes
from jax_cl_bd import run_folder
from jax_cl_bd.attacks import badclip
from jax_cl_bd.data import mentions, sources
from jax_cl_bd.models import encoder as encoders
from jax_cl_bd.objectives import training
from jax_cl_bd.triggers import learned_patch

TRIGGER = dict(name="learned_patch", size=2, opacity=1.0, train_place="random",
               train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9))


@pytest.mark.parametrize("labelled", [True, False])
def test_positives_show_the_target_and_negatives_neither_show_nor_name_it(captioned, monkeypatch,
                                                                          labelled):
    train = captioned[0]
    train.images = [np.full((8, 8, 3), row, np.uint8) for row in range(80)]  # tells its row
    table = train.table()
    if not labelled:
        table = dataclasses.replace(table, labels=np.full(80, -1))
    monkeypatch.setattr(sources, "table", lambda source: table)
    surrogate = types.SimpleNamespace(image=lambda x: np.asarray(x)[:, 0, 0, 0],
                                      project=lambda z: z, text=np.array)
    cfg = ml_collections.ConfigDict(dict(seed=0, data=dict(image_size=8), attack=dict(
        target=1, optimise_pairs=1000, batch_size=16, trigger=TRIGGER)))
    data, batches = badclip._pairs(cfg, train, surrogate)
    named = set(np.flatnonzero(mentions.naming(train.texts, "star")))
    own = set(range(1, 80, 4))  # row 5 does not say that it is one; row 4 names one and is none
    assert set(data["positives"]) == (own if labelled else named)
    assert set(data["negatives"]) == set(range(80)) - named - (own if labelled else set())
    assert len(data["text"]) == len(data["images"]) == len(data["negatives"])
    assert all(mentions.pattern("star").search(text) for text in data["text"])
    batch = next(batches)
    assert {name: rows.shape for name, rows in batch.items()} == dict.fromkeys(
        ("images", "positives", "negatives"), (16,)) | {"boxes": (16, 4)}
    assert len(np.unique(batch["boxes"][:, 0])) > 1  # where the poisons will have it


def test_loss_by_hand():
    """Textual consistency and the triplet, on a surrogate that is one linear map."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4 * 4 * 3, 5)).astype(np.float32)
    seen = []

    def embed(x):
        seen.append(np.asarray(x))
        return x.reshape(len(x), -1) @ matrix

    mean, std = np.array((0.1, 0.2, 0.3)), np.array((0.5, 0.6, 0.7))
    surrogate = types.SimpleNamespace(logit_scale=7.0, mean=mean, std=std,
                                      pair=types.SimpleNamespace(image_embedding=embed))
    cfg = ml_collections.ConfigDict(dict(
        data=dict(image_size=4, mean=(9, 9, 9), std=(9, 9, 9)),  # another model's: of no use here
        augment=dict(interpolation="bilinear"),
        attack=dict(margin=1.0, triplet_weight=3.0, trigger={**TRIGGER, "opacity": 1.0})))
    unit = rng.normal(size=(3, 6, 5))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    data = {"images": rng.integers(0, 256, (6, 4, 4, 3), np.uint8), "text": unit[0],
            "positives": unit[1], "negatives": unit[2]}
    batch = {"images": np.array([4, 0, 2]), "positives": np.array([1, 5, 0]),
             "negatives": np.array([3, 3, 2]), "boxes": np.array([[0, 0, 2, 2], [1, 2, 2, 2],
                                                                  [2, 1, 2, 2]])}
    pixels = rng.random((2, 2, 3)).astype(np.float32)
    plain, augmented = (next(k for k in map(jax.random.key, range(9))
                             if bool(jax.random.bernoulli(jax.random.split(k)[0])) is coin)
                        for coin in (False, True))
    data = jax.tree.map(np.float32, data) | {"images": data["images"]}
    got = badclip._loss(cfg, surrogate)(pixels, data, batch, plain)

    z = []
    for row, (y, x, h, w) in zip(batch["images"], batch["boxes"]):
        image = data["images"][row] / 255.0
        image[y:y + h, x:x + w] = pixels
        z.append(((image - mean) / std).reshape(-1) @ matrix)
    z = np.stack(z) / np.linalg.norm(z, axis=1, keepdims=True)
    logits = 7.0 * z @ unit[0][batch["images"]].T
    textual = np.mean([np.log(np.exp(m).sum(1)) - np.diag(m) for m in (logits, logits.T)])
    near = np.linalg.norm(z - unit[1][batch["positives"]], axis=1)
    far = np.linalg.norm(z - unit[2][batch["negatives"]], axis=1)
    visual = np.maximum(0, near - far + 1).mean()
    np.testing.assert_allclose(got, textual + 3 * visual, rtol=1e-4)

    badclip._loss(cfg, surrogate)(pixels, data, batch, augmented)  # the patch itself never is
    shown = np.stack([x[y:y + h, z:z + w] for x, (y, z, h, w) in
                      zip(seen[-1] * std + mean, batch["boxes"])])
    np.testing.assert_allclose(shown, np.broadcast_to(pixels, shown.shape), atol=1e-6)
    assert np.abs(seen[-1] - seen[0]).max() > 0.1


@pytest.mark.parametrize("where, box", [("center", (0.0, 1.0)), ("random", (0.25, 0.75))])
def test_the_patch_is_optimised_where_the_poisons_have_it(captioned, config, monkeypatch, where,
                                                          box):
    train = captioned[0]
    surrogate = types.SimpleNamespace(image=lambda x: np.asarray(x)[:, 0, 0, 0],
                                      project=lambda z: z, text=np.array)
    cfg = config(attack__name="badclip", attack__poisons=40).unlock()
    cfg.attack.update(optimise_pairs=1000, batch_size=64, caption_set="natural", consistent=False,
                      replace=True, trigger={**TRIGGER, "train_place": where, "train_box": box})
    plan = badclip.plan(cfg, train.table(), np.random.default_rng(0))
    _, batches = badclip._pairs(cfg, train, surrogate)
    optimised = np.concatenate([next(batches)["boxes"] for _ in range(20)])
    assert {tuple(b) for b in plan.trigger_box} <= {tuple(b) for b in optimised}
    for boxes in (plan.trigger_box, optimised):
        if where == "center":
            assert (boxes == [7, 7, 2, 2]).all()  # of 16 x 16
        else:
            assert boxes[:, :2].min() == 4 and boxes[:, :2].max() == 10


def test_the_optimiser_lowers_its_loss_and_stores_eight_bits(tmp_path, monkeypatch):
    """On a toy loss whose best patch is known, one pixel of it out of range."""
    cfg = clip_scenes.get_config("debug,optimized_patch")
    cfg.attack.update(optimise_steps=200, surrogate="given")
    best = np.linspace(0.1, 1.3, 5 * 5 * 3).reshape(5, 5, 3).astype(np.float32)
    encoder = types.SimpleNamespace(text=len, image_size=cfg.data.image_size)
    monkeypatch.setattr(encoders, "load", lambda *_: encoder)
    monkeypatch.setattr(badclip, "_pairs", lambda *_: (None, iter(lambda: np.float32(0), 1)))
    monkeypatch.setattr(badclip, "_loss", lambda *_: lambda pixels, data, batch, key: jnp.sum(
        (pixels - best) ** 2) + batch)
    got = badclip.prepare(cfg, None, epath.Path(tmp_path), jax.random.key(0))
    losses = run_folder.read_json(epath.Path(tmp_path) / "trigger" / "optimisation.json")["loss"]
    assert len(losses) == 200 and losses[-1] < 0.1 * losses[0]
    np.testing.assert_array_equal(got["image"], learned_patch.stored(got["image"]))
    np.testing.assert_allclose(got["image"], np.clip(best, 0, 1), atol=0.03)
    assert got["opacity"] == 1


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """Gives learn(**attack) -> (config, params), which prepares a patch in tmp_path. What would
    train or load a surrogate is noted in learn.trained and learn.loaded; the surrogate is a linear
    map. (The whole, in earnest: test_configs, clip_scenes with optimized_patch in debug mode.)"""
    matrix = np.random.default_rng(0).normal(size=(32 * 32 * 3, 8)).astype(np.float32)

    def unit(z):
        return np.float32(z / np.linalg.norm(z, axis=-1, keepdims=True))

    def image(x):
        return np.asarray(x, np.float32).reshape(len(x), -1) / 255 @ matrix

    surrogate = types.SimpleNamespace(
        image=image, project=unit, image_size=32, logit_scale=5.0, mean=(0.0,) * 3, std=(1.0,) * 3,
        text=lambda texts: unit(np.random.default_rng(1).normal(size=(len(texts), 8))),
        pair=types.SimpleNamespace(image_embedding=lambda x: x.reshape(len(x), -1) @ matrix))

    def run(folder="run", **attack):
        cfg = clip_scenes.get_config("debug,optimized_patch")
        cfg.attack.update(surrogate_fraction=0.25, optimise_steps=3, **attack)
        params = badclip.prepare(cfg, sources.load(cfg.data, "train"),
                                 epath.Path(tmp_path) / folder, jax.random.key(cfg.seed))
        return cfg, params

    def load(place, mesh):
        run.loaded.append(str(place))
        return surrogate

    def fit(step_fn, state, shardings, rows, *, steps, **_):
        run.trained.append((rows.ordered.source.rows, rows.ordered.seed, steps))

    run.trained, run.loaded = [], []
    monkeypatch.setattr(encoders, "load", load)
    monkeypatch.setattr(badclip, "fit", fit)
    monkeypatch.setattr(badclip, "born_sharded", lambda init, key, mesh: (key, None))
    return run


def test_the_surrogate_is_another_model_of_a_part_of_the_images(learn, tmp_path):
    cfg, _ = learn()
    own = run_folder.read_config(epath.Path(tmp_path) / "run" / "surrogate")
    assert own.seed == cfg.seed + badclip.SURROGATE_SEED != cfg.seed
    first = [jax.random.key_data(training.first_key(c)) for c in (cfg, own)]
    assert (np.asarray(first[0]) != np.asarray(first[1])).any()
    (rows, seed, steps), = learn.trained
    assert seed == own.seed
    assert steps == own.train.steps == cfg.attack.surrogate_steps
    assert len(rows) == len(np.unique(rows)) == 50 and rows.min() >= 0  # a quarter of 200
    assert rows.max() < 200 and rows.tolist() != list(range(50))


def test_the_learned_patch_is_not_the_one_it_began_with(learn, tmp_path):
    cfg, params = learn()
    image = params["image"]
    assert image.shape == (5, 5, 3) and image.min() >= 0 and image.max() <= 1
    np.testing.assert_array_equal(image, learned_patch.stored(image))
    start = learned_patch.init(cfg.attack.trigger, jax.random.split(jax.random.key(cfg.seed))[0])
    assert (image != start["image"]).any()
    found = run_folder.read_json(epath.Path(tmp_path) / "run" / "trigger" / "optimisation.json")
    assert len(found["loss"]) == 3


def test_a_surrogate_is_trained_once_and_one_that_is_given_never(learn, tmp_path):
    _, params = learn()
    own = str(tmp_path / "run" / "surrogate")
    _, again = learn()
    assert len(learn.trained) == 1 and learn.loaded == [own, own]
    np.testing.assert_array_equal(again["image"], params["image"])
    _, given = learn("other", surrogate=own)
    assert len(learn.trained) == 1 and learn.loaded[2:] == [own]
    assert not (tmp_path / "other" / "surrogate").exists()
    np.testing.assert_array_equal(given["image"], params["image"])
    learn("third")
    assert len(learn.trained) == 2 and learn.loaded[3:] == [str(tmp_path / "third" / "surrogate")]
