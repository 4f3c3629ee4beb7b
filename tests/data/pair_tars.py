"""Tars of pairs in which something is broken, for the tests of writing and of reading them."""

import io
import json
import tarfile

import ml_collections
import numpy as np
from PIL import Image

from jax_cl_bd.data import (
    pairs,
)

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
