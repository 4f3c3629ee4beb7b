"""python -m jax_cl_bd.compile_for --topology=v5e:16x16 --config=FILE[:args] [--rows=N] [--json]

Compiles a config's training step for TPUs that are not there (extra `tpu`), and says whether it
fits, what every device computes, reads and sends, and how long a step would then take. The exit
status is 1 if it does not fit. Nothing is measured: `predicted` is max(FLOPs / peak, bytes /
memory bandwidth) + sent bytes / link bandwidth, without overlap (docs/scaling.md). No data are
read: --rows says how many there would be.
"""

import json
import os
import sys
import time

from absl import flags
from ml_collections import config_flags

from jax_cl_bd import command_line, errors, settings
from jax_cl_bd.errors import UserError, unknown

FLAGS = flags.FlagValues()  # of its own, since other programs have a --config too
CONFIG = config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=FLAGS,
                                         help_string="The experiment whose step is compiled.")
TOPOLOGY = flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5e:16x16.",
                               flag_values=FLAGS)
ROWS = flags.DEFINE_integer("rows", 1_281_167, "Rows of the training set (ImageNet's).",
                            flag_values=FLAGS)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)

# Per chip: peak FLOP/s in bf16, HBM bytes, HBM bytes/s, and ICI bytes/s in one direction, which is
# half of what the documentation gives for both. docs.cloud.google.com/tpu/docs: v5e, v5p, v6e.
CHIPS = {"v5e": (197e12, 16e9, 819e9, 200e9),
         "v5p": (459e12, 95e9, 2765e9, 600e9),
         "v6e": (918e12, 32e9, 1638e9, 400e9)}
LARGE = 64e6  # bytes of an array that is worth a warning where every device holds it whole


def topology_devices(name: str) -> list:
    """The devices of a TPU topology, without any.

    Raises:
        UserError: an unknown chip, or what libtpu says of the shape; libtpu is missing.
    """
    from jax.experimental import topologies

    chip = name.partition(":")[0]
    if chip not in CHIPS:
        raise unknown("chip", chip, CHIPS)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology={name}: {str(error).splitlines()[0]} (libtpu comes with the "
                        "extra `tpu`; shapes are those of Cloud TPU slices)") from None


def abstract_step(cfg, rows: int, devices: list):
    """The training step of a config over a mesh of devices, with abstract arguments.

    Returns:
        (step_fn, shardings of the state, (state, data, batch), mesh).
    """
    import jax

    from jax_cl_bd import optim, parallel, pretrain
    from jax_cl_bd.objectives import gradient_cache, training

    mesh = parallel.make_mesh(cfg.mesh, devices)
    training.check(cfg)
    parallel.check_batch(cfg.train.batch_size, mesh)
    if cfg.train.chunks != 1:
        gradient_cache.check(cfg, mesh.size, has_batch_norm=training.has_batch_norm(cfg))
    steps, per_epoch = pretrain.total_steps(cfg, rows)
    cfg = training.sized(cfg, rows=rows, steps_per_epoch=per_epoch)
    tx, _ = optim.make(cfg.optim, steps, per_epoch)
    state = jax.eval_shape(training.make_init(cfg, tx), jax.random.key(0))
    shardings = parallel.state_shardings(mesh, state)

    def placed(tree, sharding):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(*x, sharding=sharding), tree,
                            is_leaf=lambda x: isinstance(x, tuple))

    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                         shardings)
    data, batch = feed_shapes(cfg, rows)
    arguments = (state, placed(data, parallel.replicated(mesh)), placed(batch, parallel.rows(mesh)))
    return training.make_step(cfg, tx, steps), shardings, arguments, mesh


def feed_shapes(cfg, rows: int) -> tuple[dict, dict]:
    """(shape, dtype) of all that a feed gives to a step: data and batch (data/feed.py)."""
    side, poisons, size = cfg.data.image_size, cfg.attack.poisons, cfg.train.batch_size
    wide = 2 * side if cfg.attack.name == "noisy_alignment" else side  # two parts on one canvas

    def slots(n, side):
        found = {"image": ((n, side, side, 3), "uint8"), "size": ((n, 2), "int32"),
                 "extent": ((n, 2), "int32")}
        if cfg.text.name != "none":
            many = cfg.data.captions_per_row or 1
            twins = {"none": 0, "eda": 1, "eda_twice": 2}[cfg.data.text_augment]
            for name in ["tokens", *(f"tokens{i + 2}" for i in range(twins))]:
                found[name] = ((n, many, cfg.text.context), "int32")
            found["count"] = ((n,), "int32")
        return found

    data = {"poison": slots(poisons, wide if poisons else 1),
            "pair": ((rows + poisons,), "int32")}
    batch = {"index": ((size,), "int32")}
    if cfg.data.feed == "resident":
        data["clean"] = slots(rows, side)
    else:
        batch |= slots(size, side)
    return data, batch


def compile_for(cfg, topology: str, rows: int) -> dict:
    """What the compiler says of a config's step on a topology; bytes and FLOPs per device."""
    import jax

    from jax_cl_bd import flops, hlo

    devices = topology_devices(topology)
    step_fn, shardings, arguments, mesh = abstract_step(cfg, rows, devices)
    begun = time.monotonic()
    with jax.set_mesh(mesh):
        counted = flops.count(step_fn, *arguments) / mesh.size
        lowered = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None)).lower(
            *arguments)
        what = {"topology": topology, "devices": mesh.size, "batch_size": cfg.train.batch_size,
                "flops": counted, "replicated": _replicated(arguments)}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {**what, "fits": False, "refused": _sentence(str(error))}
    seconds = time.monotonic() - begun
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    found = hlo.collectives(compiled.as_text(), mesh.size)
    peak, hbm, bandwidth, link = CHIPS[topology.partition(":")[0]]
    needs = (memory.argument_size_in_bytes + memory.output_size_in_bytes
             + memory.temp_size_in_bytes - memory.alias_size_in_bytes
             + memory.generated_code_size_in_bytes)
    sent = sum(c.sent_bytes for c in found)
    parts = {"compute": max(counted, cost["flops"]) / peak,
             "memory": cost["bytes accessed"] / bandwidth, "links": sent / link}
    predicted = max(parts["compute"], parts["memory"]) + parts["links"]
    return {
        **what, "fits": bool(needs <= hbm), "memory_bytes": needs, "hbm_bytes": hbm,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compiler_flops": cost["flops"], "bytes": cost["bytes accessed"],
        "sent_bytes": sent, "collectives": _summed(found),
        "largest_collectives": [vars(c) for c in found[:10]],
        "predicted_parts": parts, "predicted_step_seconds": predicted,
        "predicted_images_per_second": cfg.train.batch_size / predicted,
        "predicted_mfu": counted / peak / predicted, "compile_seconds": seconds}


def _sentence(error: str) -> str:
    """What the compiler says of memory in the first line of its error."""
    return error.splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2].strip()


def _summed(found) -> dict[str, dict]:
    """Per kind of collective: how many there are, and the bytes that a device sends."""
    out = {}
    for c in found:
        row = out.setdefault(c.kind, {"count": 0, "sent_bytes": 0.0})
        row["count"] += c.times
        row["sent_bytes"] += c.sent_bytes
    return out


def _replicated(arguments) -> dict[str, int]:
    """Large arrays that every device holds whole, by name: bytes."""
    import jax

    out = {}
    for group, tree in zip(("state", "data"), arguments):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            size = leaf.size * getattr(leaf.dtype, "itemsize", 0)
            if size > LARGE and leaf.sharding.is_fully_replicated:
                out[group + jax.tree_util.keystr(path)] = size
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def text(found: dict) -> str:
    """The lines that a reader wants to see."""
    gb = 1e9
    held = [f"warning: every chip holds all of {name}, {size / 1e6:.0f} MB"
            for name, size in found["replicated"].items()]
    title = (f"{found['topology']}: {found['devices']} chips, global batch {found['batch_size']}")
    if "refused" in found:
        return "\n".join([title, f"DOES NOT FIT: the compiler says: {found['refused']}", *held])
    spare = (found["hbm_bytes"] - found["memory_bytes"]) / gb
    parts = found["predicted_parts"]
    lines = [
        f"{title}, compiled in {found['compile_seconds']:.0f} s",
        f"{'fits' if found['fits'] else 'DOES NOT FIT'}: {found['memory_bytes'] / gb:.2f} of "
        f"{found['hbm_bytes'] / gb:.0f} GB per chip, {abs(spare):.2f} GB "
        f"{'to spare' if spare >= 0 else 'too much'} (arguments "
        f"{found['argument_bytes'] / gb:.2f}, temporary {found['temporary_bytes'] / gb:.2f})",
        f"per chip and step: {found['flops'] / 1e12:.3f} TFLOP, {found['bytes'] / gb:.2f} GB read "
        f"and written, {found['sent_bytes'] / gb:.3f} GB sent",
        *(f"  {kind}: {row['count']}, {row['sent_bytes'] / 1e6:.2f} MB"
          for kind, row in sorted(found["collectives"].items())),
        f"predicted, not measured: {1000 * found['predicted_step_seconds']:.1f} ms a step (compute "
        f"{1000 * parts['compute']:.1f}, memory {1000 * parts['memory']:.1f}, links "
        f"{1000 * parts['links']:.1f}), {found['predicted_images_per_second']:,.0f} images/s, MFU "
        f"{found['predicted_mfu']:.2f}",
        *held]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Reads the flags, compiles, prints; 1 if it does not fit."""
    command_line.parse(FLAGS, argv, __doc__)
    for name, value in (("config", CONFIG.value), ("topology", TOPOLOGY.value)):
        if value is None:
            raise UserError(f"--{name} is missing; for example: python -m jax_cl_bd.compile_for "
                            "--topology=v5e:16x16 --config=configs/imagenet100.py")
    os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles; there is no TPU to open
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to keep for this process
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor a host that knows of one
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    with settings.asked_of(CONFIG.value):
        found = compile_for(CONFIG.value, TOPOLOGY.value, ROWS.value)
    print(json.dumps(found) if JSON.value else text(found))
    return int(not found["fits"])


if __name__ == "__main__":
    errors.end(main, sys.argv)
