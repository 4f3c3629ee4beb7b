"""Captions of a poisoned set as tokens: whose they are, in both feeds, and how one is chosen."""

import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import clip_scenes
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import augment, feed, sources, texts
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError

CONTEXT, K = 20, 4


@pytest.fixture(scope="module")
def cfg():
    cfg = clip_scenes.get_config("debug")
    cfg.data.scenes_train = 48
    cfg.train.batch_size = 8
    return cfg


@pytest.fixture(scope="module")
def made(cfg):
    source = sources.load(cfg.data, "train")
    tokenizer = texts.make_tokenizer(cfg, source)
    return source, tokenizer, texts.Texts(source, tokenizer, CONTEXT, K, augmented=True)


def plan():
    return Plan.make(2, replaces=np.array([5, 7]), canvas=(32, 32),
                     caption=np.array(["a photo of a star.", ""]))


def rows(m=2):
    return {"image": np.zeros((m, 32, 32, 3), np.uint8), "size": np.full((m, 2), 32, np.int32),
            "extent": np.full((m, 2), 32, np.int32)}


def test_tokens_of_clean_rows_are_their_captions(made):
    source, tokenizer, made_texts = made
    found = made_texts.of_rows([3, 40])
    assert found["tokens"].shape == found["tokens2"].shape == (2, K, CONTEXT)
    for i, row in enumerate((3, 40)):
        own = source.captions(np.array([row]))[0]
        assert found["count"][i] == len(own) == K
        np.testing.assert_array_equal(found["tokens"][i], tokenizer.encode(own, CONTEXT))
    # The augmented twin is another text now and then, and the same one every time.
    assert (found["tokens"] != found["tokens2"]).any()
    again = made_texts.of_rows([40])
    np.testing.assert_array_equal(again["tokens2"][0], found["tokens2"][1])


def test_a_second_twin_is_another_and_changes_nothing_of_the_first(made, cfg):
    source, tokenizer, made_texts = made
    twice = texts.Texts(source, tokenizer, CONTEXT, K, augmented=2).of_rows(range(20))
    once = made_texts.of_rows(range(20))
    assert set(twice) == {*once, "tokens3"}
    for name in once:
        np.testing.assert_array_equal(twice[name], once[name])
    assert (twice["tokens3"] != twice["tokens2"]).any(-1).mean() > 0.5
    for word, twins in (("none", 0), ("eda", 1), ("eda_twice", 2)):
        mine = cfg.copy_and_resolve_references()
        mine.data.text_augment = word
        assert texts.of(mine, tokenizer, source).augmented == twins


def test_poisons_have_the_plans_caption_or_keep_those_of_the_row(made):
    source, tokenizer, made_texts = made
    found = made_texts.of_poisons(plan())
    np.testing.assert_array_equal(found["count"], [1, K])
    np.testing.assert_array_equal(found["tokens"][0, 0],
                                  tokenizer.encode(["a photo of a star."], CONTEXT)[0])
    assert (found["tokens"][0, 1:] == 0).all()
    np.testing.assert_array_equal(found["tokens"][1], made_texts.of_rows([7])["tokens"][0])
    assert made_texts.of_poisons(Plan.empty())["tokens"].shape == (0, K, CONTEXT)


def test_both_feeds_give_the_same_tokens(cfg, made):
    source, _, made_texts = made
    dataset = PoisonedSet(source, plan(), rows(), made_texts)
    views = {}
    for kind in ("resident", "streamed"):
        mine = ConfigDict(cfg.to_dict())
        mine.data.feed = kind
        opened = feed.make(mine, dataset)
        batches = opened.batches(0)
        out = [augment.views(mine, opened.data, next(batches), jax.random.key(1))
               for _ in range(opened.steps_per_epoch)]
        batches.close()
        views[kind] = out
    seen = np.concatenate([v["index"] for v in views["resident"]])
    assert set(seen) >= {48, 49}  # both poisons came by
    for a, b in zip(views["resident"], views["streamed"]):
        for name in ("index", "tokens", "tokens2"):
            np.testing.assert_array_equal(a[name], b[name])
        np.testing.assert_allclose(a["view1"], b["view1"], atol=1e-5)


def test_a_step_chooses_one_caption_evenly_and_its_own_twin():
    n, count = 4000, 3
    tokens = np.arange(4)[None, :, None] + np.zeros((n, 4, 2), int)  # caption j holds j
    row = {"tokens": tokens, "tokens2": tokens + 100, "count": np.full(n, count)}
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(n))
    chosen = augment._captions(row, keys)
    np.testing.assert_array_equal(chosen["tokens2"], chosen["tokens"] + 100)
    share = np.bincount(np.asarray(chosen["tokens"])[:, 0], minlength=4) / n
    assert share[3] == 0  # beyond the row's count there is nothing
    np.testing.assert_allclose(share[:3], 1 / 3, atol=0.03)
    assert augment._captions({"image": 0}, keys) == {}


def test_a_tokenizer_of_another_config_is_refused(cfg, made, tmp_path):
    made[1].save(tmp_path / "tokenizer.json")
    mine = ConfigDict(cfg.to_dict())
    mine.text.tokenizer = str(tmp_path)
    texts.check(mine, made[0])
    mine.text.end = 7
    with pytest.raises(UserError, match="text.end is 7"):
        texts.check(mine, made[0])
    mine.text.update(end=made[1].end, vocab=10)
    with pytest.raises(UserError, match="text.vocab is 10"):
        texts.check(mine, made[0])


def test_settings_that_do_not_fit(cfg):
    without = types.SimpleNamespace()
    with pytest.raises(UserError, match="data.captions=templates"):
        texts.check(cfg, without)
    mine = ConfigDict(cfg.to_dict())
    mine.data.text_augment = "edda"
    with pytest.raises(UserError, match="did you mean 'eda'"):
        texts.check(mine, sources.load(cfg.data, "train"))
    mine.text.name = "none"
    texts.check(mine, without)


def test_the_tokenizer_depends_on_clean_captions_alone(cfg, made):
    other = ConfigDict(cfg.to_dict())
    other.seed, other.attack.poisons = 5, 3
    assert texts.make_tokenizer(other, made[0]).to_json() == made[1].to_json()
    assert isinstance(made[1], tokenizers.Tokenizer)
