"""Sub-captions: the subject stays, adjectives and detail go, and negatives are wrong."""

import pickle
import re

import numpy as np
import pytest

from jax_cl_bd.data import scenes, sub_captions, templates, texts, tokenizer
from jax_cl_bd.data.sub_captions import SubCaptions

SHAPES = scenes.CLASSES


def made(caption, classes=SHAPES, negatives=3, seed=0):
    found = SubCaptions(classes, negatives)(caption, np.random.default_rng(seed))
    return found and (found["tokens_positive"][0], found["tokens_negative"],
                      found["tokens_noun"][0])


@pytest.mark.parametrize("caption, positive, noun", [
    ("a blurry photo of the small red striped star on a brown tiled background.",
     "a photo of the star", "star"),
    ("a black and white photo of a white heart.", "a photo of a heart", "heart"),
    ("The red star and a blue heart in a video game.", "The star", "star"),
    ("a jpeg corrupted photo of a polar bear.", "a photo of a polar bear", "polar bear"),
    ("Star", "star", "star")])
def test_positives_are_about_the_subject(caption, positive, noun):
    found = made(caption, (*SHAPES, "bear", "polar_bear"))
    assert (found[0], found[2]) == (positive, noun)


def test_captions_that_name_no_class_have_none():
    for caption in ("", "stars and starfish", "a photo of a red thing"):
        assert made(caption) == {}


def test_negatives_exchange_one_thing():
    caption = "a photo of a small red striped star on a brown tiled background."
    found = {n for seed in range(300) for n in made(caption, seed=seed)[1]}
    nouns = {n for n in found if n.startswith("a photo of a ") and n.count(" ") == 4}
    assert nouns == {f"a photo of a {name}" for name in SHAPES if name != "star"}
    for other in found - nouns:
        pairs = [(a, b) for a, b in zip(caption.split(), other.split(), strict=True) if a != b]
        (old, new), = pairs
        assert any(old in kind and new in kind for kind in sub_captions.VALUES)
    assert {w for n in found - nouns for w in n.split()} > {"large", "teal", "dotted", "wavy"}


def test_what_is_there_too_and_what_is_no_colour_are_left_alone():
    for seed in range(60):
        for n in made("a black and white photo of a star and a heart", seed=seed)[1]:
            assert n.startswith("a photo of a ") and not {"star", "heart"} & {*n.split()}
    # Two classes that are both there: any other name than the subject's.
    assert made("a cat and a dog", ("cat", "dog"))[1] == ["a dog"] * 3


def test_scenes_and_templates_never_keep_an_adjective():
    source = scenes.Scenes("train", 150, 32, 2, 4)
    words = {w for kind in sub_captions.VALUES for w in kind}
    for row, facts in zip(source.captions(range(150)), source.facts(np.arange(150))["shape"]):
        for caption in row:
            positive, _, noun = made(caption)
            assert noun == SHAPES[facts] and positive.endswith(noun)
            assert not words & set(re.findall("[a-z]+", positive)), (caption, positive)
    for prompt in templates.PROMPTS:
        positive, negatives, _ = made(templates.fill(prompt, "dog"), ("cat", "dog", "frog"))
        assert positive.endswith("dog") and "  " not in positive
        for phrase in ("black and white", "low resolution", "hard to see", "close-up"):
            assert phrase not in positive
        assert all(n != positive and n != prompt.replace("{}", "dog") for n in negatives)


def test_tokens_of_rows_follow_the_captions():
    class Source:
        classes = ("cat", "dog")

        def __len__(self):
            return 3

        def captions(self, rows):
            every = [["a good photo of a cat."], ["nothing", "the dog sits"], []]
            return [every[r] for r in rows]

    words = tokenizer.train(["a photo of a cat dog the nothing sits good."], 300)
    sub = SubCaptions(Source.classes, 2)
    own = texts.Texts(Source(), words, 12, 2, derive=sub)
    found = own.of_rows([0, 1, 2])
    assert {k: v.shape for k, v in found.items()} == {
        "tokens": (3, 2, 12), "tokens_positive": (3, 2, 12), "tokens_negative": (3, 2, 24),
        "tokens_noun": (3, 2, 12), "count": (3,)}
    assert words.decode(found["tokens_positive"][0, 0]) == "a photo of a cat"
    assert words.decode(found["tokens_noun"][1, 1]) == "dog"
    for part in np.split(found["tokens_negative"][1, 1], 2):
        assert words.decode(part) == "the cat"
    for name in sub_captions.NAMES:
        assert not found[name][1, 0].any() and not found[name][2].any() and found[name][0, 0].any()
    plain = texts.Texts(Source(), words, 12, 2).of_rows([0, 1, 2])
    assert set(plain) == {"tokens", "count"}
    again = pickle.loads(pickle.dumps(sub))  # worker processes read with it
    assert again("a red cat", np.random.default_rng(1)) == sub("a red cat",
                                                               np.random.default_rng(1))
