"""Finds the layout that maximises the probability of an attack's pair of crops.

Nothing is assumed about the answer: canvas height and width, both parts' places, the trigger's
place and, if it is free, the shadow's size are searched together over every layout that holds
them. Only the mirror image is fixed (the reference's centre lies in the top left quarter),
because a mirrored layout has the same probability. Three stages: many random layouts on a coarse
quadrature, differential evolution of the best ones, and a pattern search with shrinking steps on
a fine quadrature. The quadrature of a batch of layouts is jitted; choosing the next batch is
NumPy, so that a solve compiles three small functions.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.layouts.pair_probability import SLACK, Layout, check_law, evaluate, probabilities

BATCH = 128  # layouts per call: one shape, so one compile per quadrature
STARTS, GENERATIONS, COARSE = 128 * BATCH, 150, 24  # COARSE, FINE, FINAL: nodes per axis
ROUNDS, FINE, FINAL = 60, 64, 1024
FINE_PIXELS = 112  # rounding to pixels makes the integrand a staircase
FIRST_STEP, LAST_STEP = 0.05, 1e-4  # of the pattern search, in units of the reference's side
SHADOWS = ("equal", "free")


class Solution(NamedTuple):
    """The best layout; its boxes are None if no layout has a positive probability."""

    layout: Layout | None
    pair_probability: float  # unordered
    reference_probability: float
    trigger_probability: float
    error_bound: float | None  # numerical, see `search_error_of`: no global guarantee


class Problem(NamedTuple):
    """What stays fixed during a search, as arrays; the longer reference side is 1."""

    reference: np.ndarray  # [2] (h, w)
    trigger: np.ndarray  # []
    low: np.ndarray  # [D] bounds of the free numbers, see `decode`
    high: np.ndarray
    scale: np.ndarray
    ratio: np.ndarray
    pixels: np.ndarray  # pixels per unit, 0 for the continuous law


def solve(*, scale, ratio, trigger, reference=(1.0, 1.0), canvas=None, shadow="equal", crops=2,
          attack="noisy_alignment", law="random_resized_crop", pixels=None, seed=0) -> Solution:
    """Solves for the layout with the largest pair probability.

    Args:
        scale, ratio: of the victim's RandomResizedCrop.
        trigger: its side; all lengths in one unit (the reference's side if `reference` is 1 1).
        reference: (h, w) of the reference part.
        canvas: (h, w) to keep fixed, or None.
        shadow: "equal" (as large as the reference, the paper's problem) or "free"; the attack
            corrupt_encoder has no shadow part, its shadow_box is what the object leaves.
        crops, attack, law, pixels: as in `pair_probability.probabilities`.

    Returns:
        Solution; of mirrored and transposed optima the one with the reference left or on top,
        wide rather than tall. Its error_bound is the quadrature's error plus the solver's
        tolerance around the layout found, None without a layout. It does not prove that no other
        layout is better.

    Raises:
        UserError: the numbers describe no problem.
    """
    check(scale, ratio, trigger, reference, canvas, shadow, crops, attack, law, pixels)
    unit = float(max(reference))
    free = shadow == "free" and attack == "noisy_alignment"
    problem = make_problem(scale, ratio, trigger / unit, np.asarray(reference) / unit,
                           None if canvas is None else np.asarray(canvas) / unit,
                           (pixels or 0) * unit, free, attack, law)
    static = dict(crops=crops, attack=attack, law=law, free=free, whole_pixels=pixels is not None)

    def value_of(numbers, points):
        return objective(problem, numbers, points, **static)

    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        numbers, found = evolve(problem, *best_starts(problem, value_of, rng), value_of, rng)
        if not found > 0:
            return Solution(None, 0.0, 0.0, 0.0, None)
        points = FINE if pixels is None else FINE_PIXELS
        numbers, found = pattern_search(problem, numbers, value_of, rng, points=points)
        # without a fixed canvas a transposed optimum may be as good for a square reference
        if canvas is None and reference[0] == reference[1] and numbers[0] > numbers[1]:
            numbers = turn(problem, numbers, free=free, crops=crops, attack=attack, law=law)
        numbers = tidy(problem, numbers, found, value_of, points=points)
        value, search_error = search_error_of(problem, numbers, found, value_of, points=points)
        layout = decode(problem, numbers, free, attack)
    layout = finish(layout, unit, attack, pixels)
    best = probabilities(layout, scale=scale, ratio=ratio, crops=crops, attack=attack, law=law,
                         pixels=pixels, points=FINAL)
    return Solution(layout, float(best.pair), float(best.reference), float(best.trigger),
                    abs(float(best.pair) - value) + search_error)


def check(scale, ratio, trigger, reference, canvas, shadow, crops, attack, law, pixels) -> None:
    """Raises UserError with what is wrong and what is allowed."""
    check_law(scale=scale, ratio=ratio, crops=crops, attack=attack, law=law, pixels=pixels)
    if shadow not in SHADOWS:
        raise unknown("shadow", shadow, SHADOWS)
    if not (0 < min(reference) and max(reference) < np.inf):
        raise UserError(f"reference {reference[0]:g} {reference[1]:g}: both sides must be positive")
    if not 0 < trigger <= min(reference):
        raise UserError(f"trigger {trigger:g}: must be positive and at most the reference's "
                        f"shorter side, {min(reference):g}")
    if canvas is not None and not all(side + SLACK >= part and side < np.inf
                                      for side, part in zip(canvas, reference)):
        raise UserError(f"canvas {canvas[0]:g} {canvas[1]:g}: must be at least as large as the "
                        f"reference, {reference[0]:g} {reference[1]:g}")


def make_problem(scale, ratio, trigger, reference, canvas, pixels, free, attack, law) -> Problem:
    """Bounds of the free numbers: canvas h w, reference y x, trigger y x, shadow (see `decode`)."""
    # an accepted crop has at least the area scale[0] * H * W and has to fit into the reference
    share = scale[0] if law == "random_resized_crop" else 0.1
    largest = reference * np.clip(1 / share, 4, 64)
    smallest, largest = (reference, largest) if canvas is None else (canvas, canvas)
    low, high = [*smallest, 0, 0, 0, 0], [*largest, 0.5, 0.5, 1, 1]
    if free:
        low, high = low + [0, 0, 0, 0], high + [*largest, *largest]
    elif attack == "noisy_alignment":
        low, high = low + [0, 0], high + [1, 1]
    return Problem(*(np.asarray(part, np.float64) for part in (
        reference, trigger, low, high, scale, ratio, pixels)))


def decode(problem, numbers, free: bool, attack: str) -> Layout:
    """Turns free numbers [..., D] into layouts.

    Places are shares of the room: 0 first, 0.5 centred, 1 last; the trigger's room is the shadow
    part (the canvas for corrupt_encoder). An equal shadow has a place, a free one has its four
    edges, cut to the canvas and kept as large as the trigger.
    """
    canvas = numbers[..., :2]
    reference = jnp.broadcast_to(problem.reference, canvas.shape)
    trigger = jnp.broadcast_to(problem.trigger, canvas.shape)
    start = numbers[..., 2:4] * (canvas - reference)
    if attack == "corrupt_encoder":
        shadow_start, shadow = jnp.zeros_like(canvas), canvas
    elif free:
        shadow_start = jnp.minimum(numbers[..., 6:8], canvas - trigger)
        end = jnp.clip(numbers[..., 8:10], shadow_start + trigger, canvas)
        shadow = end - shadow_start
    else:
        shadow_start, shadow = numbers[..., 6:8] * (canvas - reference), reference
    trigger_start = shadow_start + numbers[..., 4:6] * (shadow - trigger)
    boxes = ((start, reference), (shadow_start, shadow), (trigger_start, trigger))
    return Layout(canvas, *(jnp.concatenate(box, axis=-1) for box in boxes))


def objective(problem, numbers, points, **static):
    """Pair probability of the layouts of free numbers [N, D], N at most BATCH."""
    padded = np.concatenate([numbers, np.repeat(numbers[:1], BATCH - len(numbers), axis=0)])
    return np.asarray(pair_of(problem, padded, points=points, **static))[:len(numbers)]


@partial(jax.jit, static_argnames=("points", "crops", "attack", "law", "free", "whole_pixels"))
def pair_of(problem, numbers, *, points, crops, attack, law, free, whole_pixels):
    return evaluate(decode(problem, numbers, free, attack), problem.scale, problem.ratio,
                    problem.pixels, crops=crops, attack=attack, law=law,
                    whole_pixels=whole_pixels, points=points, touch=1e-12).pair


def best_starts(problem: Problem, value_of, rng):
    """The BATCH best of STARTS random free numbers; half of the draws lie at a bound or half-way.

    Boxes that touch an edge or are centred are a set of measure zero for a uniform draw, and yet
    often the best.
    """
    shape = (STARTS, problem.low.size)
    share = np.where(rng.random(shape) < 0.5, rng.random(shape), rng.integers(0, 3, shape) / 2)
    starts = problem.low + share * (problem.high - problem.low)
    # canvas sides log-uniform: the ratio of the areas is what counts
    starts[:, :2] = problem.low[:2] * (problem.high[:2] / problem.low[:2]) ** share[:, :2]
    chunks = np.split(starts, STARTS // BATCH)
    values = np.concatenate([value_of(chunk, COARSE) for chunk in chunks])
    best = np.argsort(-values, kind="stable")[:BATCH]
    return starts[best], values[best]


def evolve(problem: Problem, population, values, value_of, rng):
    """Differential evolution (current-to-best/1, binomial crossover), bounds by clipping."""
    for _ in range(GENERATIONS if values.max() > 0 else 0):
        best = population[values.argmax()]
        one, two = population[rng.integers(0, BATCH, (2, BATCH))]
        pull, push = rng.uniform(0.1, 0.9, (2, BATCH, 1))
        child = population + pull * (best - population) + push * (one - two)
        child = np.where(rng.random(child.shape) < 0.2, population, child)
        child = np.clip(child, problem.low, problem.high)
        child_values = value_of(child, COARSE)
        better = child_values > values
        population = np.where(better[:, None], child, population)
        values = np.where(better, child_values, values)
    return population[values.argmax()], values.max()


def pattern_search(problem: Problem, best, value_of, rng, *, points):
    """Tries steps along each axis and in random directions, and shrinks them geometrically."""
    axes = np.concatenate([np.eye(best.size), -np.eye(best.size)])
    value = value_of(best[None], points)[0]
    for size in np.geomspace(FIRST_STEP, last_step(problem), ROUNDS):
        random = rng.normal(size=(BATCH - 2 * len(axes), best.size))
        tries = best + size * np.concatenate([axes, axes / 4, random])
        tries = np.clip(tries, problem.low, problem.high)
        values = value_of(tries, points)
        if values.max() > value:
            best, value = tries[values.argmax()], values.max()
    return best, value


def last_step(problem: Problem) -> float:
    return 1 / problem.pixels if problem.pixels else LAST_STEP


def turn(problem: Problem, numbers, *, free: bool, attack: str, **law):
    """Transposes a tall layout where the wide one is as good.

    The quadrature treats the two axes differently: for a large trigger its few accepted crops cost
    it 1 % at 64 nodes. As good is therefore: within 1e-4 plus the errors of both values, each
    estimated as the change from FINAL / 4 nodes to FINAL.
    """
    turned = numbers.reshape(-1, 2)[:, ::-1].ravel()
    (rough_tall, tall), (rough_wide, wide) = (
        [float(probabilities(decode(problem, way, free, attack), scale=problem.scale,
                             ratio=problem.ratio, attack=attack, points=points,
                             pixels=float(problem.pixels) or None, **law).pair)
         for points in (FINAL // 4, FINAL)] for way in (numbers, turned))
    slack = 1e-4 * tall + abs(tall - rough_tall) + abs(wide - rough_wide)
    return turned if wide >= tall - slack else numbers


def tidy(problem: Problem, numbers, found: float, value_of, *, points):
    """Takes rounder numbers where they are as good.

    As good is: within 1e-4 of the probability found (2e-3 on whole pixels, where the quadrature
    is that rough), all changes together.
    """
    share = 1 - (2e-3 if problem.pixels else 1e-4)
    value = value_of(numbers[None], points)[0]
    # a layout that was turned may lie below `found` by the quadrature's error
    enough = share * (found if value >= share * found else value)
    for i in reversed(range(numbers.size)):
        tries = np.tile(numbers, (5, 1))
        rounded = [np.round(numbers[i] / unit) * unit for unit in (0.5, 0.01, 0.001)]
        tries[:4, i] = [rounded[0], 0.5, *rounded[1:]]
        tries = np.clip(tries, problem.low, problem.high)
        good = value_of(tries, points) >= enough
        good[-1] = True
        numbers = tries[good.argmax()]
    return numbers


def search_error_of(problem: Problem, numbers, found: float, value_of, *, points):
    """The value at `points`, and what the search may have left.

    That is what `tidy` gave up, plus the largest change of the probability when one free number
    moves by the last step of the pattern search (with whole pixels the largest gain by one pixel:
    there is nothing in between). `solve` adds the quadrature's error, the difference between this
    grid and the FINAL one. It is an estimate: a better layout far from every start stays unseen.
    """
    step = last_step(problem)
    axes = np.concatenate([np.eye(numbers.size), -np.eye(numbers.size)])
    moves = np.concatenate([0 * axes[:1], step * axes, step / 2 * axes])
    value, *near = value_of(np.clip(numbers + moves, problem.low, problem.high), points)
    whole, halves = np.subtract(near, value).reshape(2, -1)
    # an optimum may lie at a jump, where the central crop leaves a part: twice the difference
    # between step and half step is the change without the jump
    change = whole.clip(0) if problem.pixels else 2 * abs(whole - halves)
    return float(value), float(max(found - value, 0) + change.max())


def finish(layout: Layout, unit: float, attack: str, pixels) -> Layout:
    """Back to the caller's unit, on whole pixels if asked; fills in corrupt_encoder's remainder."""
    layout = Layout(*(np.asarray(part) * unit for part in layout))
    if pixels is not None:
        layout = Layout(*(np.round(part * pixels) / pixels for part in layout))
    # drop the last bits that scaling left, so that 0.37500000000000006 prints as 0.375
    layout = Layout(*(np.round(part, 9) for part in layout))
    if attack == "corrupt_encoder":
        layout = layout._replace(shadow_box=remainder(layout))
    return layout


def remainder(layout: Layout) -> np.ndarray:
    """The largest box of the canvas beside the object that holds the trigger's centre."""
    (height, width), (y, x, h, w) = layout.canvas, layout.reference_box
    ty, tx = layout.trigger_box[:2] + layout.trigger_box[2:] / 2
    sides = ([0, x + w, height, width - x - w], [0, 0, height, x],
             [y + h, 0, height - y - h, width], [0, 0, y, width])
    holding = [s for s in sides if s[0] <= ty <= s[0] + s[2] and s[1] <= tx <= s[1] + s[3]]
    return np.asarray(max(holding, key=lambda s: s[2] * s[3]), np.float64)
