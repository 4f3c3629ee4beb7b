"""tfds.py on a prepared CIFAR-10; skipped where $TFDS_DATA_DIR holds none."""

import os
import pickle

import ml_collections
import numpy as np
import pytest

from jax_cl_bd.data import images, sources, tfds
from jax_cl_bd.errors import UserError

PLACE = os.environ.get("TFDS_DATA_DIR", "")
needs_cifar10 = pytest.mark.skipif(
    not os.path.isdir(os.path.join(PLACE, "cifar10")) if PLACE else True,
    reason="set TFDS_DATA_DIR to a folder with a prepared cifar10 to run this")


def config(**changes):
    cfg = ml_collections.ConfigDict(dict(
        name="tfds:cifar10", data_dir="", image_size=32, train_split="train", test_split="test",
        limit=20, skip_corrupt=False, classes_file=""))
    cfg.update(changes)
    return cfg


@needs_cifar10
def test_items_and_table():
    source = sources.load(config(), "test")
    assert source.classes[:3] == ("airplane", "automobile", "bird")
    item = source[3]
    assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.uint8
    assert item["image"].std() > 5
    table = sources.table(source)
    np.testing.assert_array_equal(table.labels, [source[i]["label"] for i in range(20)])
    np.testing.assert_array_equal(table.sizes, [[32, 32]] * 20)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3]["image"], item["image"])


@needs_cifar10
def test_a_broken_record_is_named_by_file():
    source = tfds.load(config(), "train[90%:]")
    assert len(source) == 5000 and source.where(5).endswith("record 45005")

    class Garbage:
        def __getitem__(self, i):
            return {"image": b"garbage", "label": 1}

    broken = tfds.Tfds(Garbage(), source.classes, source.files, "label", None)
    for read in (lambda: broken[5], lambda: broken.table([5])):
        with pytest.raises(images.CorruptRow, match="row 5 .*array_record.*record 45005"):
            read()


@needs_cifar10
def test_a_misspelt_split_is_named():
    with pytest.raises(UserError, match="did you mean 'train'"):
        sources.load(config(train_split="trian"), "train")


@pytest.mark.parametrize("name, message", [
    ("tfds:cifra10", "did you mean 'cifar10"),
    ("tfds:cifar100", r"not prepared.*jax_cl_bd.data.prepare cifar100 --data_dir="),
    ("tfds:huggingface:mnist", "is no tfds name"),
    ("tfds:ag_news_subset", "not prepared"),
])
def test_mistakes_are_named(name, message, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError, match=message):
        sources.load(config(name=name, data_dir=str(tmp_path)), "train")


def test_a_missing_folder_is_named(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError, match="does not exist.*TFDS_DATA_DIR"):
        sources.load(config(data_dir=str(tmp_path / "nowhere")), "train")
