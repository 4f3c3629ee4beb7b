"""What an image tower's stages put out on the way to its features."""

import re

import jax

from jax_cl_bd.errors import UserError


def layers(params: dict) -> tuple[str, ...]:
    """The names of the last block of every residual stage, or of every transformer block, in their
    order; `params` are the tower's.

    Raises:
        UserError: the tower has neither.
    """
    last = {}
    for name in params:
        found = re.fullmatch(r"layer(\d+)_(\d+)|block(\d+)", name)
        if found:
            stage, block, alone = (int(part or 0) for part in found.groups())
            key = (stage, alone)
            last[key] = max(last.get(key, (-1, "")), (block, name))
    if not last:
        raise UserError("the image tower has no residual stage or transformer block of its own to "
                        f"look at; its parts are {', '.join(params)}")
    return tuple(last[key][1] for key in sorted(last))


def forward(module, variables: dict, x: jax.Array, names: tuple[str, ...], *, train: bool):
    """Runs the part "encoder" and keeps what some of its layers put out.

    Args:
        module: the linen module. variables: of the whole model. x: normalised images [B, S, S, 3].
    Returns:
        features [B, D], {name: [B, ...]}, and the tower's new batch_stats ({} where there are none
        or in test mode).
    """
    part = {"params": variables["params"]["encoder"]}
    if variables["batch_stats"].get("encoder"):
        part["batch_stats"] = variables["batch_stats"]["encoder"]

    def wanted(layer, method):
        return method == "__call__" and layer.name in names

    y, updated = module.apply(
        part, x, train=train, capture_intermediates=wanted,
        mutable=["intermediates", *(["batch_stats"] if train else [])])
    kept = updated["intermediates"]
    return y, {name: kept[name]["__call__"][0] for name in names}, updated.get("batch_stats", {})
