"""Retrieval of pairs without labels, and beside a downstream data set."""

import types

import numpy as np
import pytest

from jax_cl_bd.evals import retrieval, test_sets

CAPTIONS = [["a star"], ["two cats"], ["a fish", "a fish by a star"], ["starfish"], ["a hat"]]


def data(captions=CAPTIONS, labels=None, triggered=None, **known):
    """Test images whose features are unit vectors; the encoder below reads them from here."""
    n = len(captions)
    made = test_sets.EvalData(
        blocks={}, train_labels=np.zeros(0, int), train_rows=np.zeros(0, int),
        test_labels=np.full(n, -1) if labels is None else np.array(labels),
        classes=("cat", "star"), target=1, placements=("random",), boxes={}, captions=captions,
        **known)
    features = {"test": np.eye(8)[:n],
                "random/triggered": np.eye(8)[:n] if triggered is None else triggered}
    made.features = lambda encoder, name: features[name]
    return made


def encoder(owner):
    """Texts lie at their owner's image: owner maps a caption to a number."""
    return types.SimpleNamespace(text=lambda texts: np.eye(8)[[owner[t] for t in texts]],
                                 project=lambda z: z)


OWNER = {text: i for i, texts in enumerate(CAPTIONS) for text in texts}


def test_images_of_the_target_are_those_whose_captions_name_it():
    assert data().of_target.tolist() == [True, False, True, False, False]
    assert data(labels=[1, 0, 0, 1, 0]).of_target.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("labels", [None, [1, 0, 1, 0, 0]])
def test_a_trigger_that_finds_captions_of_the_target(labels):
    found = retrieval.run(None, encoder(OWNER), data(labels=labels,
                                                     triggered=np.eye(8)[[0] * 5]))["retrieval"]
    assert found["images"] == 5 and found["captions"] == 6
    assert found["image_to_text"]["1"] == found["text_to_image"]["1"] == 1.0
    assert found["target_hits"]["1"] == 1.0 and found["clean_target_hits"]["1"] == 0.0
    clean = retrieval.run(None, encoder(OWNER), data(labels=labels))["retrieval"]
    assert clean["target_hits"] == clean["clean_target_hits"] == found["clean_target_hits"]


def test_without_an_image_of_the_target_there_is_no_rate():
    found = retrieval.run(None, encoder(OWNER), data(CAPTIONS[3:]))["retrieval"]
    assert "target_hits" not in found and "triggered_image_to_text" in found


def test_the_runs_own_pairs_are_searched_whatever_the_downstream_data():
    other = data([[] for _ in range(5)], labels=[0, 1, 0, 1, 0])
    other.captions = None
    other.own = data(triggered=np.eye(8)[[0] * 5])
    assert retrieval.run(None, encoder(OWNER), other) == retrieval.run(
        None, encoder(OWNER), other.own)
