"""digits.py and the functions of sources.py that every source shares."""

import pickle

import ml_collections
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jax_cl_bd.data import digits, images, sources
from jax_cl_bd.errors import UserError


def config(**changes):
    cfg = ml_collections.ConfigDict(dict(
        name="digits", data_dir="", image_size=16, train_split="train", test_split="test",
        limit=0, feed="resident", workers=0, skip_corrupt=False, classes_file=""))
    cfg.update(changes)
    return cfg


def test_the_split_is_whole_disjoint_and_stratified():
    rows = digits.split_rows()
    assert {k: len(v) for k, v in rows.items()} == {"train": 1470, "test": 327}
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(1797))
    labels = load_digits().target
    share = np.bincount(labels[rows["test"]]) / np.bincount(labels)
    np.testing.assert_allclose(share, 327 / 1797, atol=0.007)


def test_rows_show_the_originals_enlarged():
    source = sources.load(config(), "test")
    rows, original = digits.split_rows()["test"], load_digits()
    for i in (0, 100, 326):
        item = source[i]
        assert item["image"].shape == (16, 16, 3) and item["image"].dtype == np.uint8
        assert item["index"] == i and item["label"] == original.target[rows[i]]
        shrunk = item["image"][..., 0].reshape(8, 2, 8, 2).mean((1, 3))
        close = np.corrcoef(shrunk.ravel(), original.images[rows[i]].ravel())[0, 1]
        assert close > 0.97
    assert source.classes == tuple("0123456789")
    np.testing.assert_array_equal(sources.load(config(image_size=8), "test")[5]["image"][..., 1],
                                  np.round(original.images[rows[5]] * 255 / 16))


def test_table_agrees_with_the_items():
    source = sources.load(config(limit=40), "train")
    table = sources.table(source)
    assert table.labels.dtype == np.int64 and table.sizes.dtype == np.int32
    items = [source[i] for i in range(len(source))]
    np.testing.assert_array_equal(table.labels, [item["label"] for item in items])
    np.testing.assert_array_equal(table.sizes, [item["image"].shape[:2] for item in items])
    assert [item["index"] for item in items] == list(range(40))


def test_a_limit_takes_the_same_rows_every_time_and_subsets_nest():
    whole = sources.load(config(), "train")
    few = sources.load(config(limit=50), "train")
    assert len(few) == 50 and len(sources.load(config(limit=5000), "train")) == 1470
    np.testing.assert_array_equal(few.rows, sources.load(config(limit=50), "train").rows)
    part = sources.Subset(few, np.array([7, 3]))
    np.testing.assert_array_equal(part[1]["image"], whole[few.rows[3]]["image"])
    np.testing.assert_array_equal(sources.table(part).labels, whole.labels[few.rows[[7, 3]]])
    again = pickle.loads(pickle.dumps(part))
    assert len(again) == 2 and again[0]["label"] == part[0]["label"]


@pytest.mark.parametrize("change, message", [
    (dict(name="digit"), "did you mean 'digits'"),
    (dict(name="tdfs:cifar10"), "did you mean 'tfds:cifar10'"),
    (dict(name="tfds"), "should look like 'tfds:NAME'"),
    (dict(name="digits:8"), "should look like 'digits'"),
    (dict(train_split="trian"), "did you mean 'train'"),
    (dict(limit=-1), "data.limit is -1"),
])
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        sources.load(config(**change), "train")


def test_a_folder_is_told_its_prefix(tmp_path):
    for file, meant in (("train/cat/a.png", "folder"), ("train/pairs.json", "pairs")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
        with pytest.raises(UserError, match=f"did you mean '{meant}:{tmp_path}'"):
            sources.load(config(name=str(tmp_path)), "train")


def test_corrupt_rows_are_left_out_only_when_asked():
    class Broken:
        classes = ("a",)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            if i == 2:
                raise images.CorruptRow(2, "file", "bad")
            return {"image": np.full((2, 2, 3), i, np.uint8), "label": 0, "index": i}

    good = sources.without_corrupt(Broken())
    assert [good[i]["image"][0, 0, 0] for i in range(len(good))] == [0, 1, 3, 4]
