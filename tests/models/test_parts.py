import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jax_cl_bd.models import parts
from jax_cl_bd.models.heads import MLP
from jax_cl_bd.objectives.embeddings import interleave, normalise


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x.reshape(len(x), -1))
        return MLP(hidden=(), out=4, out_norm=True)(x, train)


def modules():
    return {"encoder": Flat(), "projector": MLP(hidden=(), out=2)}


def test_parts_are_chained_and_all_named():
    variables = parts.init_variables(modules(), jax.random.key(0), (2, 2, 3))
    assert set(variables["params"]) == set(variables["batch_stats"]) == {"encoder", "projector"}
    assert variables["batch_stats"]["projector"] == {}
    assert variables["params"]["projector"]["linear1"]["kernel"].shape == (4, 2)
    more = parts.init_variables({**modules(), "predictor": MLP(hidden=(), out=2)},
                                jax.random.key(0), (2, 2, 3))
    for name in ("encoder", "projector"):  # a further head changes no earlier part
        jax.tree.map(np.testing.assert_array_equal, more["params"][name],
                     variables["params"][name])


def test_apply_and_forward():
    both = modules()
    variables = parts.init_variables(both, jax.random.key(0), (2, 2, 3))
    fns = parts.make_apply_fns(both)
    x = jax.random.normal(jax.random.key(1), (6, 2, 2, 3))
    h, new = fns["encoder"](variables, x, False)
    assert new == {}
    h, new = fns["encoder"](variables, x, True)
    np.testing.assert_allclose(h.mean(0), 0, atol=1e-6)
    y, after = parts.forward(fns, variables, ("encoder", "projector"), x)
    np.testing.assert_allclose(y, fns["projector"](variables, h, True)[0], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"]["encoder"], new)
    assert jax.tree.structure(after) == jax.tree.structure(variables)
    _, twice = parts.forward(fns, after, ("encoder",), x)
    first, second = (v["batch_stats"]["encoder"]["MLP_0"]["bn1"]["mean"] for v in (after, twice))
    # The second pass builds on the statistics of the first.
    np.testing.assert_allclose(second, 1.9 * first, rtol=1e-5)


def test_copies_are_other_buffers():
    def init(x):
        return {"a": x}, parts.copied({"a": x})

    first, second = jax.jit(init)(jnp.arange(8.0))
    assert first["a"].unsafe_buffer_pointer() != second["a"].unsafe_buffer_pointer()
    jax.jit(lambda *s: jax.tree.map(lambda a: a + 1, s), donate_argnums=(0, 1))(first, second)


def test_interleave_and_normalise():
    a, b = np.zeros((3, 2)), np.ones((3, 2))
    np.testing.assert_array_equal(interleave(a, b)[:, 0], [0, 1, 0, 1, 0, 1])
    z = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalise(z), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda z: normalise(z).sum())(z)).all()
