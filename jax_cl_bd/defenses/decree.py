"""DECREE: whether an encoder has a backdoor, from the smallest patch that makes all images alike.

Feng et al., "Detecting Backdoors in Pre-trained Encoders", CVPR 2023 (arXiv 2303.15180). A trigger
takes every image of a backdoored encoder to nearly one embedding; a clean encoder needs a large
mask for that. A mask m and a pattern t are inverted on clean images without labels: minimise
-mean cos(F(x'_i), F(x'_j)) + lambda |m|_1 over pairs of different images, x' = (1 - m) x + m t.
PL1 is the smallest |m|_1 with a mean cosine above 0.99, as a share of the image; below `threshold`
the encoder is called backdoored.

As we know the released main.py and utils.py, from a description: tanh variables, |m|_1 summed
over channels, the controller of lambda (1e-3 at first; times 5 after more than 5 steps in a row
that reach the cosine, divided by 5 after more than 5 that do not, within [lambda_min, 1e5]), Adam
(0.5, 0.9) at 0.5. Where we differ: steps are counted, not epochs, and all are made; the rate falls
to 0.1 and 0.05 at `milestones` (shares of the steps; the code: epochs 200 and 500 of 1,000); the
images are the defender's clean ones; lambda stops at lambda_min, where the code goes one division
below; there is no reset to 1e-3 after more than 10 successes down there, since more than 5 of them
have raised lambda above it before. The threshold 0.1 is not from the paper's text; calibrate it on
clean encoders.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from PIL import Image

from jax_cl_bd.data import images
from jax_cl_bd.defenses.outcome import Outcome, whose
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives.embeddings import EXACT, normalise
from jax_cl_bd.triggers import optimize

VERDICT_ONLY = True  # no model comes out
ALIKE = 0.99  # mean cosine from which images count as one
PATIENCE = 5
FACTOR = 5.0
LAMBDA_FIRST, LAMBDA_MOST = 1e-3, 1e5
_EPS = 1e-7
_SHOWN = 8  # times the image's side, in the picture


def check(cfg: ml_collections.ConfigDict, clean: int) -> None:
    """Finds bad settings before anything is compiled; `clean` images are there."""
    d = cfg.defense
    used = min(clean, d.images)
    if not 2 <= d.batch_size <= used:
        raise UserError(f"defense.batch_size={d.batch_size} must be 2 to the {used} clean images "
                        f"that are used (defense.images={d.images} of {clean})")
    if d.steps < 1 or d.lr <= 0:
        raise UserError(f"defense.steps={d.steps} must be at least 1 and lr={d.lr} positive")
    if not 0 < d.lambda_min < LAMBDA_FIRST:
        raise UserError(f"defense.lambda_min={d.lambda_min} must lie in (0, {LAMBDA_FIRST:g})")
    if not 0 < d.threshold < 1:
        raise UserError(f"defense.threshold={d.threshold} must lie in (0, 1), a share of the image")
    if len(d.milestones) != 2 or not 0 < d.milestones[0] < d.milestones[1] <= 1:
        raise UserError(f"defense.milestones={tuple(d.milestones)} must be two ascending shares of "
                        "the steps")


def run(cfg, victims, data, truth, mesh, folder: epath.Path, key: jax.Array) -> Outcome:
    """Inverts a trigger for `victims[0]` on images of `data.clean`; never uses `truth`."""
    del truth, mesh
    d, suspect = cfg.defense, victims[0]
    label = whose(folder)
    start_key, run_key = jax.random.split(key)
    rng = np.random.default_rng([cfg.seed, len(data.clean)])
    rows = rng.permutation(len(data.clean))[:d.images]
    x = images.test_images(data.clean, rows, suspect.image_size)
    side = suspect.image_size
    first = {"mask": _raw(start_key, (side, side, 1)),
             "pattern": _raw(jax.random.fold_in(start_key, 1), (side, side, 3))}
    marks = {round(d.steps * share): rate for share, rate in zip(d.milestones, (0.2, 0.5))}
    tx = optax.adam(optax.piecewise_constant_schedule(d.lr, marks), b1=0.5, b2=0.9)
    found, losses = optimize.minimise(
        _loss(suspect), first, batches(len(x), d.batch_size, rng), steps=d.steps, tx=tx,
        key=run_key, data={"images": x, "variables": variables_of(suspect)},
        control=(_first_state(side), _controller(d.lambda_min)),
        label=f"invert trigger of {label}")
    best = float(found["best"])
    share = best if np.isfinite(best) else None
    folder.mkdir(parents=True, exist_ok=True)
    mask, pattern = np.asarray(found["mask"]), np.asarray(found["pattern"])
    pictures = {}
    if share is not None:
        draw(folder / "inverted.png", mask, pattern)
        pictures = {"inverted.png": "The smallest patch found that makes all images of the encoder "
                                    "alike: its pattern on black, weighed by its mask."}
    verdict = {"backdoored": share is not None and share < d.threshold, "pl1": share,
               "threshold": d.threshold, "steps": len(losses), "images": len(x)}
    return Outcome(verdict, None, {"pictures": pictures})


def _raw(key, shape):
    return jnp.arctanh((jax.random.uniform(key, shape) - 0.5) * (2 - _EPS))


def shown(raw: jax.Array) -> jax.Array:
    """Values in [0, 1] of unbounded ones."""
    return jnp.tanh(raw) / (2 - _EPS) + 0.5


def variables_of(suspect) -> dict:
    """What `embed` takes: of the whole pair, or of an encoder of images alone."""
    return suspect.pair.variables if suspect.pair else suspect.variables


def embed(suspect, variables: dict, x: jax.Array) -> jax.Array:
    """Embeds normalised images [N, S, S, 3], in the shared space if there is one; differentiable.
    The variables are an argument: closed over, they would be constants of the program."""
    if suspect.pair is None:
        return suspect.module.apply(variables, x, train=False)
    return dataclasses.replace(suspect.pair, variables=variables).image_embedding(x)


def _loss(suspect):
    """Gives loss(params, data, batch, key, state) -> value, {"cosine", "share"}."""
    mean, std = np.float32(suspect.mean), np.float32(suspect.std)

    def loss(params, data, batch, key, state):
        mask, pattern = shown(params["mask"]), shown(params["pattern"])
        x = data["images"][batch].astype(jnp.float32) / 255
        patched = (1 - mask) * x + mask * pattern
        z = normalise(embed(suspect, data["variables"], (patched - mean) / std))
        n = len(z)
        gram = jnp.matmul(z, z.T, precision=EXACT)
        cosine = (gram.sum() - jnp.trace(gram)) / (n * (n - 1))
        # The published |m|_1 sums the mask over the three channels.
        value = -cosine + state["lambda"] * 3 * mask.sum()
        return value, {"cosine": cosine, "share": mask.mean()}

    return loss


def _first_state(side):
    return {"lambda": jnp.float32(LAMBDA_FIRST), "up": jnp.int32(0), "down": jnp.int32(0),
            "best": jnp.float32(jnp.inf), "mask": jnp.zeros((side, side, 1)),
            "pattern": jnp.zeros((side, side, 3))}


def _controller(lambda_min: float):
    """Gives update(state, params, info): lambda, and the smallest mask that makes images alike."""
    def update(state, params, info):
        alike = jnp.abs(info["cosine"]) > ALIKE
        better = alike & (info["share"] < state["best"])
        up = jnp.where(alike, state["up"] + 1, 0)
        down = jnp.where(alike, 0, state["down"] + 1)
        raise_, lower = up > PATIENCE, down > PATIENCE
        weight = jnp.where(raise_, jnp.minimum(state["lambda"] * FACTOR, LAMBDA_MOST),
                           jnp.where(lower, jnp.maximum(state["lambda"] / FACTOR, lambda_min),
                                     state["lambda"]))
        return {"lambda": weight, "up": jnp.where(raise_, 0, up),
                "down": jnp.where(lower, 0, down),
                "best": jnp.where(better, info["share"], state["best"]),
                "mask": jnp.where(better, shown(params["mask"]), state["mask"]),
                "pattern": jnp.where(better, shown(params["pattern"]), state["pattern"])}

    return update


def batches(count, size, rng):
    """Yields row numbers, int32 [size], epoch after epoch; what fills no batch is dropped."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start:start + size].astype(np.int32)


def draw(path: epath.Path, mask: np.ndarray, pattern: np.ndarray, times: int = _SHOWN) -> None:
    """Draws a pattern in [0, 1] on black, weighed by its mask, enlarged `times`."""
    shown = np.rint(255 * mask * pattern).astype(np.uint8).repeat(times, 0).repeat(times, 1)
    with path.open("wb") as file:
        Image.fromarray(shown).save(file, "PNG")
