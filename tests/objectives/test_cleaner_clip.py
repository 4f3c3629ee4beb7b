"""TA-Cleaner's alignment and its gradient against plain loops in float64."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import cleaner_clip, clip
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import B, D, config, identities, pairs
from tests.objectives.test_clip import loss as clip_loss

M = 3
# Rows 0 and 2 share a subject, 1, 4 and 5 have their own, 3 names no class.
NOUN = np.int32([[2, 7, 1], [2, 8, 1], [2, 7, 1], [0, 0, 0], [2, 9, 1], [2, 5, 1]])


def settings(**fields):
    return ConfigDict({"objective": {**config().objective.to_dict(), "name": "cleaner_clip",
                                     "align": 0.7, "negatives": M, **fields}})


def embeddings(seed=0):
    rng = np.random.default_rng([seed, 1])
    return rng.normal(size=(B, D)).astype(np.float32), rng.normal(
        size=(B, M, D)).astype(np.float32)


def reference(x, p, n, log_scale, noun=NOUN):
    """One row and one text at a time."""
    s, x, p = np.exp(log_scale), unit(x), unit(p)
    n = unit(np.reshape(n, (-1, n.shape[-1]))).reshape(n.shape)
    total, named = 0.0, [i for i in range(len(x)) if noun[i].any()]
    for i in named:
        own = np.exp(s * x[i] @ p[i])
        against = sum(np.exp(s * x[i] @ n[i, m]) for m in range(n.shape[1]))
        others = sum(np.exp(s * x[j] @ p[i]) for j in range(len(x))
                     if (noun[j] != noun[i]).any())
        total -= 0.5 * (np.log(own / (own + against)) + np.log(own / (own + others)))
    return total / max(1, len(named))


def loss(x, y, p, n, log_scale, cfg, noun=NOUN):
    fns, stats = identities()
    variables = {"params": {"scale": {"logit_scale": log_scale}}, "batch_stats": stats}
    batch = {"view1": x, "tokens": y, "tokens_positive": p, "tokens_noun": noun,
             "tokens_negative": n.reshape(B, -1)}
    value, (_, extra, metrics) = cleaner_clip.loss(cfg, variables, {}, batch, fns, None, 0)
    assert extra == {}
    return value, metrics


def test_value_gradient_and_metrics():
    (x, y), (p, n), t = pairs(3), embeddings(3), np.float32(1.5)
    (value, metrics), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True), static_argnums=5)(
            x, y, p, n, t, Frozen())
    align = reference(x, p, n, t)
    np.testing.assert_allclose(metrics["align_loss"], align, rtol=1e-5)
    plain, _ = clip_loss(x, y, t)
    np.testing.assert_allclose(value, plain + 0.7 * align, rtol=1e-5)
    np.testing.assert_allclose(metrics["aligned"], 5 / 6, rtol=1e-6)
    grad_plain = jax.grad(lambda x: clip_loss(x, y, t)[0])(x)
    for got, want in ((grads[0] - grad_plain, differences(lambda v: reference(v, p, n, t), x)),
                      (grads[1], differences(lambda v: reference(x, v, n, t), p)),
                      (grads[2], differences(lambda v: reference(x, p, v, t), n))):
        want = 0.7 * want
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-4 * np.abs(want).max())
    assert not np.asarray(grads[1])[3].any() and not np.asarray(grads[2])[3].any()


class Frozen:
    """Settings as a static argument."""

    def __getattr__(self, name):
        return getattr(settings(), name)


def test_rows_without_a_class_name_leave_cleanclip():
    (x, y), (p, n), t = pairs(4), embeddings(4), np.float32(1)
    value, metrics = loss(x, y, p, n, t, settings(), noun=np.zeros_like(NOUN))
    plain, _ = clip_loss(x, y, t)
    np.testing.assert_array_equal(value, plain)
    assert metrics["align_loss"] == 0 and metrics["aligned"] == 0
    off, _ = loss(x, y, p, n, t, settings(align=0.0))
    np.testing.assert_array_equal(off, plain)


def test_a_better_positive_and_a_worse_negative_lower_it():
    (x, y), (p, n), t = pairs(5), embeddings(5), np.float32(1)
    start = loss(x, y, p, n, t, settings())[1]["align_loss"]
    assert loss(x, y, p + x, n, t, settings())[1]["align_loss"] < start
    assert loss(x, y, p, n - 3 * x[:, None], t, settings())[1]["align_loss"] < start


def test_bad_settings_are_refused():
    for fields, says in (({"align": -1.0}, "align"), ({"negatives": 0}, "negatives"),
                         ({"in_modality": -1.0}, "in_modality")):
        with pytest.raises(UserError, match=says):
            cleaner_clip.heads(settings(**fields).objective)
    assert list(cleaner_clip.heads(settings().objective)) == list(clip.heads(config().objective))
