"""Pulling pairs together: value and gradient against NumPy in float64, and no negatives."""

import jax
import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import pull_together
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import config, identities, pairs


def loss(x, y):
    fns, stats = identities()
    variables = {"params": {"scale": {"logit_scale": np.float32(2)}}, "batch_stats": stats}
    value, (_, extra, metrics) = pull_together.loss(
        config(), variables, {}, {"view1": x, "tokens": y}, fns, None, 0)
    assert extra == {}
    return value, metrics


def test_value_and_gradient():
    x, y = pairs(1)
    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, y)

    def want(x, y):
        return 1 - np.mean([a @ b for a, b in zip(unit(x), unit(y))])

    np.testing.assert_allclose(value, want(x, y), rtol=1e-5)
    np.testing.assert_allclose(metrics["similarity"], 1 - want(x, y), rtol=1e-5)
    for got, ref in zip(grads, (differences(lambda v: want(v, y), x),
                                differences(lambda v: want(x, v), y))):
        np.testing.assert_allclose(got, ref, rtol=1e-3, atol=1e-5)


def test_other_rows_do_not_matter():
    x, y = pairs(2)
    grad = jax.grad(lambda x: loss(x, y)[0])
    other = x.copy()
    other[1:] = other[1:][::-1]
    np.testing.assert_allclose(grad(x)[0], grad(other)[0], rtol=1e-6)


def test_an_in_modality_term_is_refused():
    with pytest.raises(UserError, match="in_modality"):
        pull_together.heads(config(in_modality=1.0).objective)
