"""ABD's adversarial views against NumPy, and its loss against CLIP's with these views given."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import abd, clip
from tests.objectives.reference import differences, unit

MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.25, 0.2, 0.3])
B, SIDE = 3, 2
RNG = np.random.default_rng(0)
MAP = np.float32(RNG.normal(size=(SIDE * SIDE * 3, 5)))


def config(**fields):
    objective = {"name": "abd", "dim": 5, "image_projection": False, "scale_init": 1.0,
                 "in_modality": 0.7, "in_modality_temperature": 0.0, "budget": 0.1, "pgd_steps": 3,
                 "pgd_rate": 0.4, **fields}
    return ConfigDict({"objective": objective,
                       "data": {"mean": tuple(map(float, MEAN)), "std": tuple(map(float, STD))}})


def towers():
    """An image tower that is a map and a bend, and a text tower that passes vectors on."""
    def image(v, x, train):
        return jax.numpy.tanh(x.reshape(len(x), -1) @ v["params"]["encoder"]), {}

    fns = {"encoder": image, "text": lambda v, x, train: (x, {}),
           "text_projection": lambda v, x, train: (x, {}),
           "scale": lambda v, x, train: ((v["params"]["scale"]["logit_scale"], None), {})}
    variables = {"params": {"encoder": MAP, "text": {}, "text_projection": {},
                            "scale": {"logit_scale": np.float32(1.2)}},
                 "batch_stats": {name: {} for name in fns}}
    return fns, variables


def batch():
    pixels = RNG.random((B, SIDE, SIDE, 3))
    pixels[0] = 0.99  # so that a step would leave [0, 1]
    return {"view1": np.float32((pixels - MEAN) / STD),
            "tokens": np.float32(RNG.normal(size=(B, 5))),
            "tokens2": np.float32(RNG.normal(size=(B, 5)))}


def f(pixels):
    return unit(np.tanh(((pixels - MEAN) / STD).reshape(len(pixels), -1) @ np.float64(MAP)))


def test_the_views_are_those_of_numpy():
    cfg, (fns, variables), data = config(), towers(), batch()
    key = jax.random.key(3)
    view, reached = jax.jit(lambda x: abd.adversarial(cfg, variables, x, fns, key))(data["view1"])
    x = np.float64(data["view1"]) * STD + MEAN
    budget, rate = 0.1, 0.4
    d = np.float64(jax.random.uniform(key, x.shape, minval=-budget, maxval=budget))
    d = np.clip(x + d, 0, 1) - x
    for _ in range(3):
        grad = differences(lambda d: -(f(x + d) * f(x)).sum(), d)
        d = np.clip(d + rate * budget * np.sign(grad), -budget, budget)
        d = np.clip(x + d, 0, 1) - x
    got = np.asarray(view) * STD + MEAN
    np.testing.assert_allclose(got, x + d, atol=1e-5)
    np.testing.assert_allclose(reached, (f(x + d) * f(x)).sum(1).mean(), rtol=1e-4)
    assert np.abs(got - x).max() > 0.09 and got.max() <= 1 + 1e-6
    assert float(reached) < 0.999


def test_the_loss_is_clips_with_the_views_given_and_no_gradient_through_them():
    cfg, (fns, variables), data = config(), towers(), batch()
    key = jax.random.key(4)
    view, _ = abd.adversarial(cfg, variables, data["view1"], fns, key)

    def of(module, given):
        return jax.jit(jax.value_and_grad(lambda params: module.loss(
            cfg, {**variables, "params": params}, {}, given, fns, key, 0), has_aux=True))(
                variables["params"])

    (value, (_, _, metrics)), grads = of(abd, data)
    (want, (_, _, others)), wanted = of(clip, {**data, "view2": view})
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, wanted)
    assert metrics["in_modality_loss"] == pytest.approx(float(others["in_modality_loss"]), rel=1e-5)


def test_more_steps_go_farther():
    fns, variables = towers()
    data, key = batch(), jax.random.key(5)
    reached = [float(abd.adversarial(config(pgd_steps=k), variables, data["view1"], fns, key)[1])
               for k in (1, 4)]
    assert reached[1] < reached[0] < 1


def test_bad_settings_are_refused():
    for fields, says in (({"in_modality": 0.0}, "in_modality"), ({"budget": 0.0}, "budget"),
                         ({"budget": 1.5}, "budget"), ({"pgd_steps": 0}, "pgd_steps"),
                         ({"pgd_rate": 0.0}, "pgd_rate")):
        with pytest.raises(UserError, match=says):
            abd.heads(config(**fields).objective)
