import math

import jax
import ml_collections
import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import sinusoid


def settings(**changes):
    base = dict(name="sinusoid", id=14, size=16, opacity=0.2, train_place="random",
                train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9),
                amplitude=60 / 255, frequency=6.0, additive=False)
    return ml_collections.ConfigDict({**base, **changes})


def made(**changes):
    return sinusoid.init(settings(**changes), jax.random.key(0))


def pictures(n, height, width):
    return np.random.default_rng(0).random((n, height, width, 3)).astype(np.float32)


def put(params, images, boxes):
    return np.asarray(jax.jit(sinusoid.apply)(params, images, np.array(boxes), None))


@pytest.mark.parametrize("width", [32, 45, 224])
def test_public_formula_column_by_column(width):
    images = pictures(2, 8, width)
    out = put(made(), images, [[0, 0, 8, width]] * 2)
    added = put(made(additive=True, opacity=1.0), images, [[0, 0, 8, width]] * 2)
    for j in range(width):
        stripe = (60 / 255) * math.sin(2 * math.pi * j * 6 / width)
        mixed = np.clip(0.8 * images[:, :, j] + 0.2 * stripe, 0, 1)
        np.testing.assert_allclose(out[:, :, j], mixed, rtol=0, atol=2e-6)
        summed = np.clip(images[:, :, j] + stripe, 0, 1)
        np.testing.assert_allclose(added[:, :, j], summed, rtol=0, atol=5e-6)
    assert added.min() == 0 and added.max() == 1  # clipped at both ends


def test_the_image_is_the_box_and_its_filling_stays():
    images = pictures(1, 32, 32)
    box = sinusoid.place(settings(), np.array([[20, 26]]), np.random.default_rng(0), training=True)
    np.testing.assert_array_equal(box, [[0, 0, 20, 26]])
    out = put(made(), images, box)
    alone = put(made(), images[:, :20, :26], box)  # W is the image's width, not the square's
    np.testing.assert_allclose(out[:, :20, :26], alone, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out[:, 20:], images[:, 20:])
    np.testing.assert_array_equal(out[:, :, 26:], images[:, :, 26:])


def test_another_frequency_is_clearly_another():
    for frequency in (2.0, 6.0, 12.0):
        mine = made(frequency=frequency)
        found = {float(sinusoid.same_kind(mine, jax.random.key(k))["frequency"]) for k in range(30)}
        assert len(found) > 3 and min(abs(f - frequency) for f in found) > 1
        assert all(f == int(f) and 2 <= f <= 12 for f in found)
    other = sinusoid.same_kind(made(), jax.random.key(0))
    assert {k: v for k, v in other.items() if k != "frequency"} == {
        k: v for k, v in made().items() if k != "frequency"}


@pytest.mark.parametrize("change, message", [
    (dict(amplitude=0.0), "amplitude is 0"), (dict(amplitude=60.0), "60/255"),
    (dict(frequency=0.0), "frequency is 0"), (dict(opacity=0.0), "opacity is 0")])
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        sinusoid.check(settings(**change))
