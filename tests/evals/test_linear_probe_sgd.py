"""The paper's SGD probe: protocol against a NumPy loop, determinism, accuracy."""

import jax
import numpy as np
import pytest

from jax_cl_bd.evals import linear_probe_sgd
from jax_cl_bd.evals.linear_probe import classify


def _problem(n, seed=0, d=6, classes=3, noise=0.7):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    x = rng.normal(size=(classes, d))[labels] + noise * rng.normal(size=(n, d))
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), labels


def _numpy_sgd(x, labels, classes):
    # One batch per epoch or more, in the order that the key gives; everything else by hand.
    n, d = x.shape
    key = jax.random.key(0)
    bound = 1 / np.sqrt(d)
    w = np.array(jax.random.uniform(jax.random.fold_in(key, 40), (d, classes), minval=-bound,
                                    maxval=bound), np.float64)
    b = np.array(jax.random.uniform(jax.random.fold_in(key, 41), (classes,), minval=-bound,
                                    maxval=bound), np.float64)
    mw, mb = np.zeros_like(w), np.zeros_like(b)
    for epoch in range(40):
        rate = 0.01 * (0.1 if epoch >= 15 else 1) * (0.1 if epoch >= 30 else 1)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), n))
        for start in range(0, n, 256):
            rows = order[start:start + 256]
            z = x[rows] @ w + b
            p = np.exp(z - z.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(rows)), labels[rows]] -= 1
            gw, gb = x[rows].T @ p / len(rows) + 1e-4 * w, p.mean(0) + 1e-4 * b
            mw, mb = 0.9 * mw + gw, 0.9 * mb + gb
            w, b = w - rate * mw, b - rate * mb
    return w, b


@pytest.mark.parametrize("n", [100, 300])  # less than one batch; one full and one partial batch
def test_matches_numpy(n):
    x, labels = _problem(n)
    w, b = linear_probe_sgd.fit(x, labels, classes=3)
    reference = _numpy_sgd(x, labels, 3)
    np.testing.assert_allclose(w, reference[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(b, reference[1], rtol=1e-3, atol=1e-4)


def test_deterministic_and_accurate():
    x, labels = _problem(2000, seed=1, noise=0.3)
    one, two = (linear_probe_sgd.fit(x, labels, classes=3) for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])
    assert np.mean(classify(x, one) == labels) > 0.95
