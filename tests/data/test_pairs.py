"""pairs.py and prepare_pairs.py: tars in, the same pairs out, whatever breaks."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

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
from tests import pair_shards

SIZES = [(5, 9), (8, 8), (12, 7)]


def picture(i, ending="png"):
    height, width = SIZES[i % 3]
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, {"jpg": "JPEG"}.get(ending, ending))
    return out.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


BROKEN = {3: "the image cannot be decoded", 14: "no caption", 25: "the caption is empty",
          36: "the caption is not UTF-8", 47: "no image", 58: "more than one image",
          69: "the image cannot be decoded"}


def make_shards(folder, n=300, shards=6):
    """Tars of n pairs, seven of them broken; returns paths and {name: (caption, image file)}."""
    folder.mkdir(exist_ok=True)
    paths, good = [], {}
    for s, part in enumerate(np.array_split(np.arange(n), shards)):
        paths.append(str(folder / f"part-{s:03}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for i in part.tolist():
                ending = ("png", "jpg", "webp", "jpeg")[i % 4]
                image, caption = picture(i, ending), f"Caption  number {i}\n: ein Bär. ".encode()
                if i == 3:
                    image = b"no image at all"
                elif i == 69:
                    image = image[:len(image) // 2]
                elif i == 25:
                    caption = b" \n "
                elif i == 36:
                    caption = b"\xff\xfe\xfa"
                if i != 47:
                    add(tar, f"dir/{i:05}.{ending}", image)
                if i == 58:
                    add(tar, f"dir/{i:05}.gif.png", picture(1))  # another name: has no caption
                    add(tar, f"dir/{i:05}.png", picture(1))
                add(tar, f"dir/{i:05}.json", b"{}")  # ignored
                if i != 14:
                    add(tar, f"dir/{i:05}.txt", caption)
                if i not in BROKEN:
                    good[f"dir/{i:05}"] = (f"Caption number {i} : ein Bär.", image)
    return paths, good


def stored(folder):
    """{name: (caption, image file)} of every record; fails on a name that occurs twice."""
    found = {}
    for shard in json.loads((folder / "pairs.json").read_text())["shards"]:
        reader = pairs.ArrayRecordReader(str(folder / f"{shard['name']}.array_record"))
        assert reader.num_records() == shard["pairs"]
        for record in reader.read_all():
            name, caption, image = pairs.unpack(record)
            assert name not in found
            found[name] = (caption, image)
    return found


def config(path, **changes):
    cfg = ml_collections.ConfigDict(dict(
        name=f"pairs:{path}", data_dir="", image_size=16, train_split="train", test_split="test",
        limit=0, skip_corrupt=False, classes_file="", captions="", captions_per_row=5,
        feed="streamed", workers=0))
    cfg.update(changes)
    return cfg


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    paths, good = make_shards(folder / "tars")
    total = prepare_pairs.write(paths, str(folder / "out"))
    return folder / "out", paths, good, total


def test_every_pair_is_stored_once_or_counted(prepared):
    out, _, good, total = prepared
    assert stored(out) == good
    assert total == json.loads((out / "pairs.json").read_text())
    assert total["pairs"] == 293 and total["unreadable"] == 8
    assert {why: part["count"] for why, part in total["reasons"].items()} == {
        "the image cannot be decoded": 2, "no caption": 2, "the caption is empty": 1,
        "the caption is not UTF-8": 1, "no image": 1, "more than one image": 1}
    assert total["reasons"]["no image"]["names"] == ["part-000: dir/00047"]
    assert not [p for p in out.iterdir() if "partial" in p.name]


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


def test_generated_shards_are_what_they_say(tmp_path):
    paths, good, bad = pair_shards.write(tmp_path / "tars", pairs=160, shards=3, broken_every=10)
    total = prepare_pairs.write(paths, str(tmp_path / "out"))
    assert {why: part["count"] for why, part in total["reasons"].items()} == bad
    assert sum(bad.values()) == 16 and set(bad) == set(pair_shards.BROKEN.values())
    assert {name: caption for name, (caption, _) in stored(tmp_path / "out").items()} == good
    again, *_ = pair_shards.write(tmp_path / "again", pairs=160, shards=3, broken_every=10)
    assert [open(p, "rb").read() for p in again] == [open(p, "rb").read() for p in paths]


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


def test_finished_shards_are_not_read_again(prepared, monkeypatch):
    out, paths, _, total = prepared
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.name != "pairs.json"}
    monkeypatch.setattr(prepare_pairs, "_shard", lambda *_: pytest.fail("made a shard again"))
    assert prepare_pairs.write(paths, str(out)) == total
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()
                      if p.name != "pairs.json"}


_SLOW = """
import sys, time
from jax_cl_bd.data import images, prepare_pairs
decode = images.decode
def slowly(*args, **kwargs):
    time.sleep(0.02)
    return decode(*args, **kwargs)
images.decode = slowly
prepare_pairs.write(sys.argv[2:], sys.argv[1])
"""


def test_killed_and_run_again(tmp_path):
    paths, good = make_shards(tmp_path / "tars")
    out = tmp_path / "out"
    for shards_before in (1, 3):  # killed while a later shard is being written
        child = subprocess.Popen([sys.executable, "-c", _SLOW, str(out), *paths],
                                 stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while time.monotonic() < limit and child.poll() is None:
            if len(list(out.glob("part-*.array_record"))) >= shards_before and list(
                    out.glob(".*array_record.partial")):
                break
            time.sleep(0.005)
        assert child.poll() is None, "it was to be killed in the middle"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        done = len(list(out.glob("part-*.array_record")))
        assert shards_before <= done < 6 and not (out / "pairs.json").exists()
        with pytest.raises(UserError, match="did not finish"):
            sources.load(config(out), "train")
    done = subprocess.run([sys.executable, "-m", "jax_cl_bd.data.prepare", "pairs", *paths,
                           f"--out={out}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "293 pairs of 6 shards are ready" in done.stdout and "8 were unreadable" in done.stdout
    assert "left out 1: no image (part-000: dir/00047)" in done.stdout
    assert "prepare pairs" in done.stderr  # the progress
    assert stored(out) == good


def test_a_shard_that_is_cut_short_gives_what_it_has(tmp_path):
    paths, good = make_shards(tmp_path / "tars", n=60, shards=1)
    whole = open(paths[0], "rb").read()
    with open(paths[0], "wb") as file:
        file.write(whole[:len(whole) // 2])
    total = prepare_pairs.write(paths, str(tmp_path / "out"))
    found = stored(tmp_path / "out")
    assert 10 < len(found) < len(good) and found.items() <= good.items()
    assert total["reasons"]["the shard is cut short"]["count"] == 1


def test_members_need_not_be_neighbours_and_gzip_is_read(tmp_path):
    path = str(tmp_path / "loose.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        for i in range(4):
            add(tar, f"{i}.txt", f"caption {i}".encode())
        for i in (2, 0, 3, 1):
            add(tar, f"{i}.JPG", picture(i, "jpg"))
    assert prepare_pairs.write([path], str(tmp_path / "out"))["pairs"] == 4
    source = sources.load(config(tmp_path / "out"), "train")
    assert [c[0] for c in sources.table(source).captions] == [f"caption {i}" for i in range(4)]
    assert (tmp_path / "out" / "loose.array_record").exists()


def test_a_folder_per_split(tmp_path):
    paths, _ = make_shards(tmp_path / "tars", n=20, shards=2)
    for path, split in zip(paths, ("train", "test")):
        prepare_pairs.write([path], str(tmp_path / "data" / split))
    train, test = (sources.load(config(tmp_path / "data"), s) for s in ("train", "test"))
    assert (len(train), len(test)) == (9, 9)
    with pytest.raises(UserError, match="did you mean 'train'"):
        sources.load(config(tmp_path / "data", train_split="trian"), "train")


def test_mistakes_are_named(tmp_path):
    (tmp_path / "text.tar").write_text("no tar")
    paths, _ = make_shards(tmp_path / "tars", n=4, shards=1)
    (tmp_path / "b").mkdir()
    other = str(tmp_path / "b" / "part-000.tar")
    with tarfile.open(other, "w") as tar:
        add(tar, "x.jpg", picture(1))
    out = str(tmp_path / "out")
    for shards, message in (([str(tmp_path / "none.tar")], "none.tar' does not exist"),
                            ([str(tmp_path / "text.tar")], "is no tar file"),
                            ([*paths, other], "two shards have the name 'part-000'")):
        with pytest.raises(UserError, match=message):
            prepare_pairs.write(shards, out)
    prepare_pairs.write(paths, out)
    with open(other, "ab") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(UserError, match="made from another file"):
        prepare_pairs.write([other], out)
    (tmp_path / "out" / "part-000.json").unlink()
    with pytest.raises(UserError, match="remove part-000.array_record"):
        prepare_pairs.write(paths, out)
    for path, message in ((tmp_path / "nowhere", "does not exist"),
                          (tmp_path / "tars", "nothing was prepared")):
        with pytest.raises(UserError, match=message):
            sources.load(config(path), "train")
    with pytest.raises(UserError, match="4 of 4|3 of 3"):
        sources.load(config(out, captions="templates"), "train")


@pytest.mark.parametrize("arguments, message", [
    (["pairs", "missing.tar", "--out=out"], "error: the shard 'missing.tar' does not exist"),
    (["pairs", "--out=out"], "error: give tar shards and --out"),
    (["pairs", "missing.tar"], "error: give tar shards and --out"),
    (["cifra10", "--data_dir=out"], "error: unknown tfds data set 'cifra10'; did you mean"),
    (["cifar10"], "error: give one name and --data_dir"),
])
def test_the_command_says_what_is_wrong(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", "jax_cl_bd.data.prepare", *arguments],
                          capture_output=True, text=True, timeout=60,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
