"""python -m jax_cl_bd.bench step|feed|augment|population|layout [--config=FILE[:args]] [--json]

Rates as ratios within one run: the whole step (feed, augmentation, update) against the bare model
step on fixed arrays, both compiled, warmed up and timed in turns, both dispatched as the training
loop does it, train.steps_per_dispatch at a time. `feed` says whether the feed starves the device;
there every step is dispatched and waited for singly. `population` sets --members encoders at once
(jax_cl_bd/population.py) against one.
"""

import json
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax import monitoring
from ml_collections import config_flags

from jax_cl_bd import (
    command_line,
    errors,
    host_memory,
    optim,
    parallel,
    poison,
    pretrain,
    settings,
)
from jax_cl_bd.data import augment, feed, sources, texts
from jax_cl_bd.data.poisoned import PoisonedSet
from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.objectives import training
from jax_cl_bd.train import born_sharded, compile_step

FLAGS = flags.FlagValues()  # of its own, since other programs have a --config too
# Without a default here: that would be read, overrides and all, before errors can be caught.
CONFIG = config_flags.DEFINE_config_file("config", None, lock_config=True, flag_values=FLAGS,
                                         help_string="The experiment whose step is timed; "
                                         "default configs/quickstart.py.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=FLAGS)
MEMBERS = flags.DEFINE_integer("members", 16, "Encoders that are trained at once (population).",
                               flag_values=FLAGS)
SECONDS = flags.DEFINE_float("seconds", 20.0, "How long each side of a ratio is timed.",
                             flag_values=FLAGS)


def _compiles() -> list[float]:
    """A list that grows by one whenever XLA compiles something."""
    seen = []
    monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: seen.append(seconds)
        if name == "/jax/core/compile/backend_compile_duration" else None)
    return seen


def _setup(cfg):
    """The poisoned set of a config, in its feed, with a state and the mesh."""
    mesh = parallel.make_mesh(cfg.mesh)
    source = sources.load(cfg.data, "train")
    table = sources.table(source)
    poison.check(cfg, table, source.classes)
    pretrain.check(cfg, len(source))
    dataset = PoisonedSet(source, *poison.make(cfg, source, table, poison.make_trigger(cfg)),
                          _texts(cfg, source))
    steps, per_epoch = pretrain.total_steps(cfg, len(dataset.kept))
    tx, _ = optim.make(cfg.optim, steps, per_epoch)
    made = feed.make(cfg, dataset)
    cfg = _sized(cfg, made)
    state, shardings = born_sharded(training.make_init(cfg, tx), jax.random.key(0), mesh)
    return mesh, made, tx, steps, state, shardings


def _sized(cfg, made):
    return training.sized(cfg, rows=len(made.data["pair"]), steps_per_epoch=made.steps_per_epoch)


def _texts(cfg, source):
    if cfg.text.name == "none":
        return None
    texts.check(cfg, source)
    with tempfile.TemporaryDirectory() as folder:
        (epath.Path(folder) / "poison").mkdir()
        texts.make_tokenizer(cfg, source).save(epath.Path(folder) / "poison" / "tokenizer.json")
        return texts.load(cfg, epath.Path(folder), source)


def _alternate(calls: list, seconds: float, look_every: int, rounds: int = 5) -> list[float]:
    """Calls per second of several functions, timed in turns; the median round of each.

    As in the training loop the results are waited for every `look_every` calls; the host works
    ahead in between. Each function gives something that has to be waited for: arrays, or an object
    with `block_until_ready`.
    """
    rates = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, rates):
            count, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds / rounds:
                for _ in range(look_every):
                    result = call()
                jax.block_until_ready(result)
                count += look_every
            found.append(count / (time.perf_counter() - begun))
    return [sorted(found)[rounds // 2] for found in rates]


def step(cfg, peer=None) -> dict:
    """Images per second of the whole training step, of the bare model step, and their ratio.

    `peer`, if given, makes of the config, fixed views and the number of trained parameters the step
    of a rival, which is timed in turns with ours: "peer_images_per_second", "ratio_to_peer" (of the
    bare steps).

    An image counts once, though each gives two views. Both are sustained rates, with results
    looked at every train.log_every steps. With train.steps_per_dispatch k > 1 both sides scan k
    steps a dispatch: the whole step over k batches, the bare one over k keys and the same views.
    """
    dispatch = cfg.train.steps_per_dispatch
    mesh, made, tx, steps, state, shardings = _setup(cfg)
    cfg = _sized(cfg, made)
    update = training.make_update(cfg, tx, steps)
    compiled = _compiles()
    with jax.set_mesh(mesh):
        data = parallel.put_replicated(mesh, made.data)
        batches = made.batches(0)
        whole_fn = compile_step(training.make_step(cfg, tx, steps), shardings, dispatch)
        bare_fn = compile_step(lambda s, views, key: update(s, views, key), shardings, dispatch)
        batch = parallel.put_rows(mesh, next(batches))
        views = jax.jit(lambda d, b, k: augment.views(cfg, d, b, k))(data, batch, state.key)
        box = {"whole": state, "bare": jax.tree.map(jnp.copy, state)}
        key = jax.random.key(1)
        key = key if dispatch == 1 else jax.random.split(key, dispatch)

        def whole():
            box["whole"], metrics = whole_fn(box["whole"], data,
                                             _put_next(mesh, batches, dispatch))
            return metrics

        def bare():
            box["bare"], metrics = bare_fn(box["bare"], views, key)
            return metrics

        calls = [whole, bare]
        if peer is not None:
            calls.append(peer(cfg, jax.device_get(views),
                              sum(x.size for x in jax.tree.leaves(state.params))))
        for _ in range(2):
            jax.block_until_ready([call() for call in calls])
        before = len(compiled)
        rates = _alternate(calls, SECONDS.value, cfg.train.log_every // dispatch)
        batches.close()
    size = cfg.train.batch_size * dispatch
    found = {"images_per_second": rates[0] * size, "bare_images_per_second": rates[1] * size,
             "ratio": rates[0] / rates[1], "batch_size": cfg.train.batch_size,
             "steps_per_dispatch": dispatch, "compiles_after_warm_up": len(compiled) - before}
    if peer is not None:
        found |= {"peer_images_per_second": rates[2] * cfg.train.batch_size,
                  "ratio_to_peer": rates[1] * dispatch / rates[2]}
    return found


def _put_next(mesh, batches, count: int):
    """The next `count` batches on the devices; more than one are stacked, as in train.fit."""
    parts = [next(batches) for _ in range(count)]
    if count == 1:
        return parallel.put_rows(mesh, parts[0])
    return parallel.put_rows(mesh, jax.tree.map(lambda *a: np.stack(a), *parts), axis=1)


def feed_rate(cfg) -> dict:
    """Images per second of the feed alone, of the step alone on one batch, and of both together.

    `waiting` is the share of the time of both together that the loop stands at the feed: what the
    feed does not hide behind the step. A CPU is host and device at once, so there both together are
    slower than either even if nothing waits.
    """
    mesh, made, tx, steps, state, shardings = _setup(cfg)
    cfg = _sized(cfg, made)
    batches = made.batches(0)
    with jax.set_mesh(mesh):
        data = parallel.put_replicated(mesh, made.data)
        step_fn = compile_step(training.make_step(cfg, tx, steps), shardings)
        batch = parallel.put_rows(mesh, next(batches))
        box, waited = {"state": state}, [0.0]

        def read():
            begun = time.perf_counter()
            read = next(batches)
            waited[0] += time.perf_counter() - begun
            return read

        def train(batch=batch):
            box["state"], metrics = step_fn(box["state"], data, batch)
            return jax.block_until_ready(metrics)

        def both():
            return train(parallel.put_rows(mesh, read()))

        for _ in range(2):
            train(), both()
        feed_alone = _rate(read)
        step_alone = _rate(train)
        for _ in range(4):  # what the feed read ahead during the steps alone is no part of its rate
            read()
        waited[0], begun = 0.0, time.perf_counter()
        together = _rate(both)
        waiting = waited[0] / (time.perf_counter() - begun)
        batches.close()
    size = cfg.train.batch_size
    return {"images_per_second": feed_alone * size, "step_images_per_second": step_alone * size,
            "together_images_per_second": together * size, "waiting": waiting,
            "starves": feed_alone < step_alone, "feed": cfg.data.feed,
            "workers": cfg.data.workers, "batch_size": size}


def _rate(call) -> float:
    """Calls per second over --seconds, at least one."""
    count, begun = 0, time.perf_counter()
    while not count or time.perf_counter() - begun < SECONDS.value:
        call()
        count += 1
    return count / (time.perf_counter() - begun)


def augment_rate(cfg) -> dict:
    """Images per second of the two views alone, compiled, and milliseconds per batch."""
    mesh, made, *_ = _setup(cfg)
    with jax.set_mesh(mesh):
        data = parallel.put_replicated(mesh, made.data)
        batch = parallel.put_rows(mesh, next(made.batches(0)))
        draw = jax.jit(lambda d, b, k: augment.views(cfg, d, b, k))
        jax.block_until_ready(draw(data, batch, jax.random.key(0)))
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < SECONDS.value:
            jax.block_until_ready(draw(data, batch, jax.random.key(count)))
            count += 1
    seconds = (time.perf_counter() - begun) / count
    return {"images_per_second": cfg.train.batch_size / seconds,
            "milliseconds_per_batch": 1000 * seconds, "batch_size": cfg.train.batch_size}


def population_rate(cfg) -> dict:
    """Encoder steps per second of --members at once and of one alone, and their ratio: how many
    times the encoders per hour, start-up and compilation, which happen once in place of once each,
    left aside. All have the poisoned set of one, since only shapes count.

    Raises:
        UserError: no members, more than one device, or settings that members cannot share.
    """
    from jax_cl_bd import population

    count, devices = MEMBERS.value, parallel.make_mesh(cfg.mesh).size
    if count < 1:
        raise UserError(f"--members={count} must be at least 1")
    if devices > 1:
        raise UserError(f"bench population is of one device, not {devices}: --config.mesh.data=1")
    population.check(cfg)
    mesh, made, tx, steps, state, shardings = _setup(cfg)
    cfg = _sized(cfg, made)
    together, init = population.step_of(cfg, steps, [made.steps_per_epoch] * count)
    batches = made.batches(0)
    with jax.set_mesh(mesh):
        data, batch = jax.device_put((made.data, next(batches)))
        copies = {name: tree if name == "clean" else jax.tree.map(
            lambda x: jnp.stack([x] * count), tree) for name, tree in data.items()}
        index = {"index": jnp.stack([next(batches)["index"] for _ in range(count)])}
        box = {"one": state, "all": jax.jit(init)(jax.random.split(jax.random.key(0), count))}
        one_fn = compile_step(training.make_step(cfg, tx, steps), shardings)
        all_fn = compile_step(together, jax.tree.map(lambda x: x.sharding, box["all"]))

        def one():
            box["one"], metrics = one_fn(box["one"], data, batch)
            return metrics

        def every():
            box["all"], metrics = all_fn(box["all"], copies, index)
            return metrics

        for _ in range(2):
            jax.block_until_ready((one(), every()))
        one_rate, all_rate = _alternate([one, every], SECONDS.value, 2)
    batches.close()
    return {"encoder_steps_per_second": all_rate * count, "one_alone": one_rate,
            "ratio": all_rate * count / one_rate, "members": count,
            "batch_size": cfg.train.batch_size}


def layout(cfg) -> dict:
    """Crop samples per second, and the solver's accuracy against the closed form."""
    del cfg
    from jax_cl_bd.layouts import bench as layouts_bench

    return layouts_bench.run()


BENCHES = {"step": step, "feed": feed_rate, "augment": augment_rate, "population": population_rate,
           "layout": layout}


def main(argv: list[str]) -> None:
    """Runs the benchmark that is named first."""
    if not command_line.config_files(argv) and not command_line.wants_help(argv):
        argv = [argv[0], f"--config={command_line.HERE / 'configs' / 'quickstart.py'}", *argv[1:]]
    names = command_line.parse(FLAGS, argv, __doc__)
    flags.FLAGS.mark_as_parsed()  # grain looks at those
    if len(names) != 1 or names[0] not in BENCHES:
        raise unknown("benchmark", names[0] if names else "", BENCHES)
    host_memory.keep_pages()
    with settings.asked_of(CONFIG.value):
        result = BENCHES[names[0]](CONFIG.value)
    result["devices"] = [d.device_kind for d in jax.devices()]
    if JSON.value:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:26} {value:,.3f}" if isinstance(value, float) else f"{name:26} {value}")


if __name__ == "__main__":
    errors.end(main, sys.argv)
