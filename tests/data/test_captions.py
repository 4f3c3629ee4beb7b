"""captions.py and templates.py: prompts, captions of labelled data, EDA."""

import collections
import hashlib
import pickle
import re

import ml_collections
import numpy as np
import pytest

from jax_cl_bd.data import captions, scenes, sources, templates
from jax_cl_bd.errors import UserError


def config(**changes):
    cfg = ml_collections.ConfigDict(dict(
        name="digits", data_dir="", image_size=8, train_split="train", test_split="test", limit=0,
        skip_corrupt=False, classes_file="", captions="templates", captions_per_row=5))
    cfg.update(changes)
    return cfg


def test_prompts_are_the_published_list():
    assert len(templates.PROMPTS) == len(set(templates.PROMPTS)) == 80
    assert all(t.count("{}") == 1 for t in (*templates.PROMPTS, *templates.HELD_OUT))
    assert (templates.PROMPTS[0], templates.PROMPTS[39], templates.PROMPTS[79]) == (
        "a bad photo of a {}.", "a photo of a {}.", "a tattoo of the {}.")
    digest = hashlib.sha256("\n".join(templates.PROMPTS).encode()).hexdigest()
    assert digest == ("4f976686fb651bb5803d4689dcd849f7"
                      "5efe0ef19a3c801355bc9a6f03c8a5af")


def test_held_out_templates_are_in_no_caption():
    assert len(set(templates.HELD_OUT)) == 10 and not {*templates.HELD_OUT} & {*templates.PROMPTS}
    forms = [re.compile(re.escape(t).replace(r"\{\}", ".*")) for t in templates.HELD_OUT]
    scene = scenes.Scenes("train", 200, 32, 2, 80)
    made = [c for row in scene.captions(range(200)) for c in row]
    made += [templates.fill(t, "dog") for t in templates.PROMPTS]
    assert not [c for c in made if any(f.fullmatch(c) for f in forms)]


def test_fill():
    assert templates.fill("a photo of a {}.", "polar_bear") == "a photo of a polar bear."
    assert templates.fill("{}", "{odd} %s") == "{odd} %s"


def test_labelled_rows_get_captions():
    source = sources.load(config(), "train")
    plain = sources.load(config(captions=""), "train")
    assert not hasattr(plain, "captions") and sources.table(plain).captions is None
    table = sources.table(source)
    np.testing.assert_array_equal(table.labels, sources.table(plain).labels)
    for i, row in enumerate(table.captions):
        name = source.classes[table.labels[i]]
        allowed = {templates.fill(t, name) for t in templates.PROMPTS}
        assert len(row) == 5 and len(set(row)) == 5 and set(row) <= allowed
    item = source[33]
    assert item["captions"] == table.captions[33]
    np.testing.assert_array_equal(item["image"], plain[33]["image"])
    used = collections.Counter(c.replace(f" {source.classes[n]}", " {}")
                               for n, row in zip(table.labels, table.captions) for c in row)
    counts = np.array([used[t] for t in templates.PROMPTS])
    mean = 5 * len(source) / 80
    assert abs(counts - mean).max() < 5 * mean**0.5
    copy = pickle.loads(pickle.dumps(source))
    assert copy.captions([7, 3]) == [table.captions[7], table.captions[3]]


def test_captions_per_row():
    two = sources.load(config(captions_per_row=2), "train").captions([9, 4])
    five = sources.load(config(), "train").captions([9, 4])
    assert two == [row[:2] for row in five]  # more captions keep the first ones
    every = sources.load(config(captions_per_row=0), "train").captions([9])[0]
    assert len(set(every)) == 80
    missing = config()
    del missing["captions_per_row"]
    assert sources.load(missing, "train").captions([9, 4]) == five
    with pytest.raises(UserError, match="captions_per_row is -1"):
        sources.load(config(captions_per_row=-1), "train")


def test_subsets_and_scenes():
    source = sources.load(config(limit=30), "train")
    assert len(sources.table(source).captions) == 30
    scene = sources.load(config(name="scenes", image_size=32, limit=20), "train")
    item = scene[3]
    assert "mask" in item and item["captions"] == scene.captions([3])[0]
    assert set(item["captions"]) <= {templates.fill(t, scene.classes[item["label"]])
                                     for t in templates.PROMPTS}


def test_unlabelled_data_cannot_have_templates():
    class Unlabelled:
        classes = ()

        def __len__(self):
            return 3

        def table(self, rows):
            return np.full(len(rows), -1), np.ones((len(rows), 2))

    with pytest.raises(UserError, match="3 of 3 rows have none"):
        captions.by_template(Unlabelled(), 5)


class Chosen:
    """A generator whose first draw, the operation, is given."""

    def __init__(self, operation, seed):
        self.first, self.rng = operation, np.random.default_rng(seed)

    def integers(self, n):
        if self.first is not None:
            first, self.first = self.first, None
            return first
        return self.rng.integers(n)

    def __getattr__(self, name):
        return getattr(self.rng, name)


SENTENCE = "A jpeg-corrupted photo of the Red star, on 3 blue tiled background's."
WORDS = "a jpeg corrupted photo of the red star on blue tiled backgrounds".split()


@pytest.mark.parametrize("operation", range(4))
def test_eda_operations(operation):
    changed = 0
    for seed in range(200):
        out = captions.eda(SENTENCE, Chosen(operation, seed)).split()
        before, after = collections.Counter(WORDS), collections.Counter(out)
        lost, new = before - after, after - before
        changed += out != WORDS
        if operation == 0:  # one word (12 // 10) becomes a synonym of its
            assert len(out) == len(WORDS) and [a == b for a, b in zip(out, WORDS)].count(False) == 1
            (old, _), (word, _) = *lost.items(), *new.items()
            assert word in captions.SYNONYMS[old]
        elif operation == 1:  # one more word, a synonym of one that is there
            assert len(out) == len(WORDS) + 1 and not lost
            extra = next(iter(new))
            assert any(extra in captions.SYNONYMS.get(w, ()) for w in WORDS)
        elif operation == 2:  # two places changed hands
            assert not lost and not new
            assert sum(a != b for a, b in zip(out, WORDS)) == 2
        else:
            rest = iter(WORDS)
            assert all(word in rest for word in out) and out  # in order
    assert changed > 100


def test_eda_deletes_a_tenth():
    kept = [len(captions.eda(SENTENCE, Chosen(3, s)).split()) for s in range(2000)]
    assert abs(np.mean(kept) / len(WORDS) - 0.9) < 0.01
    assert all(captions.eda("star", Chosen(3, s)) == "star" for s in range(50))


def test_eda_counts_grow_with_the_caption():
    long = " ".join(["small"] + ["zig"] * 20 + ["red"] * 2 + ["zag"] * 12)  # 35 words: 3 changes
    out = captions.eda(long, Chosen(0, 0)).split()
    assert {"small", "red"} & set(out) == set()  # both known words, every occurrence
    inserted = captions.eda(" ".join(["red"] * 35), Chosen(1, 0)).split()
    assert len(inserted) == 38


def test_eda_is_a_function_of_its_generator_and_takes_odd_text():
    draw = [captions.eda(SENTENCE, np.random.default_rng([captions.EDA_SEED, 5, 1]))
            for _ in range(2)]
    assert draw[0] == draw[1]
    kinds = {captions.eda(SENTENCE, np.random.default_rng(s)) for s in range(60)}
    assert len(kinds) > 30
    for odd in ("", "123 !?", "猫", "x"):
        for seed in range(8):
            assert captions.eda(odd, np.random.default_rng(seed)) == odd


def test_synonyms_cover_the_vocabulary():
    stop = {"a", "of", "the", "in", "on", "my", "to", "one", "and"}
    assert not stop & set(captions.SYNONYMS)
    assert all(w not in others and others for w, others in captions.SYNONYMS.items())
    made = {w for row in scenes.Scenes("train", 400, 32, 2).captions(range(400)) for c in row
            for w in re.sub("[^a-z]+", " ", c).split()}
    without = made - set(captions.SYNONYMS) - stop
    assert without <= {"heart", "tattoo", "itap", "jpeg", "close", "up"}
