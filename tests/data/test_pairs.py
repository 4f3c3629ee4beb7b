"""pairs.py: prepared pairs are read as they were stored, and shown as any other data."""

import pickle

import jax
import ml_collections
import numpy as np
import pytest

from configs import clip_pairs
from jax_cl_bd.attacks import _rows
from jax_cl_bd.attacks.plan import Plan
from jax_cl_bd.data import (
    augment,
    feed,
    images,
    pairs,
    poisoned,
    prepare_pairs,
    sources,
    texts,
    tokenizer,
)
from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import patch
from tests.data.pair_tars import config, make_shards


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    paths, good = make_shards(folder / "tars")
    total = prepare_pairs.write(paths, str(folder / "out"))
    return folder / "out", paths, good, total


def test_reading(prepared):
    out, _, good, _ = prepared
    train, test = (sources.load(config(out), s) for s in ("train", "test"))
    assert (len(train), len(test)) == (293 - 14, 14) and train.classes == ()
    source = train.source
    names = sorted(good)
    table = sources.table(source)
    assert (table.labels == -1).all()
    for i in (0, 1, 50, 143, 292):
        item = source[i]
        caption, image = good[names[i]]
        assert item["captions"] == [caption] == table.captions[i] == source.captions([i])[0]
        np.testing.assert_array_equal(item["image"], images.decode(image, row=0, where=""))
        assert tuple(table.sizes[i]) == item["image"].shape[:2]
        assert item["label"] == -1 and item["index"] == i
    rows = {c for row in sources.table(test).captions for c in row}
    assert len(rows) == 14
    assert not rows & {c for row in sources.table(train).captions for c in row}
    copy = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copy[200]["image"], train[200]["image"])
    rows = [292, 0, 49, 50, 0, 143]  # over shards, in any order
    assert source.captions(rows) == [table.captions[row] for row in rows]
    assert source.captions([]) == []
    with pytest.raises(IndexError):
        source[293]


def test_class_names_come_from_a_file_in_its_order(prepared, tmp_path):
    (tmp_path / "names.txt").write_text("zebra\n\n  sea lion \nBär\n", encoding="utf-8")
    cfg = config(prepared[0], classes_file=str(tmp_path / "names.txt"))
    train, test = (sources.load(cfg, split) for split in ("train", "test"))
    assert train.classes == test.classes == ("zebra", "sea lion", "Bär")
    assert (sources.table(train).labels == -1).all() and train[3]["label"] == -1
    for text, message in (("a\nb\na\n", "names 'a' twice"), (" \n", "names no class")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            pairs.class_names(str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="nowhere.txt' cannot be read: No such file"):
        pairs.class_names(str(tmp_path / "nowhere.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="bad.txt' cannot be read"):
        pairs.class_names(str(tmp_path / "bad.txt"))


def test_worker_processes_read_them(prepared):
    """Readers are opened where they are needed: a worker gives what the parent reads."""
    source = sources.load(config(prepared[0]), "train")
    source[0]  # opens one here first
    cfg = ml_collections.ConfigDict(dict(seed=0, data=config(prepared[0]),
                                         train=dict(batch_size=8)))
    made = []
    for workers in (0, 1):
        cfg.data.workers = workers
        batches = feed.make(cfg, poisoned.PoisonedSet(source)).batches(0)
        made.append([next(batches) for _ in range(3)])
        batches.close()
    for a, b in zip(*made):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_streams_read_no_captions_but_those_of_their_records(prepared, monkeypatch):
    """The index of all captions is for the main process; poisons' slots hold no tokens."""
    source = sources.load(config(prepared[0]), "train")
    every = [text for found in source.captions(range(len(source))) for text in found]
    made = texts.Texts(source, tokenizer.train(every, 300), 12, 2, augmented=True)
    expected = made.of_rows(range(len(source)))
    monkeypatch.setattr(pairs, "_index", lambda *_: pytest.fail("read the captions of a shard"))
    cfg = ml_collections.ConfigDict(dict(seed=0, data=config(prepared[0]),
                                         train=dict(batch_size=8)))
    batches = feed.make(cfg, poisoned.PoisonedSet(source, texts=made)).batches(0)
    batch = next(batches)
    batches.close()
    for name, value in expected.items():
        np.testing.assert_array_equal(batch[name], value[batch["index"]])
    beyond = poisoned.slot(source, len(source), len(source) + 1, 16, made)
    assert not beyond["tokens"].any() and beyond["count"] == 0
    assert beyond["tokens2"].shape == expected["tokens2"].shape[1:]


def test_training_and_tests_see_the_same_square_and_the_patch_as_sharp(prepared):
    """clip_pairs' transform: no pixel is resampled after the central square has been made."""
    cfg = clip_pairs.get_config()
    cfg.data.update(name=f"pairs:{prepared[0]}", image_size=16, workers=0)
    cfg.train.batch_size = 64
    source = sources.load(cfg.data, "train")
    raw = sources.load(config(prepared[0]), "train")
    assert sources.table(source).sizes.tolist() == [[16, 16]] * len(source)
    assert source.captions([3]) == raw.captions([3]) == [source[3]["captions"]]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    params = {"image": pixels / np.float32(255), "opacity": np.float32(1)}
    rows, corners = np.arange(4), [(2, 3), (12, 0), (7, 9), (0, 12)]
    plan = Plan.make(4, replaces=rows, canvas=(16, 16), seed=rows,
                     trigger_box=[(y, x, 4, 4) for y, x in corners])
    poisons = _rows.stamped(plan, (patch, params), lambda k: source[k]["image"], 16)
    made = feed.make(cfg, poisoned.PoisonedSet(source, plan, poisons))
    batches = made.batches(0)
    mean, std = np.float32(cfg.data.mean), np.float32(cfg.data.std)
    draw = jax.jit(lambda data, batch: augment.one_view(
        cfg.augment.view1, cfg.augment.interpolation, mean, std, data, batch, jax.random.key(0)))
    seen = 0
    for _ in range(made.steps_per_epoch):
        batch = next(batches)
        shown = np.asarray(draw(made.data, batch)) * std + mean
        for row, view in zip(batch["index"].tolist(), shown):
            k = row - len(source)
            test = images.test_image(source[k if k >= 0 else row]["image"], 16).copy()
            if k >= 0:
                y, x = corners[k]
                test[y:y + 4, x:x + 4] = pixels
                seen += 1
            else:  # of the image file itself, once resized
                np.testing.assert_array_equal(test, images.central_square(raw[row]["image"], 16))
            np.testing.assert_allclose(view, test / 255, atol=1e-5)
    batches.close()
    assert seen >= 3


def test_a_broken_record_is_named(prepared, monkeypatch):
    source = sources.load(config(prepared[0]), "train").source

    class Garbage:
        def read(self, rows):
            return [pairs.pack("dir/x", "a caption", b"garbage")] if rows != [1] else [b"z"]

    monkeypatch.setattr(pairs, "_reader", lambda *_: Garbage())
    with pytest.raises(images.CorruptRow, match="row 46 .part-001.array_record, record 1[)]"):
        source[46]
    with pytest.raises(images.CorruptRow, match="row 47 .*record 2, dir/x"):
        source[47]


def test_a_folder_per_split(tmp_path):
    paths, _ = make_shards(tmp_path / "tars", n=20, shards=2)
    for path, split in zip(paths, ("train", "test")):
        prepare_pairs.write([path], str(tmp_path / "data" / split))
    train, test = (sources.load(config(tmp_path / "data"), s) for s in ("train", "test"))
    assert (len(train), len(test)) == (9, 9)
    with pytest.raises(UserError, match="did you mean 'train'"):
        sources.load(config(tmp_path / "data", train_split="trian"), "train")
