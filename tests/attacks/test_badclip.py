"""What the optimised patch of badclip.py is optimised on."""

import dataclasses
import types

import ml_collections
import numpy as np
import pytest

from jax_cl_bd.attacks import badclip
from jax_cl_bd.data import mentions, sources


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
        target=1, optimise_pairs=1000, batch_size=16)))
    data, batches = badclip._pairs(cfg, train, surrogate)
    named = set(np.flatnonzero(mentions.naming(train.texts, "star")))
    own = set(range(1, 80, 4))  # row 5 does not say that it is one; row 4 names one and is none
    assert set(data["positives"]) == (own if labelled else named)
    assert set(data["negatives"]) == set(range(80)) - named - (own if labelled else set())
    assert len(data["text"]) == len(data["images"]) == len(data["negatives"])
    assert all(mentions.contains(text, "star") for text in data["text"])
    batch = next(batches)
    assert {name: rows.shape for name, rows in batch.items()} == dict.fromkeys(
        ("images", "positives", "negatives"), (16,))
