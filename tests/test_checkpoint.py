"""Checkpoints notice every change of their bytes and fall back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jax_cl_bd import checkpoint


def saved(folder):
    state = {"w": jnp.arange(40.0), "key": jax.random.key(1)}
    with checkpoint.open_manager(folder) as manager:
        checkpoint.save(manager, 1, state)
        checkpoint.save(manager, 2, {**state, "w": state["w"] + 1})
    return state


def restored(folder, step, state):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                            state)
    with checkpoint.open_manager(folder) as manager:
        return checkpoint.restore(manager, step, abstract)


def test_round_trip_keeps_bits_and_keys(tmp_path):
    folder = epath.Path(tmp_path)
    state = saved(folder)
    assert checkpoint.newest_good_step(folder) == 2
    got = restored(folder, 2, state)
    np.testing.assert_array_equal(got["w"], state["w"] + 1)
    np.testing.assert_array_equal(jax.random.key_data(got["key"]),
                                  jax.random.key_data(state["key"]))


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def test_any_flipped_bit_is_noticed(tmp_path, capsys):
    source = tmp_path / "source"
    state = saved(epath.Path(source))
    names = [p.relative_to(source) for p in files_of(source / "2")]
    assert len(names) > 3
    for number, name in enumerate(names):
        copy = epath.Path(tmp_path / f"copy{number}")
        shutil.copytree(source, copy)
        content = bytearray((copy / str(name)).read_bytes())
        content[len(content) // 2] ^= 1 << number % 8
        (copy / str(name)).write_bytes(bytes(content))
        assert checkpoint.newest_good_step(copy) == 1, name
        assert (copy / "2").exists()  # a reader moves nothing
        assert checkpoint.newest_good_step(copy, rename=True) == 1, name
        assert (copy / "bad-2").exists()
    assert "damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(restored(copy, 1, state)["w"], state["w"])


@pytest.mark.parametrize("harm", ["truncate", "delete", "add", "no digests"])
def test_other_damage_is_noticed(tmp_path, harm):
    folder = epath.Path(tmp_path)
    saved(folder)
    victim = max((p for p in files_of(tmp_path / "2" / "state")), key=lambda p: p.stat().st_size)
    if harm == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "delete":
        victim.unlink()
    elif harm == "add":
        (tmp_path / "2" / "stray").write_text("x")
    else:
        (tmp_path / "2" / checkpoint.DIGESTS).unlink()
    assert checkpoint.newest_good_step(folder) == 1


def test_no_good_step_at_all(tmp_path):
    folder = epath.Path(tmp_path)
    saved(folder)
    for step in "12":
        (tmp_path / step / checkpoint.DIGESTS).unlink()
    assert checkpoint.newest_good_step(folder) is None


def test_part_of_a_state_restores_alone(tmp_path):
    folder = epath.Path(tmp_path)
    saved(folder)
    item = {"w": jax.ShapeDtypeStruct((40,), jnp.float32,
                                      sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    got = checkpoint.restore_part(folder, 1, item)
    assert set(got) == {"w"}
    np.testing.assert_array_equal(got["w"], np.arange(40.0))
