import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd.errors import UserError
from jax_cl_bd.models import text

END = 3


def config(**changes):
    return ConfigDict({"name": "transformer", "width": 16, "layers": 1, "heads": 2, "context": 8,
                       "vocab": 20, "end": END, "causal": True, "pool": "end", "mlp_ratio": 4,
                       "act": "quick_gelu", "eps": 1e-5, "dtype": "float32",
                       "tokenizer": ""} | changes)


def tokens(rows=3, length=8, seed=0):
    """Ids 4 ... 19, an end at 2, 5 and 7 (and a second end in the first row)."""
    t = np.random.default_rng(seed).integers(4, 20, (rows, length)).astype(np.int32)
    for row, end in enumerate((2, 5, 7)):
        t[row, end] = END
    t[0, 4] = END
    return t


@functools.cache
def random_params(seed=0, **changes):
    module = text.build(config(**changes))
    shapes = jax.eval_shape(lambda k: module.init(k, tokens(), train=False), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32),
                        shapes["params"])


@functools.partial(jax.jit, static_argnums=0)
def features(module, params, t, length):
    return module.apply({"params": params}, t, train=False, length=length)


def run(params, t, length=None, **changes):
    return np.asarray(features(text.build(config(**changes)), params, t, length))


def norm(x, p, eps=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def numpy_features(p, t, at, *, causal, act):
    """One text [T] through a tower of one block with two heads, feature by feature."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    x = np.stack([p["token_embedding"][i] for i in t]) + p["position_embedding"][:len(t)]
    b = p["block0"]
    y = norm(x, b["ln1"])
    q, k, v = (y @ b["attention"][n]["kernel"] + b["attention"][n]["bias"]
               for n in ("query", "key", "value"))
    out = np.zeros_like(x)
    for head in (slice(0, 8), slice(8, 16)):
        for i in range(len(t)):
            seen = i + 1 if causal else len(t)
            s = np.exp([q[i, head] @ k[j, head] / math.sqrt(8) for j in range(seen)])
            out[i, head] = s / s.sum() @ v[:seen, head]
    x = x + out @ b["attention"]["out"]["kernel"] + b["attention"]["out"]["bias"]
    h = norm(x, b["ln2"]) @ b["mlp"]["fc1"]["kernel"] + b["mlp"]["fc1"]["bias"]
    x = x + act(h) @ b["mlp"]["fc2"]["kernel"] + b["mlp"]["fc2"]["bias"]
    return norm(x, p["ln_final"])[at]


ACTS = {"quick_gelu": lambda h: h / (1 + np.exp(-1.702 * h)),
        "gelu": lambda h: h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2,
        "gelu_tanh": lambda h: h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi)
                                                    * (h + 0.044715 * h**3)))}


@pytest.mark.parametrize("causal, pool, act", [(True, "end", "quick_gelu"), (True, "end", "gelu"),
                                               (False, "last", "gelu_tanh")])
def test_one_block_against_numpy(causal, pool, act):
    t, params = tokens(), random_params()
    got = run(params, t, causal=causal, pool=pool, act=act)
    for row, at in enumerate((2, 5, 7) if pool == "end" else (7, 7, 7)):
        want = numpy_features(params, t[row], at, causal=causal, act=ACTS[act])
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-5)


def test_later_tokens_change_nothing_in_a_causal_tower():
    t, other, params = tokens(), tokens(seed=1), random_params()
    mixed = t.copy()
    for row, end in enumerate((2, 5, 7)):
        mixed[row, end + 1:] = other[row, end + 1:]
    assert (mixed[:2] != t[:2]).any(1).all()
    a, b = run(params, t), run(params, mixed)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    free = {"causal": False, "pool": "end"}
    changed = np.abs(run(params, t, **free) - run(params, mixed, **free)).max(1)
    assert (changed[:2] > 1e-3).all() and changed[2] < 1e-6
    earlier = t.copy()
    earlier[:, 0] = (t[:, 0] - 3) % 16 + 4  # another id that is not the end
    assert (np.abs(run(params, earlier) - a).max(1) > 1e-3).all()


def test_explicit_length_equals_pooling_at_the_end():
    t, params = tokens(), random_params()
    want = run(params, t)
    np.testing.assert_array_equal(run(params, t, length=np.array([3, 6, 8])), want)
    np.testing.assert_array_equal(run(params, t, length=np.array([3, 6, 8]), pool="last"), want)
    assert np.abs(run(params, t, length=np.array([3, 6, 7])) - want)[2].max() > 1e-3
    np.testing.assert_array_equal(run(params, t, pool="last")[2], want[2])


def test_highest_id_equals_the_end_where_that_is_the_highest():
    t = tokens()
    t[t == END] = 19
    t[:, 0] = 4
    t[0, 1], t[1, 1:5], t[2, 1:7] = 5, 6, 7  # no other 19 before the end
    params = random_params()
    np.testing.assert_array_equal(run(params, t, pool="highest"), run(params, t, end=19))
    assert np.abs(run(params, t, pool="highest")[1] - run(params, t, pool="last")[1]).max() > 1e-3


def test_short_texts_use_the_first_positions():
    t, params = tokens(), random_params()
    np.testing.assert_allclose(run(params, t[:1, :4]), run(params, t)[:1], rtol=1e-5, atol=1e-6)


def test_an_id_of_another_vocabulary_is_not_swallowed():
    t = tokens()
    t[1, 0] = 20
    got = run(random_params(), t)
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()


def test_first_values_have_clips_deviations():
    module = text.build(config(width=64, vocab=1000, context=77))
    t = jnp.zeros((1, 77), jnp.int32)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles four times as fast
    params = jax.jit(lambda k: module.init(k, t, train=False)["params"])(key)
    block = params["block0"]
    for array, std in ((params["token_embedding"], 0.02), (params["position_embedding"], 0.01),
                       (block["attention"]["query"]["kernel"], 64**-0.5),
                       (block["attention"]["value"]["kernel"], 64**-0.5),
                       (block["attention"]["out"]["kernel"], 64**-0.5 * 2**-0.5),
                       (block["mlp"]["fc1"]["kernel"], 128**-0.5),
                       (block["mlp"]["fc2"]["kernel"], 64**-0.5 * 2**-0.5)):
        np.testing.assert_allclose(np.std(array), std, rtol=0.05)
        assert np.abs(array).max() > 3 * std  # a normal, not cut at two deviations
    assert not np.any(block["mlp"]["fc1"]["bias"]) and np.all(block["ln1"]["scale"] == 1)


def test_bfloat16_computes_low_and_stores_high():
    module = text.build(config(dtype="bfloat16"))
    shapes = jax.eval_shape(lambda k: module.init(k, tokens(), train=False), jax.random.key(0))
    assert {a.dtype for a in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    params = random_params()
    low, high = run(params, tokens(), dtype="bfloat16"), run(params, tokens())
    assert low.dtype == np.float32
    np.testing.assert_allclose(low, high, rtol=0, atol=0.05 * np.abs(high).max())
    assert np.abs(low - high).max() > 0


@pytest.mark.parametrize("change, told", [
    ({"name": "none"}, "text.name = transformer"), ({"name": "transfomer"}, "'transformer'"),
    ({"heads": 3}, "text.heads = 3.*text.width = 16"), ({"pool": "ends"}, "did you mean 'end'"),
    ({"act": "quickgelu"}, "did you mean 'quick_gelu'"), ({"dtype": "float16"}, "text.dtype"),
    ({"end": 20}, "text.end = 20"), ({"context": 1}, "text.context = 1"),
    ({"layers": 0}, "text.layers = 0"), ({"mlp_ratio": 0}, "text.mlp_ratio = 0")])
def test_wrong_settings(change, told):
    with pytest.raises(UserError, match=told):
        text.build(config(**change))


def test_too_long_a_text():
    with pytest.raises(UserError, match="9 tokens.*text.context = 8"):
        run(random_params(), tokens(length=9))


def test_embeddings_stand_in_for_the_table_and_can_be_differentiated_by():
    params, t = random_params(), tokens()
    module = text.build(config())
    rows = params["token_embedding"][t]

    @jax.jit
    def run_on(e):
        return module.apply({"params": params}, t, train=False, embeddings=e)

    np.testing.assert_array_equal(run_on(rows), run(params, t))
    grad = np.asarray(jax.jit(jax.grad(lambda e: jnp.square(run_on(e)[1]).sum()))(rows))
    reads = np.abs(grad).max(-1)  # the second text ends at 5 and is causal
    assert (reads[1, :6] > 0).all() and not reads[1, 6:].any() and not reads[[0, 2]].any()
