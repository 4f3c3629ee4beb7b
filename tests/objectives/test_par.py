"""PAR's loss and gradient against NumPy in float64, on both sides of tau."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import par
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import config, pairs, reference

NAMES = ("encoder", "image_projection", "text", "text_projection")
LOG_SCALE = 2.0


def towers():
    """Each tower adds its one parameter, so that suspect and student differ by it."""
    def shifted(name):
        return lambda v, x, train: (x + v["params"][name], {})

    fns = {name: shifted(name) for name in NAMES}
    fns["scale"] = lambda v, x, train: ((v["params"]["scale"]["logit_scale"], None), {})
    return fns


def variables(image, text):
    params = {name: np.float32(0) for name in NAMES} | {"encoder": image, "text": text}
    return {"params": params | {"scale": {"logit_scale": np.float32(LOG_SCALE)}},
            "batch_stats": {name: {} for name in (*NAMES, "scale")}}


def loss(image, text, x, y, tau):
    cfg = ConfigDict({"objective": {**config().objective.to_dict(), "name": "par", "tau": tau}})
    extra = {"suspect": variables(np.zeros(4, np.float32), np.zeros(4, np.float32))}
    value, (_, kept, metrics) = par.loss(cfg, variables(image, text), extra,
                                         {"view1": x, "tokens": y}, towers(), None, 0)
    assert kept is extra
    return value, metrics


def expected(image, text, x, y, tau):
    moved = [((unit(x + image) - unit(x)) ** 2).sum(1).mean(),
             ((unit(y + text) - unit(y)) ** 2).sum(1).mean()]
    return (reference(x + image, y + text, LOG_SCALE)
            - 0.5 * sum(s for s in moved if s <= tau)), moved


@pytest.mark.parametrize("tau", [0.01, 0.4, 3.9])
def test_value_gradient_and_metrics(tau):
    x, y = pairs(4)
    image, text = (np.float32(v) for v in ([0.3, -0.2, 0.1, 0.4], [1.5, 1.0, -2.0, 0.5]))
    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        image, text, x, y, tau)
    want, moved = expected(*(np.float64(v) for v in (image, text, x, y)), tau)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose([metrics["moved_image"], metrics["moved_text"]], moved, rtol=1e-4)
    assert {0.01: 0, 0.4: 1, 3.9: 2}[tau] == sum(s <= tau for s in moved)
    wide = [np.float64(v) for v in (x, y)]
    for got, ref in zip(grads, (
            differences(lambda v: expected(v, np.float64(text), *wide, tau)[0], image),
            differences(lambda v: expected(np.float64(image), v, *wide, tau)[0], text))):
        np.testing.assert_allclose(got, ref, rtol=2e-3, atol=2e-4 * np.abs(ref).max())


def test_the_suspect_is_a_copy():
    start = {"params": {"a": np.ones(2)}}
    extra = par.init_extra(None, start, None)
    assert extra["suspect"]["params"]["a"] is not start["params"]["a"]
    np.testing.assert_array_equal(extra["suspect"]["params"]["a"], 1)


def test_bad_settings_are_refused():
    for fields, says in (({"tau": 0.0}, "tau"), ({"tau": 5.0}, "tau"),
                         ({"tau": 2.0, "in_modality": 1.0}, "in_modality")):
        with pytest.raises(UserError, match=says):
            par.heads(ConfigDict({**config().objective.to_dict(), **fields}))
