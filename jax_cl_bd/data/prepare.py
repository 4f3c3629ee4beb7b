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

from absl import logging

from jax_cl_bd import command_line, errors
from jax_cl_bd.data import prepare_pairs, tfds
from jax_cl_bd.errors import UserError


def main(argv: list[str]) -> None:
    """Reads the command line; see the top of this file."""
    parser = command_line.Parser("jax_cl_bd.data.prepare", __doc__)
    parser.add_argument("what", nargs="*", metavar="NAME",
                        help="a TFDS name, or the word pairs and its shards")
    parser.add_argument("--data_dir", default=os.environ.get("TFDS_DATA_DIR", ""),
                        help="where to write a TFDS data set (default: $TFDS_DATA_DIR)")
    parser.add_argument("--out", default="", help="where to write pairs")
    given = parser.parse_intermixed_args(argv)  # shards before and after --out
    if given.what[:1] == ["pairs"]:
        _pairs(given.what[1:], given.out)
    else:
        _tfds(given.what, given.data_dir)


def _tfds(names, data_dir):
    if len(names) != 1 or not data_dir:
        raise UserError("give one name and --data_dir: "
                        "python -m jax_cl_bd.data.prepare NAME --data_dir=DIR; or: "
                        "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
    logging.set_verbosity(logging.WARNING)  # a wrong name is said once, by us
    name, place = names[0], os.path.expanduser(data_dir)
    builder = tfds.find(tfds.library(), name, place)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(f"preparing {name!r} needs TensorFlow, which is not installed: "
                        f"{tfds.INSTALL_PREPARE}")
    builder.download_and_prepare(file_format="array_record")
    print(f"{name} is ready in {builder.data_path}; read it with "
          f"--config.data.name=tfds:{name} --config.data.data_dir={data_dir}")


def _pairs(shards, out):
    if not shards or not out:
        raise UserError("give tar shards and --out: "
                        "python -m jax_cl_bd.data.prepare pairs SHARDS... --out=DIR")
    total = prepare_pairs.write(shards, out)
    for why, part in total["reasons"].items():
        print(f"left out {part['count']}: {why} ({', '.join(part['names'])}"
              f"{', ...' if part['count'] > len(part['names']) else ''})")
    print(f"{total['pairs']} pairs of {len(total['shards'])} shards are ready in {out}, "
          f"{total['unreadable']} were unreadable; read them with "
          f"--config.data.name=pairs:{out}")


if __name__ == "__main__":
    errors.end(main, sys.argv[1:])
