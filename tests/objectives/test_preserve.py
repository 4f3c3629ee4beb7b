"""What holds the suspect in the oracle-guided repair, against NumPy in float64."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import preserve
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import config, pairs, reference
from tests.objectives.test_par import LOG_SCALE, towers, variables


def loss(image, text, x, y, untouched, weight=3.0):
    cfg = ConfigDict({"objective": {**config().objective.to_dict(), "name": "preserve",
                                    "preserve": weight, "untouched": untouched}})
    extra = {"suspect": variables(np.zeros(4, np.float32), np.zeros(4, np.float32))}
    batch = {"view1": x, "tokens": y, "index": np.array([5, 0, 9, 2, 11, 12])}
    value, (_, kept, metrics) = preserve.loss(cfg, variables(image, text), extra, batch, towers(),
                                              None, 0)
    assert kept is extra
    return value, metrics


def expected(image, text, x, y, rows, weight=3.0):
    moved = [((unit(x + image) - unit(x)) ** 2).sum(1)[rows].mean() if len(rows) else 0.0,
             ((unit(y + text) - unit(y)) ** 2).sum(1).mean()]
    return reference(x + image, y + text, LOG_SCALE) + weight / 2 * sum(moved), moved


@pytest.mark.parametrize("untouched, rows", [(0, []), (3, [1, 3]), (6, [0, 1, 3]),
                                             (12, [0, 1, 2, 3, 4])])
def test_value_gradient_and_metrics(untouched, rows):
    x, y = pairs(4)
    image, text = (np.float32(v) for v in ([0.3, -0.2, 0.1, 0.4], [1.5, 1.0, -2.0, 0.5]))
    (value, metrics), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        image, text, x, y, untouched)
    want, moved = expected(*(np.float64(v) for v in (image, text, x, y)), rows)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose([metrics["moved_image"], metrics["moved_text"]], moved, rtol=1e-4)
    wide = [np.float64(v) for v in (x, y)]
    for got, ref in zip(grads, (
            differences(lambda v: expected(v, np.float64(text), *wide, rows)[0], image),
            differences(lambda v: expected(np.float64(image), v, *wide, rows)[0], text))):
        np.testing.assert_allclose(got, ref, rtol=2e-3, atol=2e-4 * np.abs(ref).max())


def test_it_needs_a_weight():
    with pytest.raises(UserError, match="preserve = 0"):
        preserve.heads(ConfigDict({**config().objective.to_dict(), "preserve": 0.0}))
