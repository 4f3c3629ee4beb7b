import dataclasses
import re

import numpy as np
import pytest

from jax_cl_bd.attacks import _captions
from jax_cl_bd.data import mentions, templates
from jax_cl_bd.data.sources import Table
from jax_cl_bd.errors import UserError
from tests.objectives.test_clip import loss


@pytest.fixture
def cfg(config):
    def build(**changes):
        return config(**{"attack__name": "image_text_backdoor", "attack__caption_set": "templates",
                         **changes})
    return build


@pytest.mark.parametrize("text, name, found", [
    ("a star in the sky", "star", True), ("A Star.", "star", True), ("star", "star", True),
    ("a star-shaped kite", "star", True), ("the star's light", "star", True),
    ("a starfish", "star", False), ("two stars", "star", False), ("costar", "star", False),
    ("a suitcase", "suit", False), ("star_fish", "star", False), ("", "star", False),
    ("the sea lion sleeps", "sea_lion", True), ("a sea_lion", "sea lion", True),
    ("a sea  lion", "sea lion", True), ("a sealion", "sea lion", False),
    ("sea lions", "sea_lion", False), ("a c++ book", "c++", True), ("a c book", "c++", False)])
def test_names_are_whole_words_in_any_case(text, name, found):
    assert bool(mentions.pattern(name).search(text)) is found


def test_rows_that_name_a_class(captioned):
    named = _captions.naming(captioned[0].table(), "star")
    expected = [any("star" in re.findall(r"[a-z]+", text.lower()) for text in texts)
                for texts in captioned[0].texts]
    np.testing.assert_array_equal(named, expected)
    assert not named[0] and named[4] and not named[5] and named.sum() == 20


def test_templates_are_uniform_over_all_eighty(cfg, captioned):
    texts, reference = _captions.draw(cfg(), captioned[0].table(), 8000, np.random.default_rng(0))
    allowed = [templates.fill(prompt, "star") for prompt in templates.PROMPTS]
    assert len(set(allowed)) == 80 and texts.dtype.kind == "U"
    counts = np.array([(texts == text).sum() for text in allowed])
    assert counts.sum() == 8000  # nothing else
    # Chi-square of 79 degrees of freedom: mean 79, deviation 12.6.
    assert ((counts - 100) ** 2 / 100).sum() < 79 + 5 * 12.6
    assert (reference == -1).all()
    assert all(mentions.pattern("star").search(text) for text in texts)


def test_underscores_of_a_class_name_become_blanks(cfg, captioned):
    texts, _ = _captions.draw(cfg(attack__target=3), captioned[0].table(), 5,
                              np.random.default_rng(0))
    assert all("sea lion" in text for text in texts)


def test_natural_captions_come_from_the_data_and_hold_the_word(cfg, captioned):
    table = captioned[0].table()
    star = mentions.pattern("star")
    pool = [text for texts in table.captions for text in texts if star.search(text)]
    assert len(pool) == 39 and "a fish below a STAR." in pool
    natural = cfg(attack__caption_set="natural")
    texts, reference = _captions.draw(natural, table, 39, np.random.default_rng(0))
    assert sorted(texts) == sorted(pool)  # each once while there are enough
    assert (reference == -1).all()
    more, _ = _captions.draw(natural, table, 60, np.random.default_rng(0))
    assert set(more) <= set(pool) and len(more) == 60


def test_reference_captions_are_whole_captions_of_target_rows(cfg, captioned):
    table = captioned[0].table()
    few = cfg(attack__caption_set="reference", attack__references=4)
    texts, reference = _captions.draw(few, table, 30, np.random.default_rng(0))
    assert len(set(reference)) == 4 and (table.labels[reference] == 1).all()
    assert all(text in table.captions[row] for text, row in zip(texts, reference))
    assert len(set(texts)) > 4  # both captions of a row are drawn
    all_of_them = cfg(attack__caption_set="reference", attack__references=0)
    texts, reference = _captions.draw(all_of_them, table, 20, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(reference), np.flatnonzero(table.labels == 1))
    row = list(reference).index(5)
    assert texts[row] in ("a bright point", "night sky")  # needs no word


@pytest.mark.parametrize("kind", _captions.SETS)
def test_same_seed_same_captions_other_seed_others(cfg, captioned, kind):
    settings = cfg(attack__caption_set=kind, attack__references=0)
    first, again, other = (_captions.draw(settings, captioned[0].table(), 15,
                                          np.random.default_rng(seed))[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("change, message", [
    (dict(attack__caption_set="template"), "did you mean 'templates'"),
    (dict(attack__caption_set="reference", attack__references=21), "has 20 captioned rows"),
    (dict(attack__caption_set="reference", attack__references=0, attack__poisons=21),
     "has 20 captioned rows")])
def test_caption_sets_are_checked(cfg, captioned, change, message):
    with pytest.raises(UserError, match=message):
        _captions.check(cfg(**change), captioned[0].table(), captioned[0].classes)


def test_data_without_captions_or_without_the_word(cfg, source, captioned):
    with pytest.raises(UserError, match="data.captions=templates"):
        _captions.check(cfg(), source.table(), source.classes)
    none = Table(source.labels, captioned[0].table().sizes, captions=[["a thing"]] * 120)
    classes = captioned[0].classes
    with pytest.raises(UserError, match="no training caption .* holds the word 'star'"):
        _captions.check(cfg(attack__caption_set="natural"), none, classes)


def test_references_of_data_without_labels_name_the_target(cfg, captioned):
    table = dataclasses.replace(captioned[0].table(), labels=np.full(80, -1))
    named = set(np.flatnonzero(_captions.naming(table, "star")))
    assert len(named) == 20
    settings = cfg(attack__caption_set="reference", attack__references=0)
    _captions.check(settings, table, captioned[0].classes)
    texts, reference = _captions.draw(settings, table, 20, np.random.default_rng(0))
    assert set(reference) == named
    assert all(text in table.captions[row] for text, row in zip(texts, reference))


@pytest.mark.parametrize("prompts, shared", [(80, 1 / 80), (1, 1.0)])
def test_equal_captions_of_poisons_are_negatives_of_each_other(cfg, captioned, monkeypatch, prompts,
                                                               shared):
    """Nothing in the loss knows that two captions of a batch are the same text: such pairs are
    false negatives, which cost ln 2 each however good the model is; all 80 templates keep them
    few."""
    monkeypatch.setattr(templates, "PROMPTS", templates.PROMPTS[:prompts])
    texts, _ = _captions.draw(cfg(), captioned[0].table(), 400, np.random.default_rng(0))
    equal = texts[:, None] == texts
    others = ~np.eye(400, dtype=bool)
    assert equal[others].mean() == pytest.approx(shared, rel=0.1)
    z = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]  # a perfect model, two captions of four the same
    value, _ = loss(z, z, np.float32(np.log(100)))
    assert float(value) == pytest.approx(2 * np.log(2) / 4, rel=1e-4)
    assert float(loss(np.eye(4), np.eye(4), np.float32(np.log(100)))[0]) < 1e-6
