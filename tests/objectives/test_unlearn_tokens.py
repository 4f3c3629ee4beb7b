"""Token-level unlearning: who is forgotten, through what, and when it rests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import parts, text
from jax_cl_bd.models.heads import Projection
from jax_cl_bd.objectives import unlearn_tokens
from tests.models.test_text import config as text_config
from tests.objectives.reference import differences, unit
from tests.objectives.test_clip import config, identities

N, FIRST_BAD, D, START, END, PAD = 7, 4, 4, 2, 3, 0
INDEX = np.arange(N, dtype=np.int32)[::-1].copy()  # bad rows first
BAD = INDEX >= FIRST_BAD
LOG_SCALE = np.float32(1.0)


def settings(**fields):
    objective = {**config().objective.to_dict(), "name": "unlearn_tokens", "first_bad": FIRST_BAD,
                 "weight": 0.7, "tokens": 2, "floor": "pairs", "ascend": "tokens",
                 "special": (START, END, PAD), **fields}
    return ConfigDict({"objective": objective, "text": text_config().to_dict()})


MODULES = {"text": text.build(text_config()), "text_projection": Projection(D)}


def functions():
    return {**identities()[0], **parts.make_apply_fns(MODULES)}


@pytest.fixture(scope="module")
def model():
    """A real text tower on images that are handed on as they are."""
    variables = parts.init_variables(MODULES, jax.random.key(0), (2, 2, 3), 8)
    rng = np.random.default_rng(1)
    variables["params"] = jax.tree.map(
        lambda a: rng.normal(0, 0.4, a.shape).astype(np.float32), variables["params"])
    variables["params"]["scale"] = {"logit_scale": LOG_SCALE}
    variables["batch_stats"] = {**identities()[1], **variables["batch_stats"]}
    tokens = rng.integers(4, 20, (N, 8)).astype(np.int32)
    tokens[:, 0], tokens[:, 6], tokens[:, 7] = START, END, PAD
    return functions(), variables, tokens, rng.normal(size=(N, D)).astype(np.float32)


def texts(fns, variables, tokens):
    x, _ = fns["text"](variables, tokens, False)
    return np.asarray(fns["text_projection"](variables, x, False)[0])


def matching(model, toward):
    """Images of which the bad rows lie at their caption (+1) or opposite (-1)."""
    fns, variables, tokens, x = model
    t = unit(texts(fns, variables, tokens))
    return np.float32(np.where(BAD[:, None], toward * t + 0.3 * unit(x), x))


def reference(x, y, rows):
    """CE of chosen rows among themselves, one at a time, and the clean rows; both ways."""
    s = np.exp(np.float64(LOG_SCALE)) * unit(x) @ unit(y).T
    total = 0
    for m in (s, s.T):
        for i in np.flatnonzero(rows):
            among = [j for j in range(N) if not BAD[j] or j == i]
            total += np.log(np.exp(m[i, among]).sum()) - m[i, i]
    return total / 2 / rows.sum()


@functools.cache
def step(items):
    """The jitted loss under some settings: a compile each."""
    cfg, fns = settings(**dict(items)), functions()

    def value_of(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        value, (_, _, metrics) = unlearn_tokens.loss(cfg, variables, {}, batch, fns, None, 0)
        return value, metrics

    return jax.jit(jax.value_and_grad(value_of, has_aux=True))


def run(model, x, index=INDEX, **fields):
    _, variables, tokens, _ = model
    return step(tuple(fields.items()))(variables["params"], variables["batch_stats"],
                                       {"view1": x, "tokens": tokens, "index": index})


def test_value_and_metrics_on_both_sides_of_the_floor(model):
    fns, variables, tokens, _ = model
    y = texts(fns, variables, tokens)
    for toward, ascends in ((1, 1), (-1, 0)):
        x = matching(model, toward)
        s = unit(x) @ unit(y).T
        clean, bad = reference(x, y, ~BAD), reference(x, y, BAD)
        (value, metrics), _ = run(model, x)
        np.testing.assert_allclose(metrics["clip_loss"], clean, rtol=1e-4)
        np.testing.assert_allclose(value, clean - 0.7 * ascends * bad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics["bad_similarity"], np.diag(s)[BAD].mean(), rtol=1e-4)
        np.testing.assert_allclose(metrics["floor"], np.diag(s)[~BAD].mean(), rtol=1e-4)
        assert metrics["ascending"] == ascends
    strangers = s[np.ix_(~BAD, ~BAD)][~np.eye((~BAD).sum(), dtype=bool)].mean()
    (_, metrics), _ = run(model, x, floor="strangers")
    np.testing.assert_allclose(metrics["floor"], strangers, rtol=1e-4)


def test_importance_is_the_length_of_the_gradient(model):
    fns, variables, tokens, x = model
    cfg = settings()
    a = np.asarray(unlearn_tokens.importance(cfg, variables, fns, tokens, unit(x)))
    assert (a[:, [0, 6, 7]] == -1).all() and (a[:, 1:6] > 0).all()
    table = variables["params"]["text"]["token_embedding"]
    module = text.build(cfg.text)

    @jax.jit
    def similarity(e):
        z = module.apply({"params": variables["params"]["text"]}, tokens[:1], train=False,
                         embeddings=e[None])
        z = fns["text_projection"](variables, z, False)[0][0]
        return (unit(x)[0] * z).sum() / jnp.linalg.norm(z)

    grad = differences(lambda e: float(similarity(jnp.float32(e))), table[tokens[0]], eps=1e-2)
    np.testing.assert_allclose(a[0, 1:6], np.linalg.norm(grad, axis=1)[1:6], rtol=0.02)


def test_ascent_moves_the_most_important_tokens_alone(model):
    fns, variables, tokens, _ = model
    x = matching(model, 1)
    a = unlearn_tokens.importance(settings(), variables, fns, tokens, unit(x))
    named = {int(tokens[i, at]) for i in np.flatnonzero(BAD)
             for at in np.argsort(-np.asarray(a[i]))[:2]}
    _, plain = run(model, x, weight=0.0)
    _, both = run(model, x)
    moved = jax.tree.map(lambda p, b: np.asarray(b - p), plain, both)
    rows = np.flatnonzero(np.abs(moved["text"].pop("token_embedding")).max(1) > 1e-7)
    assert set(rows.tolist()) == named and len(named) < len(np.unique(tokens[BAD]))
    assert all(np.abs(m).max() < 1e-6 for m in jax.tree.leaves(moved))
    _, free = run(model, x, ascend="model")
    moved = jax.tree.map(lambda p, b: np.asarray(b - p), plain, free)
    table = np.abs(moved["text"]["token_embedding"]).max(1)
    held = set(np.unique(tokens[BAD]).tolist()) - named - set(np.unique(tokens[~BAD]).tolist())
    assert held and max(table[t] for t in held) < 1e-7 < min(table[t] for t in named)
    assert np.abs(moved["text"]["block0"]["mlp"]["fc1"]["kernel"]).max() > 1e-3
    assert abs(moved["scale"]["logit_scale"]) < 1e-6


@pytest.mark.slow
def test_a_step_of_ascent_lowers_the_bad_similarity(model):
    fns, variables, tokens, _ = model
    x = matching(model, 1)
    (_, before), plain = run(model, x, weight=0.0)
    _, both = run(model, x)
    moves = jax.tree.map(lambda a, b: np.asarray(a - b), plain, both)
    size = 0.3 / max(np.abs(m).max() for m in jax.tree.leaves(moves))
    stepped = {**variables, "params": jax.tree.map(lambda p, m: p + size * m, variables["params"],
                                                   moves)}
    (_, after), _ = run((fns, stepped, tokens, x), x)
    assert after["bad_similarity"] < before["bad_similarity"] - 1e-3


def test_a_batch_without_bad_or_without_clean_rows_is_a_number(model):
    x = matching(model, 1)
    for index, ascends in ((INDEX * 0, 0), (INDEX * 0 + FIRST_BAD, 1)):
        (value, metrics), grads = run(model, x, index=index)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert metrics["ascending"] == ascends


def test_bad_settings_are_refused():
    for fields, says in (({"floor": "zero"}, "floor"), ({"ascend": "all"}, "ascend"),
                         ({"tokens": 0}, "tokens"), ({"weight": -1.0}, "weight"),
                         ({"in_modality": 1.0}, "in_modality")):
        with pytest.raises(UserError, match=says):
            unlearn_tokens.heads(settings(**fields).objective)
