"""An image-text model that compiles at once: linear towers under the real projections and scale."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jax_cl_bd import parallel
from jax_cl_bd.models import pair, parts


class Image(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x.mean((1, 2)))
        return jnp.tanh(nn.Dense(6)(x))


class Text(nn.Module):
    @nn.compact
    def __call__(self, tokens, train):
        return nn.Embed(400, 5)(tokens).mean(1)


def modules_of(cfg):
    top = pair.heads(cfg.objective)
    return {"encoder": Image(), "image_projection": top["image_projection"], "text": Text(),
            "text_projection": top["text_projection"], "scale": top["scale"]}


def eight_devices_equal_one(objective, cfg, steps):
    """Loss, gradient and extra of several steps, of 16 rows, on one device and on eight."""
    rng = np.random.default_rng(5)
    batch = {**{k: rng.normal(size=(16, 2, 2, 3)).astype(np.float32) for k in ("view1", "view2")},
             **{k: rng.integers(0, 400, (16, 3)).astype(np.int32)
                for k in ("tokens", "tokens2", "tokens3")}, "index": np.arange(16, dtype=np.int32)}
    modules = modules_of(cfg)
    variables = parts.init_variables(modules, jax.random.key(0), (2, 2, 3), 3)
    extra = objective.init_extra(cfg, variables, jax.random.key(1))
    if "safe" in extra:
        extra["safe"] = extra["safe"].at[:7].set(True)
    fns = parts.make_apply_fns(modules)

    @jax.jit
    def step(params, extra, batch, step):
        return jax.value_and_grad(lambda p: objective.loss(
            cfg, {**variables, "params": p}, extra, batch, fns, None, step), has_aux=True)(params)

    mesh = parallel.make_mesh(ConfigDict({"data": 8, "fsdp": 1}))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = parallel.state_shardings(mesh, extra)
    cut = [s.spec for s in jax.tree.leaves(shardings) if s.spec != PartitionSpec()]
    assert cut and all(spec == PartitionSpec(None, ("data", "fsdp")) for spec in cut)
    for now in steps:
        one = step(variables["params"], extra, batch, now)
        with jax.set_mesh(mesh):
            eight = step(jax.device_put(variables["params"], whole),
                         jax.device_put(extra, shardings), parallel.put_rows(mesh, batch), now)
        assert len(eight[0][0].sharding.device_set) == 8
        for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one[1])) > 1e-4
        extra = one[0][1][1]
