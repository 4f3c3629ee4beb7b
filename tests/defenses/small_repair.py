"""A repair of an untrained model on forty scenes, for the tests of defenses on the sweep."""

import functools

import jax
import numpy as np
from etils import epath

from configs import clip_scenes
from jax_cl_bd import defend, parallel, poison
from jax_cl_bd.data import sources, texts
from jax_cl_bd.data.pool import Pool
from jax_cl_bd.defenses.given import Given, Truth
from jax_cl_bd.models import encoder
from jax_cl_bd.objectives import training


def config(defense):
    """The debug settings of a defense on scenes, at a constant rate."""
    cfg = clip_scenes.get_config(f"debug,defense={defense}")
    cfg.data.scenes_train = 40
    cfg.mesh.data = 1
    cfg.train.save_every = 0  # the last step alone
    cfg.defense.optim.update(warmup_steps=0, schedule="constant")
    return cfg


@functools.cache
def truth():
    """What the benchmark would know of a poisoned set: plan, trigger and poisons, none of which may
    change a verdict."""
    cfg = config("fine_tune")
    source, trigger = sources.load(cfg.data, "train"), poison.make_trigger(cfg)
    plan, rows = poison.make(cfg, source, sources.table(source), trigger)
    assert len(plan)
    return Truth(plan, cfg.attack.target, trigger, Pool(source, plan, rows).poison)


def run(method, cfg, folder, truth=None):
    """Gives (the suspect, which must stay as it was, and what came out); every row of the data is
    taken to be clean, and the same rows are the pool."""
    mesh, source = parallel.make_mesh(cfg.mesh), sources.load(cfg.data, "train")
    suspect = encoder.of_parts(cfg, training.first_variables(cfg), mesh,
                               texts.make_tokenizer(cfg, source))
    before = jax.tree.map(np.array, suspect.pair.variables)
    given = Given(source, defend.validation(cfg), Pool(source))
    found = method.run(cfg, [suspect], given, truth, mesh, epath.Path(folder), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, before, suspect.pair.variables)
    return suspect, found
