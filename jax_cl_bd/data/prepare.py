"""Makes data sets that are read by random access.

    python -m jax_cl_bd.data.prepare cifar10 --data_dir=~/data
    python -m jax_cl_bd.data.prepare pairs shards/*.tar --out=~/data/cc3m/train

The first downloads a TensorFlow Datasets data set and writes it in a random-access format. It needs
the network and the `prepare` extra (TensorFlow); reading afterwards needs neither. The second
converts tar shards of NAME.jpg (or png, webp) and NAME.txt; the same command again goes on after a
kill.
"""

import importlib.util
import os
import sys

from absl import app, flags, logging

from jax_cl_bd.data import prepare_pairs, tfds
from jax_cl_bd.errors import UserError

_DATA_DIR = flags.DEFINE_string("data_dir", os.environ.get("TFDS_DATA_DIR", ""),
                                "where to write a tfds data set; default: $TFDS_DATA_DIR")
_OUT = flags.DEFINE_string("out", "", "where to write pairs")


def main(argv):
    try:
        if argv[1:2] == ["pairs"]:
            _pairs(argv[2:])
        else:
            _tfds(argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _tfds(names):
    if len(names) != 1 or not _DATA_DIR.value:
        raise UserError("give one name and --data_dir: "
                        "python -m jax_cl_bd.data.prepare NAME --data_dir=DIR; or: "
                        "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
    logging.set_verbosity(logging.WARNING)  # a wrong name is said once, by us
    name, place = names[0], os.path.expanduser(_DATA_DIR.value)
    builder = tfds.find(tfds.library(), name, place)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"preparing {name!r} needs TensorFlow, which is not installed: "
                        f"{tfds.INSTALL_PREPARE}")
    builder.download_and_prepare(file_format="array_record")
    print(f"{name} is ready in {builder.data_path}; read it with "
          f"--config.data.name=tfds:{name} --config.data.data_dir={_DATA_DIR.value}")


def _pairs(shards):
    if not shards or not _OUT.value:
        raise UserError("give tar shards and --out: "
                        "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
    total = prepare_pairs.write(shards, _OUT.value)
    for why, part in total["reasons"].items():
        print(f"left out {part['count']}: {why} ({', '.join(part['names'])}"
              f"{', ...' if part['count'] > len(part['names']) else ''})")
    print(f"{total['pairs']} pairs of {len(total['shards'])} shards are ready in {_OUT.value}, "
          f"{total['unreadable']} were unreadable; read them with "
          f"--config.data.name=pairs:{_OUT.value}")


if __name__ == "__main__":
    app.run(main)
