"""Tar shards of (image, caption) pairs, as WebDataset lays them out, to ArrayRecord.

One output shard per tar, written under other names and renamed when whole, the ArrayRecord last:
its presence alone means that the shard is finished. So a run that was killed anywhere goes on with
the shards that are not there, and no pair is lost or repeated. Format: data/pairs.py.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from jax_cl_bd.data import images, pairs
from jax_cl_bd.errors import UserError, no_program
from jax_cl_bd.metrics import Progress

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTION = ".txt"
NAMED = 5  # unreadable pairs of each kind that are named
_AT_ONCE = 256  # pairs that are decoded together
_KIB = 1024


@dataclasses.dataclass
class _Pair:
    """Members of one name in a tar; `why` says what is wrong with it."""
    name: str
    image: bytes = b""
    caption: str = ""
    size: tuple = (0, 0)
    why: str = ""


def write(shards: Sequence[str], out: str) -> dict:
    """Converts tar shards; finished ones are skipped.

    A pair that cannot be used (undecodable image, missing, empty or non-UTF-8 caption, ...) is left
    out and counted.

    Returns:
        What is written to out/pairs.json: {"format", "pairs", "unreadable", "reasons": {reason:
        {"count", "names"}}, "shards": [{"name", "bytes", "pairs", ...}]}.
    Raises:
        UserError: a shard is missing or no tar file, two have the same name, or `out` holds a
            shard of that name that was made from another file.
    """
    out = epath.Path(out).expanduser()
    names = _names(shards)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be made: {error.strerror}") from error
    sizes = [os.path.getsize(path) for path in shards]
    done = [_finished(out, name, size) for name, size in zip(names, sizes)]
    start = sum(size for size, found in zip(sizes, done) if found) // _KIB
    bar = Progress("prepare pairs, KiB", max(1, sum(sizes) // _KIB), start=start)
    try:
        for i, (path, name, size) in enumerate(zip(shards, names, sizes)):
            if done[i] is None:
                done[i] = _shard(path, name, size, out, bar)
    finally:
        bar.close()
    total = {"format": pairs.FORMAT, **_sum(done), "shards": done}
    _write_text(out / pairs.LIST, json.dumps(total, indent=1))
    return total


def _names(shards):
    names = []
    for path in shards:
        if not os.path.isfile(path):
            raise UserError(f"the shard {path!r} does not exist")
        if not tarfile.is_tarfile(path):
            raise UserError(f"{path!r} is no tar file; shards are tars of NAME.jpg, NAME.txt")
        name = os.path.basename(path)
        names.append(name[:name.find(".tar")] if ".tar" in name[1:] else name)
        if names[-1] in names[:-1]:
            raise UserError(f"two shards have the name {names[-1]!r}; write them to two folders")
    return names


def _finished(out, name, size):
    if not (out / f"{name}.array_record").exists():
        return None
    try:
        summary = json.loads((out / f"{name}.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out / name}.json cannot be read ({error}); remove "
                        f"{name}.array_record to make the shard again") from error
    if summary["bytes"] != size:
        raise UserError(f"{out / name}.array_record was made from another file ({summary['bytes']} "
                        f"bytes, this one has {size}); choose another --out")
    return summary


def _shard(path, name, size, out, bar):
    """Writes the three files of one shard and returns its summary."""
    temporary = out / f".{name}.array_record.partial"
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # images are compressed
    texts, sizes, reasons, said = [], [], {}, 0
    found = _members(path)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        while block := list(itertools.islice(found, _AT_ONCE)):
            for pair in pool.map(_check, (pair for pair, _ in block)):
                if pair.why:
                    reason = reasons.setdefault(pair.why, {"count": 0, "names": []})
                    reason["count"] += 1
                    reason["names"] += [pair.name] if len(reason["names"]) < NAMED else []
                else:
                    writer.write(pairs.pack(pair.name, pair.caption, pair.image))
                    texts.append(pair.caption.encode())
                    sizes.append(pair.size)
            at = min(size, block[-1][1]) // _KIB
            bar.update(at - said, note=f"{name}: {len(texts)} pairs")
            said = at
    writer.close()
    bar.update(size // _KIB - said)
    unreadable = sum(reason["count"] for reason in reasons.values())
    summary = {"name": name, "bytes": size, "pairs": len(texts), "unreadable": unreadable,
               "reasons": reasons}
    _write_index(out / f"{name}.index.npz", texts, sizes)
    _write_text(out / f"{name}.json", json.dumps(summary))
    os.replace(temporary, out / f"{name}.array_record")
    return summary


def _check(pair):
    if not pair.why:
        try:
            pair.size = images.decode(pair.image, row=0, where=pair.name).shape[:2]
        except images.CorruptRow:
            pair.why = "the image cannot be decoded"
    return pair


def _members(path) -> Iterator[tuple[_Pair, int]]:
    """The pairs of a tar, in the order of their first members, and the bytes of tar behind each.

    The members of a pair need not stand together. The headers are read first; a tar that is cut
    short gives what it has.
    """
    with tarfile.open(path) as tar:
        groups, cut = {}, False
        try:
            for member in tar:
                stem, ending = os.path.splitext(member.name)
                ending = ending.lower()
                if member.isfile() and (ending == CAPTION or ending in IMAGES):
                    kind = "caption" if ending == CAPTION else "image"
                    groups.setdefault(stem, {}).setdefault(kind, []).append(member)
        except (tarfile.TarError, EOFError, OSError):
            cut = True
        for stem, group in groups.items():
            ends = [m.offset_data + m.size for found in group.values() for m in found]
            yield _pair(tar, stem, group), max(ends)
        if cut:
            yield _Pair(os.path.basename(path), why="the shard is cut short"), 0


def _pair(tar, stem, group):
    pair = _Pair(stem.encode("utf-8", "replace").decode())  # tarfile keeps odd bytes as surrogates
    for kind in ("image", "caption"):
        if kind not in group:
            pair.why = f"no {kind}"
            return pair
        if len(group[kind]) > 1:
            pair.why = f"more than one {kind}"
            return pair
    try:
        pair.image, caption = (tar.extractfile(group[kind][0]).read()
                               for kind in ("image", "caption"))
    except (tarfile.TarError, EOFError, OSError):
        pair.why = "cut short"
        return pair
    try:
        pair.caption = " ".join(caption.decode("utf-8-sig").split())
    except UnicodeDecodeError:
        pair.why = "the caption is not UTF-8"
        return pair
    pair.why = "" if pair.caption else "the caption is empty"
    return pair


def _sum(summaries):
    reasons = {}
    for summary in summaries:
        for why, part in summary["reasons"].items():
            into = reasons.setdefault(why, {"count": 0, "names": []})
            into["count"] += part["count"]
            names = [f"{summary['name']}: {name}" for name in part["names"]]
            into["names"] = (into["names"] + names)[:NAMED]
    return {"pairs": sum(s["pairs"] for s in summaries),
            "unreadable": sum(s["unreadable"] for s in summaries), "reasons": reasons}


def _write_index(path, texts, sizes):
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        np.savez(file, sizes=np.array(sizes, np.int32).reshape(-1, 2),
                 starts=np.cumsum([0, *map(len, texts)], dtype=np.int64),
                 text=np.frombuffer(b"".join(texts), np.uint8))
    os.replace(temporary, path)


def _write_text(path, text):
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    no_program("jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
