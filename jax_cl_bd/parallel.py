"""The mesh and how arrays lie on it; no other file names a mesh axis (design 7)."""

import math

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_cl_bd.errors import UserError

FSDP_MIN_SIZE = 2**18  # elements; 1 MB of float32


def make_mesh(cfg_mesh, devices: list | None = None) -> Mesh:
    """Builds the ("data", "fsdp") mesh of the first data * fsdp devices; data = -1 takes them all.

    `devices`: those to choose from; None: all of this run.

    Raises:
        UserError: there are not so many devices, or fsdp does not divide them all; or they are of
            several processes, of which some would have too few or nothing to do.
    """
    shared = devices is None and jax.process_count() > 1
    devices = devices or jax.devices()
    count = len(devices)
    data, fsdp = cfg_mesh.data, cfg_mesh.fsdp
    if fsdp < 1 or (data == -1 and count % fsdp) or data == 0 or data < -1 or data * fsdp > count:
        raise UserError(f"mesh.data={data} and mesh.fsdp={fsdp} do not fit the {count} devices of "
                        "this run; data=-1 takes all, and fsdp must then divide them")
    data = count // fsdp if data == -1 else data
    if shared and data * fsdp != count:
        raise UserError(f"mesh.data={data} and mesh.fsdp={fsdp} leave out some of the {count} "
                        f"devices of this job; its {jax.process_count()} processes must use all: "
                        "mesh.data=-1")
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                         devices=devices[:data * fsdp])


def one_device() -> Mesh:
    """The mesh of the first device of this process alone."""
    return make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 1}), jax.local_devices())


def check_batch(batch_size: int, mesh: Mesh, what: str = "train.batch_size") -> None:
    """Refuses a global batch that the devices cannot share equally."""
    if batch_size <= 0 or batch_size % mesh.size:
        raise UserError(f"{what}={batch_size} must be a positive multiple of the {mesh.size} "
                        "devices of this run")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def row_axes(mesh) -> tuple[str, ...]:
    """The axes of a mesh that rows are cut over; none of the empty mesh, which is no mesh at all,
    and none where a device already works on its own (inside jax.shard_map).

    `jax.sharding.get_abstract_mesh()` gives the mesh of `jax.set_mesh`, inside jit too.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return tuple(name for name in ("data", "fsdp")
                 if kinds.get(name, AxisType.Manual) != AxisType.Manual)


def rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding that cuts one axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), ("data", "fsdp")))


def put_rows(mesh: Mesh, batch, axis: int = 0):
    """Makes global arrays from this process's part of a batch."""
    sharding = rows(mesh, axis)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), batch)


def share_rows(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Makes a global array, cut by rows, of one that every process holds whole."""
    return jax.make_array_from_callback(array.shape, rows(mesh), lambda at: array[at])


def to_host(x: jax.Array) -> np.ndarray:
    """Fetches a whole array, also one whose parts lie on the devices of several processes."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def put_replicated(mesh: Mesh, tree):
    """Places a pytree of host arrays whole on every device."""
    sharding = replicated(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)),
                        tree)


def split_rows(x: jax.Array, parts: int) -> jax.Array:
    """Cuts rows [N, ...] into [parts, N / parts, ...] without moving one to another device.

    Part i holds the i-th share of every device's rows, in order; on one device the parts are
    contiguous. The devices are those of `jax.set_mesh`; N must divide by parts times devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[name] for name in row_axes(mesh))
    x = x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return _cut(x.reshape(parts, -1, *x.shape[3:]), mesh, axis=1)


def join_rows(x: jax.Array) -> jax.Array:
    """Undoes `split_rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[name] for name in row_axes(mesh))
    parts = len(x)
    x = x.reshape(parts, devices, -1, *x.shape[2:]).swapaxes(0, 1)
    return _cut(x.reshape(-1, *x.shape[3:]), mesh, axis=0)


def deal_rows(x: jax.Array, groups: int) -> jax.Array:
    """Moves the rows [N, ...] of equal, contiguous groups between them, like cards; twice is back.

    Blocks of b groups exchange, b the smaller of `groups` and of their size, of which one must
    divide the other: a group keeps a b-th of its rows, in order of the group they come from, and
    gets as many of each other one of its block. Where every device of `jax.set_mesh` holds whole
    groups, a device sends its own rows once and no more; else the compiler finds a way.
    """
    size = len(x) // groups
    block = min(size, groups)
    mesh = jax.sharding.get_abstract_mesh()
    axes = row_axes(mesh)
    devices = math.prod(mesh.shape[name] for name in axes)
    here, more = divmod(groups, devices)  # groups of a device
    if devices == 1 or more or (here % block and block % here):
        return _dealt(x, groups, block)
    others = max(block // here, 1)  # devices that exchange

    def exchange(x):
        if others == 1:
            return _dealt(x, here, block)
        # [own group, its device later, its group there, rows] -> [there: group, from: device,
        # group, rows]
        x = x.reshape(here, others, here, -1, *x.shape[1:])
        x = jax.lax.all_to_all(x, axes, 1, 1, axis_index_groups=[
            list(range(i, i + others)) for i in range(0, devices, others)])
        return x.transpose(2, 1, 0, *range(3, x.ndim)).reshape(-1, *x.shape[4:])

    cut = PartitionSpec(axes)
    return jax.shard_map(exchange, in_specs=cut, out_specs=cut)(x)


def _dealt(x, groups, block):
    parts = x.reshape(groups // block, block, block, -1, *x.shape[1:])
    return parts.swapaxes(1, 2).reshape(x.shape)


def _cut(x, mesh, axis):
    names = row_axes(mesh)
    spec = PartitionSpec(*([None] * axis), names)
    return jax.lax.with_sharding_constraint(x, spec) if names else x


def state_shardings(mesh: Mesh, shapes):
    """Gives each leaf of a training state its sharding (style 8).

    A queue [slots, N, D] is cut on N, so that writing a slot needs no communication. With fsdp > 1
    big leaves are cut on their largest divisible axis, and their optimizer state and EMA follow
    because they have the same shapes. Everything else is replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(path, leaf):
        if getattr(path[-1], "key", None) == "queue" and leaf.shape[1] % mesh.size == 0:
            return rows(mesh, axis=1)
        dims = [d for d in range(leaf.ndim) if leaf.shape[d] % fsdp == 0]
        if fsdp == 1 or leaf.size < FSDP_MIN_SIZE or not dims:
            return replicated(mesh)
        cut = max(dims, key=lambda d: leaf.shape[d])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if d == cut else None
                                                   for d in range(leaf.ndim))))

    return jax.tree_util.tree_map_with_path(sharding, shapes)
