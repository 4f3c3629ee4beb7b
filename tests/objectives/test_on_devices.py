"""Loss, gradient and new state of every objective: 8 devices give what 1 device gives."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_cl_bd.models import parts
from jax_cl_bd.models.resnet import ResNet

B, SIDE = 16, 8
FIELDS = {"simclr": {"temperature": 0.5, "hidden": 8, "dim": 8},
          "moco": {"temperature": 0.2, "momentum": 0.9, "queue_batches": 2, "hidden": 8, "dim": 8},
          "byol": {"tau": 0.9, "hidden": 8, "dim": 8},
          "simsiam": {"layers": 2, "hidden": 8, "dim": 8, "bottleneck": 4}}


def prepare(name, bn_groups):
    cfg = ConfigDict({
        "objective": {"name": name, **FIELDS[name]}, "train": {"batch_size": B, "steps": 10},
        "model": {"bn_groups": bn_groups}})
    module = importlib.import_module(f"jax_cl_bd.objectives.{name}")
    encoder = ResNet(depths=(0,), widths=(4,), stem_width=4, stem_stride=2,
                     bn_groups=bn_groups)  # a stem
    modules = {"encoder": encoder, **module.heads(cfg.objective, bn_groups=bn_groups)}

    @jax.jit
    def init(key):
        variables = parts.init_variables(modules, key, (SIDE, SIDE, 3))
        return variables, module.init_extra(cfg, variables, key)

    fns = parts.make_apply_fns(modules)

    def step(variables, extra, batch):
        def loss(params):
            return module.loss(cfg, {**variables, "params": params}, extra, batch, fns,
                               jax.random.key(1), 3)

        (value, (stats, new, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
            variables["params"])
        new = module.after_update(cfg, {"params": grads, "batch_stats": stats}, new, 3, 10)
        return {"loss": value, "grads": grads, "stats": stats, "extra": new, "metrics": metrics}

    return init(jax.random.key(0)), step


@pytest.mark.parametrize("name, bn_groups", [
    ("simclr", 1), *((name, 8) for name in FIELDS),
    *(pytest.param(name, 1, marks=pytest.mark.slow) for name in FIELDS if name != "simclr")])
def test_eight_devices_equal_one(name, bn_groups):
    (variables, extra), step = prepare(name, bn_groups)
    rng = np.random.default_rng(0)
    batch = {v: rng.normal(size=(B, SIDE, SIDE, 3)).astype(np.float32) for v in ("view1", "view2")}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    spread = jax.device_put(batch, rows)
    state = jax.device_put((variables, extra), whole)
    if name == "moco":  # as the training state lays it out
        state[1]["queue"] = jax.device_put(extra["queue"], NamedSharding(
            mesh, PartitionSpec(None, "data")))
    one = jax.jit(step)(variables, extra, batch)
    with jax.set_mesh(mesh):  # as training does
        eight = jax.jit(step)(*state, spread)
    assert jax.tree.structure(one["stats"]) == jax.tree.structure(variables["batch_stats"])
    assert jax.tree.structure(one["extra"]) == jax.tree.structure(extra)
    assert len(one["loss"].sharding.device_set) == 1 and len(eight["loss"].sharding.device_set) == 8
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one["grads"]))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)
