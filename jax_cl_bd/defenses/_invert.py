"""InverTune's first two steps: the label that a suspect is drawn to, and the trigger that draws it.

Sun et al., arXiv 2506.12411, and its code (TargetLabel.py, models/inversion.py, config.yaml); what
differs is at the top of invertune.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_cl_bd.defenses import decree
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives.embeddings import EXACT, cosine, normalise
from jax_cl_bd.objectives.invertune import length, triggered
from jax_cl_bd.triggers import optimize
from jax_cl_bd.triggers.ssim import ssim

_TEMPERATURE = 0.07  # of the inversion's cross-entropy
_LEAST = 0.001  # share of the clean predictions from which a relative rise counts


def check(probe, invert) -> None:
    """Finds bad settings of both steps. Raises UserError."""
    for name, group in (("probe", probe), ("invert", invert)):
        if group.steps < 1 or group.batch_size < 1 or group.lr <= 0:
            raise UserError(f"defense.{name}.steps={group.steps} and batch_size={group.batch_size} "
                            f"must be at least 1, lr={group.lr} positive")
    if not 0 < probe.share < 1 or not 0 <= probe.margin < 1:
        raise UserError(f"defense.probe.share={probe.share} must lie in (0, 1), a share of the "
                        f"image, and margin={probe.margin} in [0, 1), a share of its side")
    weights = {name: invert[name] for name in ("class_weight", "embedding_weight", "ssim_weight",
                                               "mask_weight")}
    if min(weights.values()) < 0 or weights["class_weight"] == 0:
        raise UserError(f"defense.invert has weights {weights}; none may be negative, and "
                        "class_weight must be above 0")


def corner(probe, side: int) -> tuple[int, int]:
    """(first row and column, side) of the probe in pixels, near the lower right corner.

    Raises:
        UserError: it has no pixel, or does not fit.
    """
    size = int(probe.share**0.5 * side)
    first = side - round(probe.margin * side) - size
    if size < 1 or first < 0:
        raise UserError(f"defense.probe.share={probe.share} and margin={probe.margin} leave no "
                        f"patch of at least a pixel inside images of {side} px")
    return first, size


def make_probe(probe, model, x: np.ndarray, key: jax.Array, rng, label: str) -> np.ndarray:
    """A universal adversarial patch, float32 [s, s, 3] in [0, 1]: under it the images uint8
    [N, S, S, 3] are as far as possible from themselves in the model's embedding."""
    first, size = corner(probe, model.image_size)
    mean, std = np.float32(model.mean), np.float32(model.std)
    variables = decree.variables_of(model)
    clean = model.image(x) if model.pair is None else model.project(model.image(x))
    start_key, run_key = jax.random.split(key)

    def loss(patch, data, batch, key):
        chosen = data["images"][batch].astype(jnp.float32) / 255
        shown = chosen.at[:, first:first + size, first:first + size].set(patch)
        z = decree.embed(model, data["variables"], (shown - mean) / std)
        return cosine(z, data["clean"][batch]).mean()

    patch, _ = optimize.minimise(
        loss, jax.random.uniform(start_key, (size, size, 3)),
        decree.batches(len(x), min(probe.batch_size, len(x)), rng), steps=probe.steps,
        tx=optax.adam(probe.lr), key=run_key, project=lambda p: jnp.clip(p, 0.0, 1.0),
        data={"images": x, "clean": clean, "variables": variables}, label=label)
    return np.asarray(patch)


def probed(probe, x: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """The images uint8 [N, S, S, 3] under the probe, in 8 bits."""
    first, size = corner(probe, x.shape[1])
    out = x.copy()
    out[:, first:first + size, first:first + size] = np.rint(255 * patch)
    return out


def rises(before: np.ndarray, after: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """By how much the share of each class among the predictions [N] rises, and that as a share of
    what it was; -inf for the latter where at most 0.1 % were of the class."""
    was, now = (np.bincount(p, minlength=classes) / len(p) for p in (before, after))
    known = was > _LEAST
    relative = np.where(known, (now - was) / np.where(known, was, 1), -np.inf)
    return now - was, relative


def make_trigger(invert, suspect, x: np.ndarray, targets: np.ndarray, head: np.ndarray,
                 target: int, key: jax.Array, rng, label: str) -> dict[str, np.ndarray]:
    """Inverts a trigger {"mask", "pattern"}: float32 [S, S, 3], both; the mask in [0, 1], the
    pattern in normalised units.

    Args:
        x: uint8 [N, S, S, 3], clean images of other classes. targets: [M, E], unit embeddings of
            clean images of the target. head: unit class embeddings [C, E].
    """
    side, batch = suspect.image_size, min(invert.batch_size, len(x))
    low, high = ((np.float32(v) - np.float32(suspect.mean)) / np.float32(suspect.std)
                 for v in (0, 1))
    start_key, run_key = jax.random.split(key)
    first = {"mask": jnp.ones((side, side, 3)),
             "pattern": jax.random.uniform(start_key, (side, side, 3))}
    data = {"images": x, "variables": suspect.pair.variables, "head": np.float32(head),
            "targets": np.resize(targets, (batch, targets.shape[1]))}  # one batch, for all steps
    found, _ = optimize.minimise(
        inversion_loss(invert, suspect, target), first, decree.batches(len(x), batch, rng),
        steps=invert.steps, tx=optax.adam(invert.lr), key=run_key, data=data, label=label,
        project=lambda p: {"mask": jnp.clip(p["mask"], 0.0, 1.0),
                           "pattern": jnp.clip(p["pattern"], low, high)})
    return {name: np.asarray(value) for name, value in found.items()}


def inversion_loss(invert, suspect, target: int):
    """Gives loss(trigger, data, batch, key):

    class_weight CE(f(x') W^T / 0.07, target) + embedding_weight |f(x') - f(x_target)|_2
    + ssim_weight (1 - SSIM(x', x)) + mask_weight |m|_1,

    the second norm over the whole batch, the last over all pixels and channels, SSIM of normalised
    images with a data range of 1, all as in the code.
    """
    mean, std = np.float32(suspect.mean), np.float32(suspect.std)

    def loss(trigger, data, batch, key):
        x = (data["images"][batch].astype(jnp.float32) / 255 - mean) / std
        shown = triggered(trigger, x)
        z = normalise(decree.embed(suspect, data["variables"], shown))
        logits = jnp.matmul(z, data["head"].T, precision=EXACT) / _TEMPERATURE
        labels = jnp.full(len(z), target)
        return (invert.class_weight
                * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                + invert.embedding_weight * length(z - data["targets"])
                + invert.ssim_weight * (1 - ssim(shown, x))
                + invert.mask_weight * jnp.abs(trigger["mask"]).sum())

    return loss


def stamped(suspect, x: np.ndarray, trigger: dict) -> np.ndarray:
    """The images uint8 [N, S, S, 3] under an inverted trigger, in 8 bits."""
    shown = triggered({"mask": trigger["mask"], "pattern": pixels(suspect, trigger)},
                      x.astype(np.float32) / 255)
    return np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)


def pixels(suspect, trigger: dict) -> np.ndarray:
    """The pattern of a trigger in [0, 1]."""
    shown = trigger["pattern"] * np.float32(suspect.std) + np.float32(suspect.mean)
    return np.clip(shown, 0, 1)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(y, x, height, width) around the pixels whose mask [S, S, 3] is above one half in a channel;
    None if there is no such pixel."""
    seen = mask.max(2) > 0.5
    if not seen.any():
        return None
    (top, bottom), (left, right) = ((int(i.min()), int(i.max()) + 1) for i in np.nonzero(seen))
    return top, left, bottom - top, right - left
