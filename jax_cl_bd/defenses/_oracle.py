"""The oracle of EftCLIP (arXiv 2511.13545): what is really in an image, asked of somebody else.

`ground(source, rows) -> float32 [N, C]`: how sure it is that each class is in each image. Regions
come from `_regions`. Back-ends (defense.oracle.name):

- "ground_truth": the label of the picture (and of an object that an attack drew beside), which a
  share `error` of rows has wrong (another class alone, drawn once for each row). With error 0 it
  is an upper bound and no oracle that exists.
- "classifier": an image classifier trained here on the defender's clean labelled images alone, so
  it shares no weights with the suspect; trusted images that are rows of the pool too it has seen.
  It sees whole images.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from jax_cl_bd import optim, run_folder
from jax_cl_bd.data import images
from jax_cl_bd.defenses import _classifier
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.metrics import Progress
from jax_cl_bd.models import build, parts
from jax_cl_bd.train import born_sharded, fit

NAMES = ("ground_truth", "classifier")
_ERROR_SEED = 7933
_BLOCKS = (32, 256)  # images classified at once: of a few, and of many
_AT_ONCE = 2048  # rows between two words of progress


class Counted:
    """An oracle that counts the images it was asked about, each once."""

    def __init__(self, ground):
        self._ground, self._rows = ground, {}

    def __call__(self, source, rows):
        self._rows.setdefault(id(source), (source, set()))[1].update(map(int, rows))
        return self._ground(source, rows)

    @property
    def images(self) -> int:
        return sum(len(rows) for _, rows in self._rows.values())


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Refuses a back-end that does not exist, an impossible error rate, or too few of the `clean`
    images for a classifier. Raises UserError."""
    oracle = cfg.defense.oracle
    if oracle.name not in NAMES:
        raise unknown("defense.oracle.name", oracle.name, NAMES)
    if not 0 <= oracle.error < 1:
        raise UserError(f"defense.oracle.error={oracle.error} must lie in [0, 1): the share of "
                        "images that the oracle gets wrong")
    if oracle.steps < 1:
        raise UserError(f"defense.oracle.steps={oracle.steps} must be at least 1")
    if oracle.name == "classifier":
        _classifier.check_batch(cfg, clean)


def steps(cfg: ml_collections.ConfigDict) -> int:
    """The gradient steps that the oracle itself costs."""
    return 0 if cfg.defense.oracle.name == "ground_truth" else cfg.defense.oracle.steps


def make(cfg, clean, mesh, folder: epath.Path, key: jax.Array) -> Counted:
    """Gives ground(source, rows); a classifier is trained in `folder`, and resumes."""
    if cfg.defense.oracle.name == "ground_truth":
        return Counted(_ground_truth(cfg, len(clean.classes)))
    return Counted(_trained(cfg, clean, mesh, folder, key))


def likeliest(grounded: np.ndarray) -> np.ndarray:
    """The class that an oracle is surest of, -1 where it sees nothing: float [..., C] -> int
    [...]."""
    return np.where(grounded.max(-1) > 0, grounded.argmax(-1), -1)


def asked(ground, source, rows: np.ndarray, label: str) -> np.ndarray:
    """ground(source, rows) of many rows, float32 [N, C], with a progress named by `label`."""
    progress, seen = Progress(label, len(rows)), []
    for start in range(0, max(len(rows), 1), _AT_ONCE):
        seen.append(ground(source, rows[start:start + _AT_ONCE]))
        progress.update(len(seen[-1]))
    progress.close()
    return np.concatenate(seen)


def _ground_truth(cfg, classes: int):
    error, seed = cfg.defense.oracle.error, cfg.seed

    def ground(source, rows):
        labels = np.asarray(source.table(rows)[0])
        # A row is wrong or right by its number, whoever asks and how often.
        draws = np.stack([np.random.default_rng([_ERROR_SEED, seed, len(source), int(row)]).random(
            2) for row in rows]) if len(rows) else np.zeros((0, 2))
        other = (labels + 1 + np.floor(draws[:, 1] * (classes - 1)).astype(int)) % classes
        wrong = draws[:, 0] < error
        said = np.where(wrong, other, labels)
        seen = (said[:, None] == np.arange(classes)) & (labels >= 0)[:, None]
        if hasattr(source, "beside"):  # a second object in the picture
            second = np.where(wrong, -1, source.beside(rows))
            seen |= second[:, None] == np.arange(classes)
        return np.float32(seen)

    return ground


def _trained(cfg, clean, mesh, folder, key):
    clean = _classifier.labelled(cfg, clean)
    own = ml_collections.ConfigDict(cfg.to_dict())
    own.text = ml_collections.ConfigDict({"name": "none"})
    own.train.update(batch_size=cfg.defense.batch_size, chunks=1, eval_every=0)
    own.data.text_augment = "none"
    steps, classes = cfg.defense.oracle.steps, len(clean.classes)
    modules = {"encoder": build.build(cfg.model), _classifier.HEAD: _classifier.head(classes)}
    tx, _ = optim.make(cfg.optim, steps, 1)
    run_folder.write_config(folder, own)
    side = cfg.data.image_size

    def init(key):
        weights, steps_key = jax.random.split(key)
        variables = parts.init_variables(modules, weights, (side, side, 3))
        return _classifier.first_state(variables, tx, steps_key)

    state, shardings = born_sharded(init, key, mesh)
    state = fit(_classifier.make_step(cfg, modules, tx, cfg.augment.view2), state, shardings,
                _classifier.Feed(own, clean), folder=folder, steps=steps, cfg_train=own.train,
                mesh=mesh, label="train oracle")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    mean, std = np.float32(cfg.data.mean), np.float32(cfg.data.std)

    @jax.jit
    def probabilities(variables, x):
        x = (x.astype(jnp.float32) / 255 - mean) / std
        return jax.nn.softmax(_classifier.logits(modules, variables, x))

    def ground(source, rows):
        out = [np.zeros((0, classes), np.float32)]
        block = _BLOCKS[len(rows) > _BLOCKS[0]]
        for start in range(0, len(rows), block):
            part = rows[start:start + block]
            x = np.zeros((block, side, side, 3), np.uint8)
            for i, row in enumerate(part):
                x[i] = images.test_image(source[int(row)]["image"], side)
            out.append(np.asarray(probabilities(variables, x))[:len(part)])
        return np.concatenate(out)

    return ground
