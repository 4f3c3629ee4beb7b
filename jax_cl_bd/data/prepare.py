"""Downloads a TensorFlow Datasets data set and writes it in a random-access format.

    python -m jax_cl_bd.data.prepare cifar10 --data_dir=~/data

Needs the network and the `prepare` extra (TensorFlow); reading afterwards needs neither.
"""

import os

from absl import app, flags

_DATA_DIR = flags.DEFINE_string("data_dir", os.environ.get("TFDS_DATA_DIR", ""),
                                "where to write; default: $TFDS_DATA_DIR")


def main(argv):
    if len(argv) != 2 or not _DATA_DIR.value:
        raise app.UsageError("give one name and --data_dir: "
                             "python -m jax_cl_bd.data.prepare NAME --data_dir=DIR")
    import tensorflow_datasets as tfds

    builder = tfds.builder(argv[1], data_dir=os.path.expanduser(_DATA_DIR.value))
    builder.download_and_prepare(file_format="array_record")
    print(f"{argv[1]} is ready in {builder.data_path}; read it with "
          f"--config.data.name=tfds:{argv[1]} --config.data.data_dir={_DATA_DIR.value}")


if __name__ == "__main__":
    app.run(main)
