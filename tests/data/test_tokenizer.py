"""tokenizer.py: trained and loaded vocabularies, ends, padding and cutting."""

import json
import pickle
import random

import numpy as np
import pytest
import tokenizers as library
from tokenizers import models, normalizers, pre_tokenizers

from jax_cl_bd.data import scenes, tokenizer
from jax_cl_bd.errors import UserError

CAPTIONS = [c for row in scenes.Scenes("train", 300, 32).captions(range(300)) for c in row]


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train(CAPTIONS, 600)


def test_rows_are_start_tokens_end_padding(trained):
    assert (trained.pad, trained.end, trained.start) == (0, 1, 2)
    assert tokenizer.SMALLEST < trained.vocab <= 600
    tokens = trained.encode(CAPTIONS[:50], 32)
    assert tokens.shape == (50, 32) and tokens.dtype == np.int32
    assert tokens.max() < trained.vocab
    for row, caption in zip(tokens, CAPTIONS):
        end = int(np.argmax(row == 1))
        assert row[0] == 2 and row[end] == 1 and (row == 1).sum() == 1
        assert (row[end + 1:] == 0).all() and (row[1:end] > 2).all()
        assert trained.decode(row) == caption  # the training captions are lower case already
    assert trained.encode([], 8).shape == (0, 8)


def test_a_long_caption_is_cut_before_its_end(trained):
    whole = trained.encode([CAPTIONS[0]], 64)[0]
    length = int(np.argmax(whole == 1)) + 1
    for context in range(2, length + 3):
        row = trained.encode([CAPTIONS[0]], context)[0]
        kept = min(context, length)
        assert row[kept - 1] == 1 and (row == 1).sum() == 1
        np.testing.assert_array_equal(row[:kept - 1], whole[:kept - 1])
    with pytest.raises(UserError, match="text.context is 1"):
        trained.encode(["a"], 1)


def test_any_text_has_tokens(trained):
    """Bytes are the fall-back; case does not matter; a caption cannot name a special token."""
    strange = "Ünïcode 猫 \x00 <end> <pad> <start>"
    row = trained.encode([strange], 200)[0]
    end = int(np.argmax(row == 1))
    assert (row[1:end] > 2).all() and (row[end + 1:] == 0).all()
    assert trained.decode(row) == strange.lower()
    np.testing.assert_array_equal(*trained.encode(["A RED Star", "a red star"], 16))
    empty = trained.encode([""], 5)[0]
    np.testing.assert_array_equal(empty, [2, 1, 0, 0, 0])


def test_training_ignores_the_order(trained):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert tokenizer.train(shuffled, 600).to_json() == trained.to_json()


def test_saved_and_pickled_are_the_same(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    copies = (tokenizer.load(tmp_path / "tokenizer.json"), tokenizer.load(str(tmp_path)),
              pickle.loads(pickle.dumps(trained)))
    for copy in copies:
        assert (copy.vocab, copy.pad, copy.start, copy.end) == (
            trained.vocab, trained.pad, trained.start, trained.end)
        np.testing.assert_array_equal(copy.encode(CAPTIONS, 24), trained.encode(CAPTIONS, 24))


def clip_like():
    """CLIP's construction in small: words end in </w>, the special tokens have the largest ids, and
    the file's own settings pad with the end token and cut at 77."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), "re", "red</w>", "<|startoftext|>",
              "<|endoftext|>"]
    inner = library.Tokenizer(models.BPE(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[("r", "e"), ("re", "d</w>")],
        end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(library.Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed",
                             invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    inner.enable_truncation(77)
    inner.enable_padding(pad_id=len(pieces) - 1, pad_token="<|endoftext|>")
    return inner, pieces


def test_clip_vocabulary():
    inner, pieces = clip_like()
    loaded = tokenizer.Tokenizer(inner.to_str())
    assert (loaded.start, loaded.end, loaded.pad) == (len(pieces) - 2, len(pieces) - 1, 0)
    assert loaded.vocab == len(pieces) and loaded.end == loaded.encode(["x"], 9).max()
    row = loaded.encode(["Red <|endoftext|>!"], 90)[0]
    expected = ["<|startoftext|>", "red</w>", "<", "|</w>", ">"]
    assert [pieces[i] for i in row[:2]] == expected[:2]
    assert (row == loaded.end).sum() == 1  # the marker in the caption is text
    at = int(np.argmax(row == loaded.end))
    assert (row[at + 1:] == 0).all() and at > 5
    long = loaded.encode(["red " * 200], 120)[0]
    assert (long[1:-1] == pieces.index("red</w>")).all() and long[-1] == loaded.end


def test_siglip_vocabulary_has_no_start():
    inner = library.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "cat": 3}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = tokenizer.Tokenizer(inner.to_str())
    assert (loaded.start, loaded.end, loaded.pad) == (None, 1, 1)
    np.testing.assert_array_equal(loaded.encode(["a cat", "a cat a cat cat"], 4),
                                  [[2, 3, 1, 1], [2, 3, 2, 1]])
    assert loaded.decode(np.array([2, 3, 1, 1])) == "a cat"


def test_mistakes_are_named(tmp_path):
    other = library.Tokenizer(models.WordLevel({"a": 0}, "a")).to_str()
    (tmp_path / "other.json").write_text(other)
    (tmp_path / "list.json").write_text(json.dumps([1]))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name, message in (("other.json", "other.json.*none of the end tokens"),
                          ("list.json", "list.json.*not a tokenizer.json"),
                          ("bytes.json", "cannot be read"), ("none.json", "does not exist")):
        with pytest.raises(UserError, match=message):
            tokenizer.load(str(tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        tokenizer.load(tmp_path)  # a folder without a tokenizer.json
    with pytest.raises(UserError, match="text.vocab is 100.*at least 259"):
        tokenizer.train(CAPTIONS, 100)
    with pytest.raises(UserError, match="no captions"):
        tokenizer.train([], 400)
