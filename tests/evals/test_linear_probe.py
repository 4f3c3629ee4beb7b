"""Logistic regression against scikit-learn, and its choice of penalty."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jax_cl_bd.evals import linear_probe


def _problem(n=400, d=12, classes=3, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    x = rng.normal(size=(classes, d))[labels] + noise * rng.normal(size=(n, d))
    return x.astype(np.float32), labels


def _value(x, labels, w, b, penalty):
    z = x.astype(np.float64) @ w + b
    z -= z.max(1, keepdims=True)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]
    return nll.mean() + 0.5 * penalty * np.sum(w.astype(np.float64) ** 2)


@pytest.mark.parametrize("penalty,noise", [(1e-1, 1.0), (1e-3, 1.0), (1e-2, 0.1), (1e-2, 50.0)])
def test_fit_matches_scikit_learn(penalty, noise):
    x, labels = _problem(noise=noise)
    x = (x - x.mean(0)) / x.std(0)
    (w, b), solver = linear_probe.fit(x, labels, np.ones(len(x), bool), penalty=penalty, classes=3)
    model = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=2000)
    model.fit(x.astype(np.float64), labels)
    assert solver["converged"]
    np.testing.assert_allclose(_value(x, labels, w, b, penalty),
                               _value(x, labels, model.coef_.T, model.intercept_, penalty),
                               rtol=1e-4)
    np.testing.assert_allclose(w - w.mean(1, keepdims=True), model.coef_.T, atol=5e-3)
    agree = linear_probe.classify(x, (w, b)) == model.predict(x)
    assert agree.mean() > 0.99


def test_rows_that_are_not_used_have_no_say():
    x, labels = _problem(seed=1)
    used = np.arange(len(x)) % 3 > 0
    whole, _ = linear_probe.fit(x, labels, used, penalty=1e-2, classes=3)
    wrong = np.where(used, labels, (labels + 1) % 3)
    other, _ = linear_probe.fit(x, wrong, used, penalty=1e-2, classes=3)
    np.testing.assert_array_equal(whole[0], other[0])
    cut, _ = linear_probe.fit(x[used], labels[used], np.ones(used.sum(), bool), penalty=1e-2,
                              classes=3)
    np.testing.assert_allclose(whole[0], cut[0], atol=2e-3)


def test_penalty_follows_the_noise():
    x, labels = _problem(n=60, d=40, noise=30.0, seed=2)  # hardly any signal: needs a strong one
    _, noisy = linear_probe.choose_and_fit(x / 30, labels, classes=3)
    x, labels = _problem(n=600, d=12, noise=0.5, seed=2)
    weights, clean = linear_probe.choose_and_fit(x, labels, classes=3)
    assert noisy["penalty"] >= clean["penalty"]
    assert clean["validation_accuracy"] > 0.9
    assert clean["validation_rows"] == pytest.approx(120, abs=3)
    assert np.mean(linear_probe.classify(x, weights) == labels) > 0.95


def test_one_row_per_class_uses_the_default():
    weights, notes = linear_probe.choose_and_fit(np.eye(3, dtype=np.float32), np.arange(3),
                                                 classes=3)
    assert notes["validation_accuracy"] is None and notes["validation_rows"] == 0
    assert linear_probe.classify(np.eye(3), weights).tolist() == [0, 1, 2]


def test_normalisation_is_sahas():
    rng = np.random.default_rng(3)
    train, test = rng.normal(size=(50, 6)), rng.normal(size=(9, 6))
    unit = train / np.sqrt((train**2).sum(1, keepdims=True))
    mean, var = unit.mean(0), ((unit - unit.mean(0)) ** 2).sum(0) / 49
    expected = (test / np.sqrt((test**2).sum(1, keepdims=True)) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(linear_probe.normalise(test, *linear_probe.statistics(train)),
                               expected, rtol=1e-4, atol=1e-5)


def test_dead_features_stay_finite():
    dead = np.zeros((20, 5), np.float32)
    x = linear_probe.normalise(dead, *linear_probe.statistics(dead))
    weights, _ = linear_probe.choose_and_fit(x, np.arange(20) % 2, classes=2)
    assert np.isfinite(weights[0]).all()
