"""prepare_pairs.py: tars in, the same pairs out, whatever breaks."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from jax_cl_bd.data import prepare, prepare_pairs, sources
from jax_cl_bd.errors import UserError
from tests import pair_shards
from tests.data.pair_tars import add, config, make_shards, picture, stored


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


def test_generated_shards_are_what_they_say(tmp_path):
    paths, good, bad = pair_shards.write(tmp_path / "tars", pairs=160, shards=3, broken_every=10)
    total = prepare_pairs.write(paths, str(tmp_path / "out"))
    assert {why: part["count"] for why, part in total["reasons"].items()} == bad
    assert sum(bad.values()) == 16 and set(bad) == set(pair_shards.BROKEN.values())
    assert {name: caption for name, (caption, _) in stored(tmp_path / "out").items()} == good
    again, *_ = pair_shards.write(tmp_path / "again", pairs=160, shards=3, broken_every=10)
    assert [open(p, "rb").read() for p in again] == [open(p, "rb").read() for p in paths]


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
    (["pairs", "missing.tar", "--out=out"], "the shard 'missing.tar' does not exist"),
    (["pairs", "a.tar", "--out=out", "b.tar"], "the shard 'a.tar' does not exist"),
    (["pairs", "--out=out"], "give tar shards and --out"),
    (["pairs", "missing.tar"], "give tar shards and --out"),
    (["cifra10", "--data_dir=out"], "unknown tfds data set 'cifra10'; did you mean"),
    (["cifar10"], "give one name and --data_dir"),
    (["cifar10", "--datadir=out"], "unrecognized arguments: --datadir=out; python -m"),
])
def test_the_command_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(UserError, match=message):
        prepare.main(arguments)
