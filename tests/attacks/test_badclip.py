"""What the optimised patch of badclip.py is optimised on."""

import dataclasses
import types

import jax
import ml_collections
import numpy as np
import pytest

from jax_cl_bd.attacks import badclip
from jax_cl_bd.data import mentions, sources

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
