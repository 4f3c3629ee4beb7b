"""Training with a model that compiles at once, for the tests of the loop."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from jax_cl_bd import parallel
from jax_cl_bd.train import TrainState, born_sharded, fit

TX = optax.sgd(0.1, momentum=0.9)
DATA = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


class Feed:
    data = {"rows": DATA}

    def batches(self, step):
        while True:
            yield {"index": np.random.default_rng(step).integers(0, 64, 8).astype(np.int32)}
            step += 1


def init(key):
    params = {"w": jax.random.normal(key, (3,))}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, batch_stats={},
                      opt_state=TX.init(params), extra={}, key=key)


def step_fn(state, data, batch, *, bad_step=-1):
    x = data["rows"][batch["index"]]
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (8,))

    def loss_of(params):
        return jnp.mean((x @ params["w"] - 1 + 0.1 * noise) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state)
    loss = jnp.where(state.step + 1 == bad_step, jnp.nan, loss)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                         opt_state=opt_state), {"loss": loss}


def run(folder, steps, *, step=step_fn, dispatch=1, save_every=5, evaluate=None, log_every=5,
        eval_every=5, around=contextlib.nullcontext, refresh=None, first=init, members=()):
    mesh = parallel.make_mesh(ConfigDict({"data": -1, "fsdp": 1}))
    state, shardings = born_sharded(first, jax.random.key(3), mesh)
    cfg = ConfigDict({"log_every": log_every, "save_every": save_every, "batch_size": 8,
                      "eval_every": eval_every if evaluate else 0, "steps_per_dispatch": dispatch})
    with around():
        return fit(step, state, shardings, Feed(), folder=epath.Path(folder), steps=steps,
                   cfg_train=cfg, mesh=mesh, label="test", evaluate=evaluate,
                   refresh=refresh, members=members)


def losses(folder):
    lines = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
