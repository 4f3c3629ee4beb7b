"""The probability that the random crops of one poison form the pair its attack wants.

Both events of an attack are of one kind: a crop lies inside one box, holds a second and touches
no third. For a crop of a given size, placed uniformly, that is a product of interval lengths (or
of integer counts), minus the same product for the crops that do touch the third box; `crop_law`
gives the weights of the sizes.

- noisy_alignment (docs/papers.md, Noisy Alignment): one crop holds the trigger and lies inside the
  shadow part, the other lies inside the reference part. The shadow part lies on top: a reference
  crop that shows a pixel of it does not count, so V1 and V2 never share pixels, and parts that
  overlap only shrink the reference.
- corrupt_encoder (2.2): one crop holds the trigger and shows nothing of the object, the other
  lies inside the object and shows nothing of the trigger; reference_box is the object, and
  shadow_box is only drawn.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.layouts import crop_law

ATTACKS = ("noisy_alignment", "corrupt_encoder")
LAWS = ("random_resized_crop", "same_square")
SLACK = 1e-9  # lengths below this are rounding
TOUCH = 1e-7  # the central crop may stick out of a part by so much; the solver allows itself less


class Layout(NamedTuple):
    """One layout, or many along leading axes. Lengths in one unit, boxes (y, x, h, w)."""

    canvas: jax.Array  # [..., 2] (h, w)
    reference_box: jax.Array  # [..., 4]
    shadow_box: jax.Array  # [..., 4]
    trigger_box: jax.Array  # [..., 4]


class Probabilities(NamedTuple):
    """What `probabilities` returns; floats, or arrays over the layouts' leading axes."""

    pair: jax.Array
    reference: jax.Array  # one crop is a reference crop
    trigger: jax.Array  # one crop is a trigger crop
    fallback: jax.Array  # ten tries fail, the central crop is taken


def probabilities(layout: Layout, *, scale, ratio, crops=2, attack="noisy_alignment",
                  law="random_resized_crop", pixels=None, points=512) -> Probabilities:
    """Computes the pair's probability by quadrature in float64.

    Args:
        layout: `Layout` of numbers or arrays [..., 2 or 4].
        scale, ratio: of RandomResizedCrop; not used by the law "same_square".
        crops: independent crops per image; the pair is unordered: among them at least one is a
            reference crop and one a trigger crop (2 * P_ref * P_trig for two).
        attack: one of ATTACKS.
        law: "random_resized_crop", or "same_square": square crops, all of one side
            s ~ U(0, shorter side of the canvas], CorruptEncoder's model (2.2).
        pixels: None for the continuous law, else pixels per unit: boxes go to whole pixels and
            sizes are rounded as torchvision does.
        points: quadrature nodes per axis.

    Raises:
        UserError: a setting or a box makes no sense.
    """
    check_law(scale=scale, ratio=ratio, crops=crops, attack=attack, law=law, pixels=pixels)
    layout = Layout(*(np.asarray(part, np.float64) for part in layout))
    check_layout(layout)
    with jax.enable_x64(True):
        found = evaluate(layout, np.float64(scale), np.float64(ratio), np.float64(pixels or 0),
                         crops=crops, attack=attack, law=law, whole_pixels=pixels is not None,
                         points=points)
        return Probabilities(*(np.asarray(value) for value in found))


def check_law(*, scale, ratio, crops, attack, law, pixels) -> None:
    """Raises UserError for settings that describe no crop law."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"scale {scale[0]:g} {scale[1]:g}: must be 0 < low <= high <= 1")
    if not 0 < ratio[0] <= ratio[1] < np.inf:
        raise UserError(f"ratio {ratio[0]:g} {ratio[1]:g}: must be 0 < low <= high")
    if crops < 2:
        raise UserError(f"crops {crops}: a pair needs at least 2")
    if pixels is not None and not 1 <= pixels < np.inf:
        raise UserError(f"pixels {pixels:g}: must be at least 1 pixel per unit")
    if attack not in ATTACKS:
        raise unknown("attack", attack, ATTACKS)
    if law not in LAWS:
        raise unknown("crop law", law, LAWS)
    if law == "same_square" and pixels is not None:
        raise UserError("the law same_square is continuous; leave pixels out")


def check_layout(layout: Layout) -> None:
    """Raises UserError if a box is empty or leaves the canvas."""
    if not (layout.canvas > 0).all():
        raise UserError(f"canvas {layout.canvas.tolist()}: both sides must be positive")
    for name in ("reference_box", "shadow_box", "trigger_box"):
        box = getattr(layout, name)
        corner, size = box[..., :2], box[..., 2:]
        inside = (corner >= -SLACK) & (corner + size <= layout.canvas + SLACK) & (size > 0)
        if not inside.all():
            raise UserError(f"{name} {box.tolist()} (y, x, h, w) must be non-empty and inside the "
                            f"canvas {layout.canvas.tolist()}")


@partial(jax.jit, static_argnames=("crops", "attack", "law", "whole_pixels", "points", "touch"))
def evaluate(layout, scale, ratio, pixels, *, crops, attack, law, whole_pixels, points,
             touch=TOUCH):
    """`probabilities` without its checks; jittable and batched, under `jax.enable_x64(True)`."""
    if whole_pixels:
        layout = Layout(*(jnp.round(part * pixels) for part in layout))
    if law == "same_square":
        sizes = square_sizes(layout.canvas, points * points)
    else:
        sizes = crop_law.sizes_quadrature(layout.canvas, scale=scale, ratio=ratio,
                                          whole_pixels=whole_pixels, points=points)
    canvas = jnp.concatenate([jnp.zeros_like(layout.canvas), layout.canvas], axis=-1)
    reference, shadow, trigger = layout[1:]
    if attack == "noisy_alignment":
        events = (dict(inside=reference, avoids=shadow), dict(inside=shadow, holds=trigger))
    else:
        events = (dict(inside=reference, avoids=trigger),
                  dict(inside=canvas, holds=trigger, avoids=reference))
    given_size = [share_of_places(sizes.height, sizes.width, layout.canvas, **event,
                                  whole_pixels=whole_pixels) for event in events]
    p_reference, p_trigger = (
        (share * sizes.weight).sum(axis=(-2, -1))
        + sizes.fallback_rate * box_satisfies(sizes.fallback_box, **event, touch=touch)
        for share, event in zip(given_size, events))
    if law == "same_square":  # all crops share their side, so the pair is averaged over it
        pair = (at_least_one_each(*given_size, crops) * sizes.weight).sum(axis=(-2, -1))
    else:
        pair = at_least_one_each(p_reference, p_trigger, crops)
    return Probabilities(pair, p_reference, p_trigger, sizes.fallback_rate)


def at_least_one_each(first, second, crops: int):
    """P(among `crops` draws each of two disjoint events happens), 2 * first * second for two."""
    if crops == 2:
        return 2 * first * second
    neither = jnp.maximum(1 - first - second, 0)
    return 1 - (1 - first) ** crops - (1 - second) ** crops + neither ** crops


def square_sizes(canvas, points: int) -> crop_law.Crops:
    """Square crops of side U(0, shorter side of the canvas]."""
    side = canvas.min(axis=-1)[..., None, None] * ((jnp.arange(points) + 0.5) / points)
    weight = jnp.full_like(side, 1 / points)
    box = jnp.concatenate([jnp.zeros_like(canvas), canvas], axis=-1)
    return crop_law.Crops(side, side, weight, box, jnp.zeros_like(canvas[..., 0]))


def share_of_places(height, width, canvas, *, inside, holds=None, avoids=None,
                    whole_pixels=False):
    """Share of a crop's places that satisfy the event.

    Args:
        height, width: [..., n, n] and [..., n, 1] crop sizes; canvas: [..., 2].
        inside, holds, avoids: boxes [..., 4]; the crop lies in the first, contains the second
            and shares no pixel with the third.
    """
    good, touching = [], []
    for axis, size in ((0, height), (1, width)):
        room = canvas[..., axis, None, None] - size
        low, high = edges(inside, axis)
        first, last = low, high - size
        if holds is not None:
            held_low, held_high = edges(holds, axis)
            first, last = jnp.maximum(first, held_high - size), jnp.minimum(last, held_low)
        good.append(length(first, last, room, whole_pixels))
        if avoids is not None:
            low, high = edges(avoids, axis)
            gap = 1 if whole_pixels else 0  # crops that only share an edge do not touch
            touching.append(length(jnp.maximum(first, low - size + gap),
                                   jnp.minimum(last, high - gap), room, whole_pixels))
    share = good[0] * good[1]
    return share - touching[0] * touching[1] if touching else share


def edges(box, axis: int):
    """Lower and upper edge of a box, shaped to broadcast over the nodes."""
    low = box[..., axis, None, None]
    return low, low + box[..., axis + 2, None, None]


def length(first, last, room, whole_pixels: bool):
    """Share of the offsets in [0, room] that lie in [first, last]."""
    if whole_pixels:
        return jnp.clip(last - first + 1, 0, None) / jnp.maximum(room + 1, 1)
    # a crop that spans the canvas has one place, with probability 1: 0 / 0 = 1
    free = jnp.maximum(room, SLACK)
    return jnp.clip(last - first + jnp.where(room < SLACK, SLACK, 0), 0, free) / free


def box_satisfies(crop, *, inside, holds=None, avoids=None, touch):
    """The same event for a crop of known place, as 0. or 1.; boxes [..., 4]."""
    good = contains(inside, crop, touch)
    if holds is not None:
        good &= contains(crop, holds, touch)
    if avoids is not None:
        low = jnp.maximum(crop[..., :2], avoids[..., :2])
        high = jnp.minimum(crop[..., :2] + crop[..., 2:], avoids[..., :2] + avoids[..., 2:])
        good &= ((high - low) < touch).any(axis=-1)
    return good.astype(crop.dtype)


def contains(outer, inner, touch):
    """Whether the second box lies in the first, up to `touch`."""
    starts = inner[..., :2] >= outer[..., :2] - touch
    ends = inner[..., :2] + inner[..., 2:] <= outer[..., :2] + outer[..., 2:] + touch
    return (starts & ends).all(axis=-1)
