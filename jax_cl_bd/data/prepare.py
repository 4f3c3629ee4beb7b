"""Makes data sets that are read by random access.

    python -m jax_cl_bd.data.prepare cifar10 --data_dir=~/data
    python -m jax_cl_bd.data.prepare pairs shards/*.tar --out=~/data/cc3m/train

The first downloads a TensorFlow Datasets data set and writes it in a random-access format. It needs
the network and the `prepare` extra (TensorFlow); reading afterwards needs neither. The second
converts tar shards of NAME.jpg (or png, webp) and NAME.txt; the same command again goes on after a
kill.
"""

import os
import sys

from absl import app, flags

from jax_cl_bd.data import prepare_pairs
from jax_cl_bd.errors import UserError

_DATA_DIR = flags.DEFINE_string("data_dir", os.environ.get("TFDS_DATA_DIR", ""),
                                "where to write a tfds data set; default: $TFDS_DATA_DIR")
_OUT = flags.DEFINE_string("out", "", "where to write pairs")


def main(argv):
    if argv[1:2] == ["pairs"]:
        return _pairs(argv[2:])
    if len(argv) != 2 or not _DATA_DIR.value:
        raise app.UsageError("give one name and --data_dir: "
                             "python -m jax_cl_bd.data.prepare NAME --data_dir=DIR; or: "
                             "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
    import tensorflow_datasets as tfds

    builder = tfds.builder(argv[1], data_dir=os.path.expanduser(_DATA_DIR.value))
    builder.download_and_prepare(file_format="array_record")
    print(f"{argv[1]} is ready in {builder.data_path}; read it with "
          f"--config.data.name=tfds:{argv[1]} --config.data.data_dir={_DATA_DIR.value}")


def _pairs(shards):
    try:
        if not shards or not _OUT.value:
            raise UserError("give tar shards and --out: "
                            "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
        total = prepare_pairs.write(shards, _OUT.value)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for why, part in total["reasons"].items():
        print(f"left out {part['count']}: {why} ({', '.join(part['names'])}"
              f"{', ...' if part['count'] > len(part['names']) else ''})")
    print(f"{total['pairs']} pairs of {len(total['shards'])} shards are ready in {_OUT.value}, "
          f"{total['unreadable']} were unreadable; read them with "
          f"--config.data.name=pairs:{_OUT.value}")


if __name__ == "__main__":
    app.run(main)
