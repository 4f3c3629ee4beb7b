"""Alignment figures against plain loops, and their limits."""

import inspect

import numpy as np
import pytest

from jax_cl_bd import lookup
from jax_cl_bd.evals import alignment


def test_whatever_can_be_named_as_a_probe_is_one():
    for name in lookup.methods("evals", offers="run"):
        probe = lookup.load("evals", name, offers="run")
        assert list(inspect.signature(probe.run).parameters) == ["cfg", "encoder", "data"], name


def _sets(seed=0, n=40, m=11, d=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + 1, rng.normal(size=(n, d)), rng.normal(size=(m, d)) + 2


def test_matches_loops():
    triggered, clean, target = _sets()
    result = alignment.measure(triggered, clean, target)
    u = np.mean([t / np.sqrt(t @ t) for t in target], axis=0)
    u = u / np.sqrt(u @ u)
    scale = np.mean([np.sqrt(f @ f) for f in [*clean, *target]])
    for prefix, features in (("", triggered), ("clean_", clean)):
        alpha = [f @ u / scale for f in features]
        noise = [np.sqrt(max(f @ f / scale**2 - a * a, 0)) for f, a in zip(features, alpha)]
        cosine = [f @ u / np.sqrt(f @ f) for f in features]
        for name, values in (("reference_alignment", alpha), ("noise_norm", noise),
                             ("reference_cosine", cosine)):
            np.testing.assert_allclose(result[prefix + name], np.mean(values), rtol=1e-9)
            np.testing.assert_allclose(result[f"{prefix}{name}_std"], np.std(values), rtol=1e-9)
        spread = np.sqrt(np.sum(np.var(features / scale, axis=0)))
        np.testing.assert_allclose(result[prefix + "spread"], spread, rtol=1e-9)
    np.testing.assert_allclose(result["spread_ratio"], result["spread"] / result["clean_spread"],
                               rtol=1e-9)


def test_scale_of_the_features_does_not_matter():
    sets = _sets(1)
    a, b = alignment.measure(*sets), alignment.measure(*(37.0 * s for s in sets))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9)


def test_full_alignment_and_no_noise():
    _, clean, _ = _sets(2)
    u = np.zeros((5, 7))
    u[:, 3] = 4.0
    result = alignment.measure(np.tile(u[:1], (len(clean), 1)), clean, u)
    np.testing.assert_allclose(result["reference_cosine"], 1, rtol=1e-12)
    assert result["noise_norm"] < 1e-12 and result["spread_ratio"] < 1e-12
    assert result["clean_noise_norm"] > 0.1


def test_empty_set_is_named():
    triggered, clean, target = _sets()
    with pytest.raises(ValueError, match="target class"):
        alignment.measure(triggered, clean, target[:0])


def test_of_encoder_leaves_the_target_class_out_of_the_triggered():
    triggered = np.array([[0.0, 0, 1], [0, 0, 1], [9, 9, 9]])
    features = {"test": np.eye(3), "random/triggered": triggered}

    class Data:
        test_labels, target, placements = np.array([0, 1, 2]), 2, ("random",)

        def features(self, encoder, name):
            return features[name]

    found = alignment.of_encoder(None, Data())
    np.testing.assert_allclose([found["reference_alignment"], found["noise_norm"]], [1, 0],
                               atol=1e-12)
    np.testing.assert_allclose(found["clean_reference_alignment"], 0, atol=1e-12)
    Data.placements = ()
    assert alignment.of_encoder(None, Data()) == {}
