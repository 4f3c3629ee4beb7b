"""The SigLIP loss on a ring: equal to the whole matrix and to NumPy, in the memory of a block."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_cl_bd import parallel
from jax_cl_bd.errors import UserError
from jax_cl_bd.objectives import ring, siglip

ALL = (0, 1, 2, 3)
MESHES = [(8, 1), (4, 2), (3, 1), (1, 1)]


def mesh_of(shape):
    count = shape[0] * shape[1]
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                         devices=jax.devices()[:count])


def inputs(n, d=6, seed=0, scale=7.0, bias=-3.0):
    rng = np.random.default_rng(seed)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in rng.normal(size=(2, n, d)))
    return tuple(np.asarray(a, np.float32) for a in (x, y, scale, bias))


def put(mesh, args):
    if mesh is None:
        return args
    return (*parallel.put_rows(mesh, args[:2]), *parallel.put_replicated(mesh, args[2:]))


def run(form, args, mesh=None):
    """Value, accuracy and all four gradients of a form of the loss."""
    step = jax.jit(jax.value_and_grad(form, argnums=ALL, has_aux=True))
    if mesh is None:
        return step(*args)
    with jax.set_mesh(mesh):
        return step(*put(mesh, args))


def by_hand(x, y, scale, bias):
    """Loss, accuracy and analytic gradients in float64."""
    x, y, scale, bias = (np.asarray(a, np.float64) for a in (x, y, scale, bias))
    n = len(x)
    dots = x @ y.T
    z = 2 * np.eye(n) - 1
    m = z * (scale * dots + bias)
    slope = -z / (1 + np.exp(m)) / n
    return ((np.log1p(np.exp(-m)).sum() / n, (dots.argmax(1) == np.arange(n)).mean()),
            (scale * slope @ y, scale * slope.T @ x, (slope * dots).sum(), slope.sum()))


def near(got, want, rtol=1e-5):
    """Errors are measured against the largest entry of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= rtol * np.abs(b).max()


@pytest.mark.parametrize("shape", [None, *MESHES])
def test_equals_numpy_and_the_whole_matrix(shape):
    args = inputs(24)
    mesh = shape and mesh_of(shape)
    got = run(ring.sigmoid_loss, args, mesh)
    near(got, by_hand(*args))
    near(got, run(siglip.full, args))
    assert 0 < float(got[0][1]) < 1  # an accuracy that says something
    if shape and shape[0] * shape[1] == 8:
        for grad in got[1][:2]:  # rows stay where they are
            assert grad.sharding.shard_shape(grad.shape)[0] == 3


@pytest.mark.parametrize("n", [8, 24, 40])  # blocks of 1, 3 and 5 rows: no eight equal parts
def test_small_blocks(n):
    args = inputs(n, seed=1)
    near(run(ring.sigmoid_loss, args, mesh_of((8, 1))), by_hand(*args))


def test_far_from_zero_nothing_overflows():
    args = inputs(16, scale=300.0, bias=50.0)
    got = run(ring.sigmoid_loss, args, mesh_of((8, 1)))
    assert float(got[0][0]) > 100
    near(got, by_hand(*args))


def test_of_equal_logits_the_first_counts():
    eye = np.eye(4, dtype=np.float32)
    y = eye[[0, 0, 1, 2, 2, 3, 3, 0]]  # texts 0, 1, 7 are equal, and so on
    x = y.copy()
    x[2], x[3] = eye[3], eye[1]  # two images nearest to another text
    (_, share), _ = run(ring.sigmoid_loss, (x, y, np.float32(5), np.float32(-2)), mesh_of((8, 1)))
    assert float(share) == 2 / 8  # 0 and 5 alone are the first of their kind
    (_, same), _ = run(siglip.full, (x, y, np.float32(5), np.float32(-2)))
    assert float(same) == 2 / 8


def test_gradient_is_scaled_by_what_follows_and_the_share_has_none():
    args, mesh = inputs(16), mesh_of((8, 1))
    one = run(ring.sigmoid_loss, args, mesh)[1]

    def thrice(*a):
        value, share = ring.sigmoid_loss(*a)
        return 3 * value + 100 * share

    with jax.set_mesh(mesh):
        three = jax.jit(jax.grad(thrice, argnums=ALL))(*put(mesh, args))
    near(three, [3 * g for g in one])


def test_runs_in_a_scan_of_steps():
    mesh, args = mesh_of((4, 2)), inputs(16)

    def descend(x, _):
        (value, _), (grad, *_) = jax.value_and_grad(ring.sigmoid_loss, argnums=ALL, has_aux=True)(
            x, *args[1:])
        return x - 2 * grad, value

    with jax.set_mesh(mesh):
        x, values = jax.jit(lambda x: jax.lax.scan(descend, x, None, length=3))(put(mesh, args)[0])
    want = args[0]
    for value in values:
        (loss, _), (grad, *_) = by_hand(want, *args[1:])
        np.testing.assert_allclose(value, loss, rtol=1e-5)
        want = want - 2 * grad
    near(x, want)


def test_rows_that_devices_cannot_share():
    with pytest.raises(UserError, match="12 pairs .* 8 devices"), jax.set_mesh(mesh_of((8, 1))):
        jax.eval_shape(ring.sigmoid_loss, *inputs(12))


N, D = 2048, 16
LOCAL = N // 8
BLOCK = LOCAL * LOCAL * 4  # bytes of one block of float32 logits


def lowered(form, gradient):
    mesh = mesh_of((8, 1))
    where = [parallel.rows(mesh)] * 2 + [parallel.replicated(mesh)] * 2
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=s)
            for shape, s in zip([(N, D), (N, D), (), ()], where)]
    if gradient:
        form = jax.value_and_grad(form, argnums=ALL, has_aux=True)
    with jax.set_mesh(mesh):
        return jax.jit(form).lower(*args)


def shapes_in(program):
    """Every array shape in the optimised program, with its number of elements."""
    found = set(re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text()))
    return {shape: int(np.prod([int(d) for d in shape.split(",")])) for shape in found}


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_that_of_one_block(gradient):
    """Each of 8 devices: temporary memory of less than a block and a few arrays of its rows.

    A hop goes through the images in CHUNKS parts, so of each elementwise stage of the logits an
    eighth of a block exists at a time; four stages (product, sign and slope, loss, comparison)
    are half a block. Beside them are texts and their gradient, held, sent and received, and
    images and theirs: eight arrays [n, D] at most. A second block does not fit.
    """
    source = lowered(ring.sigmoid_loss, gradient)
    products = [line for line in source.as_text().splitlines() if "dot_general " in line]
    assert len(products) == (3 if gradient else 1)
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    program = source.compile()
    used = program.memory_analysis().temp_size_in_bytes
    assert used <= BLOCK + 8 * LOCAL * D * 4 < 2 * BLOCK
    assert max(shapes_in(program).values()) <= LOCAL * LOCAL  # nothing of [n, N], however cut


def test_the_memory_test_sees_a_whole_matrix():
    program = lowered(siglip.full, True).compile()
    assert program.memory_analysis().temp_size_in_bytes > 8 * BLOCK
    assert f"{LOCAL},{N}" in shapes_in(program)


def test_row_axes():
    assert parallel.row_axes(jax.sharding.get_abstract_mesh()) == ()
    assert parallel.row_axes(mesh_of((2, 4))) == ("data", "fsdp")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert parallel.row_axes(mesh) == ("data",)
    args = inputs(16)
    cut = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(ring.sigmoid_loss, argnums=ALL, has_aux=True))(
            *jax.device_put(args[:2], cut), *args[2:])
    near(got, by_hand(*args))
