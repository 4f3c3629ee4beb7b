"""kNN against brute force and scikit-learn."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from jax_cl_bd.evals import knn


def _problem(n=300, m=101, d=16, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    labels = rng.integers(classes, size=n)
    bank = centres[labels] + 1.5 * rng.normal(size=(n, d))
    queries = centres[rng.integers(classes, size=m)] + 1.5 * rng.normal(size=(m, d))
    return bank.astype(np.float32), labels, queries.astype(np.float32)


def _brute(bank, labels, queries, k, classes, temperature):
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    predicted = []
    for q in queries / np.linalg.norm(queries, axis=1, keepdims=True):
        similarity = bank @ q
        votes = np.zeros(classes)
        for row in np.argsort(-similarity, kind="stable")[:k]:
            votes[labels[row]] += np.exp(similarity[row] / temperature)
        predicted.append(np.argmax(votes))
    return np.array(predicted)


@pytest.mark.parametrize("k,temperature", [(1, 0.1), (20, 0.1), (200, 0.07)])
def test_matches_brute_force(k, temperature):
    bank, labels, queries = _problem()
    ours = knn.classify(queries, bank=bank, labels=labels, k=k, classes=4, temperature=temperature)
    np.testing.assert_array_equal(ours, _brute(bank, labels, queries, k, 4, temperature))


def test_matches_scikit_learn():
    bank, labels, queries = _problem(seed=1)
    reference = KNeighborsClassifier(30, metric="cosine", algorithm="brute",
                                     weights=lambda d: np.exp((1 - d) / 0.1)).fit(bank, labels)
    ours = knn.classify(queries, bank=bank, labels=labels, k=30, classes=4, temperature=0.1)
    np.testing.assert_array_equal(ours, reference.predict(queries))


def test_blocks_do_not_change_the_answer(monkeypatch):
    bank, labels, queries = _problem(seed=2)
    arguments = dict(bank=bank, labels=labels, k=9, classes=4, temperature=0.1)
    whole = knn.classify(queries, **arguments)
    monkeypatch.setattr(knn, "_BLOCK_ELEMENTS", 16 * len(bank))
    np.testing.assert_array_equal(knn.classify(queries, **arguments), whole)


def test_scale_and_small_temperature_are_harmless():
    bank, labels, queries = _problem(seed=3)
    one = knn.classify(queries, bank=bank, labels=labels, k=5, classes=4, temperature=0.01)
    two = knn.classify(1e4 * queries, bank=1e-3 * bank, labels=labels, k=5, classes=4,
                       temperature=0.01)
    np.testing.assert_array_equal(one, two)
    # exp(1 / 1e-3) overflows; the nearest neighbour must decide
    cold = knn.classify(queries, bank=bank, labels=labels, k=5, classes=4, temperature=1e-3)
    np.testing.assert_array_equal(cold, _brute(bank, labels, queries, 1, 4, 1.0))


def test_smallest_class():
    assert knn.smallest_class(np.array([0, 0, 0, 2, 2, 5, 5, 5])) == 2
