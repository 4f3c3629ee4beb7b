"""Meshes, and rows that move between devices."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_cl_bd import hlo, parallel
from jax_cl_bd.errors import UserError


@pytest.mark.parametrize("data, fsdp", [(4, 1), (1, 4), (2, 2), (1, 1)])
def test_several_processes_must_use_all_of_their_devices(monkeypatch, data, fsdp):
    cfg = ConfigDict({"data": data, "fsdp": fsdp})
    assert parallel.make_mesh(cfg).size == data * fsdp
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="leave out some of the 8 devices.*its 2 processes"):
        parallel.make_mesh(cfg)
    for cfg.data, cfg.fsdp in ((-1, 2), (8, 1)):
        assert parallel.make_mesh(cfg).size == 8
    assert parallel.one_device().size == 1  # each has one of its own


def dealt(groups, size):
    """By hand, group by group: what each gets, and from whom."""
    block = min(groups, size)
    share = size // block
    rows = np.arange(groups * size).reshape(groups, size)
    out = []
    for group in range(groups):
        first, own = group // block * block, group % block
        for source in range(first, first + block):
            out.extend(rows[source, own * share:(own + 1) * share])
    return np.array(out)


@pytest.mark.parametrize("data, fsdp", [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("groups, size", [(8, 8), (8, 2), (8, 16), (16, 4), (32, 2), (4, 8)])
def test_rows_are_dealt_alike_on_any_number_of_devices(data, fsdp, groups, size):
    rows = np.arange(groups * size)
    mesh = parallel.make_mesh(ConfigDict({"data": data, "fsdp": fsdp}))
    images = parallel.put_rows(mesh, np.stack([rows, -rows], 1))
    deal = jax.jit(lambda x: parallel.deal_rows(x, groups))
    with jax.set_mesh(mesh):
        once = deal(images)
        twice = deal(once)
    np.testing.assert_array_equal(once[:, 0], dealt(groups, size))
    np.testing.assert_array_equal(once[:, 1], -dealt(groups, size))
    np.testing.assert_array_equal(twice, images)


def test_a_device_sends_its_rows_once():
    mesh = parallel.make_mesh(ConfigDict({"data": 8, "fsdp": 1}))
    x = jax.ShapeDtypeStruct((64, 5), np.float32, sharding=parallel.rows(mesh))
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: parallel.deal_rows(x, 8)).lower(x).compile()
    sent, = hlo.collectives(compiled.as_text(), 8)
    assert sent.kind == "all-to-all" and sent.sent_bytes == 8 * 5 * 4 * 7 / 8
