"""Speed of the crop sampler, accuracy of quadrature and solver against an adaptive integral."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_cl_bd.errors import no_program
from jax_cl_bd.layouts import crop_law
from jax_cl_bd.layouts.pair_probability import Layout, probabilities
from jax_cl_bd.layouts.solve import solve

RATIO = (3 / 4, 4 / 3)


def run(crops: int = 65536, repeats: int = 5) -> dict:
    """Measures on the default device; the dict holds plain floats.

    Errors are absolute differences of probabilities to `exact_pair` for scale (0.2, 1) and a
    trigger of 0.25, or lengths in units of the reference's side.
    """
    exact_reference, exact_trigger = exact_pair(scale=(0.2, 1.0), ratio=RATIO, trigger=0.25)
    paper = Layout((1.0, 2.0), (0, 0, 1, 1), (0, 1, 1, 1), (0.375, 1.375, 0.25, 0.25))
    found = probabilities(paper, scale=(0.2, 1.0), ratio=RATIO)
    start = time.perf_counter()
    best = solve(scale=(0.2, 1.0), ratio=RATIO, trigger=0.25)
    seconds = time.perf_counter() - start
    center = best.layout.trigger_box[:2] + best.layout.trigger_box[2:] / 2
    measured = {
        "crop_samples_per_second": samples_per_second(crops, repeats),
        "exact_pair_probability": 2 * exact_reference * exact_trigger,
        "quadrature_error_reference": abs(float(found.reference) - exact_reference),
        "quadrature_error_trigger": abs(float(found.trigger) - exact_trigger),
        "quadrature_error_pair": abs(float(found.pair) - 2 * exact_reference * exact_trigger),
        "solver_error_pair": abs(best.pair_probability - 2 * exact_reference * exact_trigger),
        "solver_error_bound": best.error_bound,
        "solver_error_canvas": abs(best.layout.canvas - [1.0, 2.0]).max(),
        "solver_error_trigger_center": abs(center - [0.5, 1.5]).max(),
        "solver_seconds_with_compile": seconds,
    }
    return {name: float(value) for name, value in measured.items()}


def samples_per_second(crops: int, repeats: int) -> float:
    """Crop boxes per second of the jitted sampler, the fastest of `repeats` calls."""
    draw = jax.jit(lambda keys, sizes: crop_law.sample(keys, sizes, scale=(0.2, 1.0), ratio=RATIO))
    keys = jax.random.split(jax.random.key(0), crops)
    sizes = jnp.tile(jnp.array([[32.0, 64.0]]), (crops, 1))
    draw(keys, sizes).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        draw(keys, sizes).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return crops / min(seconds)


def exact_pair(*, scale, ratio, trigger: float) -> tuple[float, float]:
    """P_ref and P_trig of the 2 x 1 canvas with a centred trigger, by adaptive integration.

    The closed forms of Noisy Alignment's layout, integrated over (u, ln r) with SciPy between
    the integrand's kinks: it shares no code with the quadrature.
    """
    from scipy.integrate import quad

    t = trigger

    def reference(w, h):
        return max(1 - w, 0) / (2 - w)

    def triggered(w, h):
        vertical = max(min(h - t, 1 - h), 0) / (1 - h) if h < 1 else 1.0
        return max(min(w - t, 1 - w), 0) / (2 - w) * vertical

    def over_area(event, log_ratio):
        r = np.exp(log_ratio)
        top = min(scale[1], 2 / r, r / 2)  # beyond it w > 2 or h > 1: rejected
        kinks = [v * v / (2 * r) for v in (t, (1 + t) / 2, 1)]
        kinks += [v * v * r / 2 for v in (t, (1 + t) / 2)]
        edges = sorted([scale[0], *(k for k in kinks if scale[0] < k < top), max(top, scale[0])])
        value = sum(quad(lambda u: event(np.sqrt(2 * u * r), np.sqrt(2 * u / r)), low, high,
                         epsabs=1e-10)[0] for low, high in zip(edges, edges[1:]))
        return value / (scale[1] - scale[0])

    def expected(event):
        low, high = np.log(ratio[0]), np.log(ratio[1])
        return quad(lambda x: over_area(event, x), low, high, epsabs=1e-8)[0] / (high - low)

    accepted = expected(lambda w, h: 1.0)
    share = (1 - (1 - accepted) ** 10) / accepted
    return share * expected(reference), share * expected(triggered)


if __name__ == "__main__":
    no_program("jax_cl_bd.bench layout")
