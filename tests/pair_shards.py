"""Tar shards of generated image-caption pairs, some of them unreadable; the same every time.

    python -m tests.pair_shards FOLDER --pairs=10000 --shards=20 --broken_every=100

Images and captions are those of the scenes source, JPEG at 64 px; pair i is its row i. Every
`broken_every`-th pair is broken in one of the ways of BROKEN, in turn.
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from jax_cl_bd.data import scenes

# What is wrong -> what `prepare` calls it.
BROKEN = {"half an image": "the image cannot be decoded", "garbage": "the image cannot be decoded",
          "empty image": "the image cannot be decoded", "no image": "no image",
          "no caption": "no caption", "blank caption": "the caption is empty",
          "not UTF-8": "the caption is not UTF-8", "two images": "more than one image"}


def write(folder, *, pairs: int, shards: int, broken_every: int = 0) -> tuple[list, dict, dict]:
    """Writes tars into a folder.

    Returns:
        paths of the shards; {name: caption} of the good pairs; {reason: count} of the others.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = scenes.Scenes("train", pairs, 64, per_row=1)
    captions = source.captions(range(pairs))
    kinds, paths, good, bad = list(BROKEN), [], {}, {}
    for s, part in enumerate(np.array_split(np.arange(pairs), shards)):
        paths.append(str(folder / f"scenes-{s:04}.tar"))
        with tarfile.open(paths[-1], "w") as tar:
            for i in part.tolist():
                kind = ""
                if broken_every and i % broken_every == broken_every - 1:
                    kind = kinds[i // broken_every % len(kinds)]
                    bad[BROKEN[kind]] = bad.get(BROKEN[kind], 0) + 1
                else:
                    good[f"{i:08}"] = captions[i][0]
                for name, content in _members(f"{i:08}", _jpeg(source[i]["image"]),
                                              captions[i][0].encode(), kind):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return paths, good, bad


def _members(name, image, caption, kind):
    image = {"half an image": image[:len(image) // 2], "garbage": b"no image at all",
             "empty image": b""}.get(kind, image)
    caption = {"blank caption": b" \n", "not UTF-8": b"\xff\xfe" + caption}.get(kind, caption)
    members = [(f"{name}.jpg", image), (f"{name}.txt", caption)]
    if kind == "two images":
        members.append((f"{name}.jpeg", image))
    return [m for m in members if not (kind == "no image" and m[0].endswith(".jpg")
                                       or kind == "no caption" and m[0].endswith(".txt"))]


def _jpeg(image):
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for option, default in (("pairs", 10_000), ("shards", 20), ("broken_every", 100)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = vars(parser.parse_args())
    paths, good, bad = write(given.pop("folder"), **given)
    print(f"{len(good)} good pairs and {sum(bad.values())} broken ones in {len(paths)} shards: "
          f"{bad}")
