"""The optimiser against closed forms, and its members against single runs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_cl_bd.triggers import optimize


def square(params, data, batch, key):
    return jnp.sum((params - data - batch) ** 2)


def zeros():
    return itertools.repeat(np.float32(0))


def test_gradient_descent_in_closed_form():
    got, losses = optimize.minimise(square, jnp.array([1.0, 3.0]), zeros(), steps=5,
                                    tx=optax.sgd(0.1), key=jax.random.key(0), data=jnp.ones(2))
    np.testing.assert_allclose(got, [1.0, 1 + 2 * 0.8**5], rtol=1e-6)
    np.testing.assert_allclose(losses, [4 * 0.8 ** (2 * i) for i in range(5)], rtol=1e-5)


def test_projection_holds_after_every_step():
    got, _ = optimize.minimise(square, jnp.array([0.5]), zeros(), steps=9, tx=optax.sgd(0.4),
                               key=jax.random.key(0), data=jnp.array([7.0]),
                               project=lambda p: jnp.clip(p, 0, 1))
    assert got[0] == 1.0


def test_steps_per_dispatch_changes_nothing():
    def noisy(params, data, batch, key):
        return jnp.sum((params - jax.random.normal(key, params.shape)) ** 2) + 0 * batch

    runs = [optimize.minimise(noisy, jnp.zeros(3), zeros(), steps=7, tx=optax.adam(0.1),
                              key=jax.random.key(1), steps_per_dispatch=k) for k in (1, 3)]
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-6)
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-6)


def test_members_do_not_touch_each_other():
    start = jnp.array([[1.0, 3.0], [5.0, -2.0], [0.0, 0.0]])
    data = jnp.ones(2)
    together, losses = optimize.minimise(square, start, zeros(), steps=6, tx=optax.adam(0.2),
                                         key=jax.random.key(0), data=data, members=True)
    assert losses.shape == (6, 3)
    for member, one in zip(together, start):
        alone, _ = optimize.minimise(square, one, zeros(), steps=6, tx=optax.adam(0.2),
                                     key=jax.random.key(0), data=data)
        np.testing.assert_allclose(member, alone, rtol=1e-5)


def test_a_loss_that_is_no_number_stops_with_its_step():
    batches = iter(np.float32([0, 0, np.nan, 0]))
    with pytest.raises(FloatingPointError, match="step 3"):
        optimize.minimise(square, jnp.zeros(1), batches, steps=4, tx=optax.sgd(0.1),
                          key=jax.random.key(0), data=jnp.ones(1))
