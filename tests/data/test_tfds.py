"""tfds.py on a small CIFAR-10 and on captions, both written by tfds itself."""

import importlib.util
import io
import pickle
import sys
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

from jax_cl_bd import defend
from jax_cl_bd.data import images, prepare, sources, tfds
from jax_cl_bd.defenses import vet_dataset
from jax_cl_bd.errors import UserError
from tests import tiny_cifar10


def config(**changes):
    cfg = ml_collections.ConfigDict(dict(
        name="tfds:cifar10", data_dir="", image_size=32, train_split="train", test_split="test",
        limit=20, skip_corrupt=False, classes_file=""))
    cfg.update(changes)
    return cfg


@pytest.fixture(scope="module", autouse=True)
def cifar10(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", tiny_cifar10.write(tmp_path_factory.mktemp("cifar10")))
        yield


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


def test_a_broken_record_is_named_by_file():
    source = tfds.load(config(), "train[90%:]")
    assert len(source) == 20 and source.where(5).endswith("record 185")

    class Garbage:
        def __getitem__(self, i):
            return {"image": b"garbage", "label": 1}

    broken = tfds.Tfds(Garbage(), source.classes, source.files, "label", None)
    for read in (lambda: broken[5], lambda: broken.table([5])):
        with pytest.raises(images.CorruptRow, match="row 5 .*array_record.*record 185"):
            read()


def test_rows_that_two_slices_share_are_counted_and_never_held_out():
    def opened(split, limit=0):
        return sources.load(config(train_split=split, limit=limit, center_crop=True), "train")

    whole = opened("train")
    assert sources.shared(opened("train[:90%]"), opened("train[90%:]")) == 0
    assert sources.shared(opened("train[:90%]", limit=5), opened("train[80%:]")) == 20
    assert sources.shared(whole, opened("train[90%:]")) == 20
    assert sources.shared(whole, sources.load(config(), "test")) == 0
    cfg = ml_collections.ConfigDict({"data": config(train_split="train[:90%]"), "defense": dict(
        validation_split="train[80%:]")})
    with pytest.raises(UserError, match=r"20 rows in common with data.train_split='train\[:90%\]'"):
        defend.validation(cfg)
    cfg.defense.validation_split = "train[90%:]"
    assert len(defend.validation(cfg)) == 20
    cfg.defense.update(clean_data="", clean_split="train[80%:]", false_alarm=0.1)
    with pytest.raises(UserError, match="20 rows in common with those to be judged"):
        vet_dataset.clean_rows(cfg)


def test_a_misspelt_split_is_named():
    with pytest.raises(UserError, match="did you mean 'train'"):
        sources.load(config(train_split="trian"), "train")


@pytest.mark.parametrize("name, message", [
    ("tfds:cifra10", "did you mean 'cifar10"),
    ("tfds:cifar100", r"not prepared.*: pip install -c constraints.txt -e '.\[prepare\]', then "
                      "python -m jax_cl_bd.data.prepare cifar100 --data_dir=/"),
    ("tfds:huggingface:mnist", "is no tfds name"),
    ("tfds:ag_news_subset", "not prepared"),
])
def test_mistakes_are_named(name, message, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError, match=message):
        sources.load(config(name=name, data_dir=str(tmp_path)), "train")


def test_a_missing_folder_is_named(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError, match="does not exist.*TFDS_DATA_DIR.*, or make it: pip install "
                       ".*data.prepare cifar10 --data_dir=.*nowhere"):
        sources.load(config(data_dir=str(tmp_path / "nowhere")), "train")


def test_how_to_prepare_is_what_the_readme_says():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"    {tfds.INSTALL_PREPARE}\n" in readme


@pytest.mark.parametrize("name, message", [
    ("cifra10", "unknown tfds data set 'cifra10'; did you mean 'cifar10'"),
    ("cifar10/nope", "'cifar10/nope': .*"), ("a b", "'a b' is no tfds name"),
    ("cifar10", "needs TensorFlow, which is not installed: pip install -c constraints.txt -e")])
def test_preparing_says_what_is_wrong_in_one_line(name, message, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: name != "tensorflow" and find(name, *rest) or None)
    with pytest.raises(UserError, match=message) as refusal:
        prepare.main([name, f"--data_dir={tmp_path / 'new'}"])
    assert "\n" not in str(refusal.value) and not (tmp_path / "new").exists()


def test_preparing_without_the_library_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="tfds data sets need packages"):
        prepare.main(["cifar10", "--data_dir=x"])


CAPTIONS = [[f"Caption {j} of\n {i}: grün " for j in range(i % 3 + 1)] for i in range(7)]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A data set with coco_captions' features, written by tfds itself: row i is 6 + i high."""
    tfds_library = pytest.importorskip("tensorflow_datasets")
    features = tfds_library.features

    with tfds_library.core.registered.skip_registration():  # it is found by its files
        class TinyCoco(tfds_library.core.GeneratorBasedBuilder):
            VERSION = tfds_library.core.Version("1.0.0")

            def _info(self):
                return tfds_library.core.DatasetInfo(builder=self, features=features.FeaturesDict({
                    "image": features.Image(encoding_format="png"), "image/id": np.int64,
                    "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
                    "objects": features.Sequence({"bbox": features.BBoxFeature(),
                                                  "label": features.ClassLabel(num_classes=3)})}))

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, texts in enumerate(CAPTIONS):
                    png = io.BytesIO()
                    Image.fromarray(np.full((6 + i, 9, 3), 20 * i, np.uint8)).save(png, "PNG")
                    png.seek(0)
                    yield i, {"image": png, "image/id": i, "objects": [],
                              "captions": [{"id": j, "text": text} for j, text in enumerate(texts)]}

    folder = tmp_path_factory.mktemp("tfds")
    TinyCoco(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder)


def test_captions(captioned, tmp_path):
    cfg = config(name="tfds:tiny_coco", data_dir=captioned, limit=0)
    source = sources.load(cfg, "train")
    assert len(source) == 7 and source.classes == ()
    table = sources.table(source)
    seen = set()
    for i, captions in enumerate(table.captions):
        item = source[i]
        number = int(item["image"][0, 0, 0]) // 20
        seen.add(number)
        assert item["label"] == -1 == table.labels[i]
        assert item["captions"] == captions == [f"Caption {j} of {number}: grün"
                                                for j in range(number % 3 + 1)]
        assert tuple(table.sizes[i]) == item["image"].shape[:2] == (6 + number, 9)
    assert seen == set(range(7))
    again = pickle.loads(pickle.dumps(source))
    assert again.captions([4, 2]) == [table.captions[4], table.captions[2]]
    names = tmp_path / "names.txt"
    names.write_text("caption\nzebra\n")
    named = sources.load(config(name="tfds:tiny_coco", data_dir=captioned, limit=0,
                                classes_file=str(names)), "train")
    assert named.classes == ("caption", "zebra") and named.captions([4]) == source.captions([4])
    cfg.captions_per_row = 1
    assert sources.load(cfg, "train").captions(range(7)) == [c[:1] for c in table.captions]
    cfg.captions_per_row = -1
    with pytest.raises(UserError, match="captions_per_row is -1"):
        sources.load(cfg, "train")


def test_many_captions_are_read_once_and_not_shared(captioned, monkeypatch):
    source = sources.load(config(name="tfds:tiny_coco", data_dir=captioned, limit=0), "train")
    direct = source.captions(range(7))
    monkeypatch.setattr(tfds, "_FEW", 3)
    first = source.captions(range(7))
    first[0].append("more")
    monkeypatch.setattr(tfds.CaptionedTfds, "_captions", lambda *_: pytest.fail("read again"))
    assert source.captions(range(7)) == direct


def test_caption_features():
    tfds_library = pytest.importorskip("tensorflow_datasets")
    f = tfds_library.features
    for feature, keys in (
            ({"captions": f.Sequence({"text": f.Text(), "id": np.int64})}, ("captions", "text")),
            ({"captions": f.Sequence(f.Text())}, ("captions",)), ({"caption": f.Text()},
                                                                  ("caption",)),
            ({"captions": f.Sequence(np.int64)}, ()), ({"label": f.Text()}, ())):
        assert tfds._caption_keys(tfds_library, f.FeaturesDict(feature)) == keys


def test_a_row_without_captions_is_named():
    files = (("f.array_record", 10, 3),)
    texts = {"captions": {"text": [b" ", b""]}, "image": b""}
    source = tfds.CaptionedTfds([texts] * 3, (), files, "", (8, 8), ("captions", "text"))
    with pytest.raises(images.CorruptRow, match="row 1 .f.array_record, record 11.*no caption"):
        source.captions([1])
    single = tfds.CaptionedTfds([{"caption": b"one \xff cat"}], (), files, "", (8, 8), ("caption",))
    assert single.captions([0]) == [["one \ufffd cat"]]
