"""Runs the parts of a model (encoder, projector, ...) on the two-level variables dict.

`variables = {"params": {part: ...}, "batch_stats": {part: ...}}`, both with every part as a key;
a part without batch norm has {} as its batch_stats.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


def make_apply_fns(modules: dict[str, nn.Module]) -> dict:
    """Returns {part: fn(variables, x, train) -> (output, new batch_stats of the part, or {})}."""
    return {name: _apply_fn(name, module) for name, module in modules.items()}


def init_variables(modules: dict[str, nn.Module], key: jax.Array, image_shape: tuple,
                   context: int = 0) -> dict:
    """Draws the variables of every part.

    Args:
        modules: in the order in which data passes through them, the encoder first.
        key: part i is drawn from fold_in(key, i), so a further head changes no earlier part.
        image_shape: (H, W, 3) of one image.
        context: tokens of one caption; a part named "text" starts from those.
    """
    x = jnp.zeros((1, *image_shape), jnp.float32)
    variables = {"params": {}, "batch_stats": {}}
    for i, (name, module) in enumerate(modules.items()):
        x = jnp.zeros((1, context), jnp.int32) if name == "text" else x
        x, part = module.init_with_output(jax.random.fold_in(key, i), x, train=False)
        variables["params"][name] = part.get("params", {})
        variables["batch_stats"][name] = part.get("batch_stats", {})
    return variables


def forward(apply_fns: dict, variables: dict, names: tuple[str, ...], x: jax.Array):
    """Runs the named parts one after another in train mode.

    Returns:
        The output and `variables` with the new running statistics, to go into the next pass.
    """
    stats = dict(variables["batch_stats"])
    for name in names:
        x, new = apply_fns[name](variables, x, True)
        if new:
            stats[name] = new
    return x, {"params": variables["params"], "batch_stats": stats}


def copied(variables: dict) -> dict:
    """Copies the arrays, so that a donated state never holds one buffer twice."""
    return jax.tree.map(jnp.copy, variables)


def _apply_fn(name, module):
    def apply(variables, x, train):
        part = {"params": variables["params"][name]}
        if variables["batch_stats"].get(name):
            part["batch_stats"] = variables["batch_stats"][name]
        if not train:
            return module.apply(part, x, train=False), {}
        y, updated = module.apply(part, x, train=True, mutable=["batch_stats"])
        return y, updated.get("batch_stats", {})

    return apply
