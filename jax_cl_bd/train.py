"""The one training loop: progress, checkpoints, resume, signals, a stop on non-finite losses."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jax_cl_bd import checkpoint, metrics, multihost, observe, parallel
from jax_cl_bd.errors import no_program


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `extra` is whatever pytree the objective declares."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    extra: Any
    key: jax.Array


class NonFinite(RuntimeError):
    """The loss or the state stopped being a number: `what`, and what to do about it."""

    def __init__(self, what: str, advice: str = ""):
        super().__init__(what + advice)
        self.what = what


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C arrived; the state is saved, and the exit status says which."""


def born_sharded(init: Callable[..., TrainState], key: jax.Array, mesh, weights=None):
    """Makes a state directly in its shardings; gives (state, shardings).

    `weights`: a pytree of host arrays, the second argument of `init` if there is one.
    """
    given = () if weights is None else (weights,)
    shardings = parallel.state_shardings(mesh, jax.eval_shape(init, key, *given))
    given = jax.device_put(given, parallel.state_shardings(mesh, given))
    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(key, *given), shardings


def compile_step(step_fn: Callable, shardings, steps_per_dispatch: int = 1) -> Callable:
    """Jits `step_fn(state, data, batch) -> (state, metrics)` with the state donated.

    With steps_per_dispatch k > 1 the batch has a leading axis k and the steps are scanned; the
    metrics get that axis too. Keep 1 on a CPU: convolutions in a scan are slow there (style 17).
    """
    def many(state, data, batches):
        return jax.lax.scan(lambda s, b: step_fn(s, data, b), state, batches)

    chosen = step_fn if steps_per_dispatch == 1 else many
    return jax.jit(chosen, donate_argnums=0, out_shardings=(shardings, None))


def fit(step_fn: Callable, state: TrainState, shardings, feed, *, folder: epath.Path, steps: int,
        cfg_train, mesh, label: str,
        evaluate: Callable[[TrainState], dict[str, float]] | None = None,
        refresh: Callable[[TrainState, Any, int], TrainState] | None = None,
        members: Sequence[str] = ()) -> TrainState:
    """Trains to `steps`, continuing from the newest good checkpoint in `folder`.

    Args:
        step_fn: (state, data, batch) -> (state, metrics); a pure function, jitted here.
        feed: has `data` (a pytree passed to each step) and `batches(start_step)`.
        folder: gets `checkpoints/` and `metrics.jsonl`.
        cfg_train: batch_size, log_every, save_every, eval_every (0 = never), steps_per_dispatch;
            perhaps profile_from and profile_steps, the window of a profile.
        label: stands before the progress.
        evaluate: figures written to metrics.jsonl every eval_every steps and at the end.
        refresh: (state, data, steps done) -> state, asked outside jit before every dispatch; it
            knows itself when it has something to do, and gives the same bits for the same state. A
            checkpoint is that of the state before, so that a resumed run asks again.
        members: names of models that are trained together, of which the i-th has the i-th row of
            every leaf of the state, and its own loss among the metrics as "i/loss".

    Returns:
        The state after `steps` steps, saved.

    Raises:
        NonFinite: the loss of a step is not finite, or the state that was to be saved; the step is
            named, and of several models those whose it is.
        Interrupted: after SIGTERM or SIGINT, once the state is saved; of several processes each
            raises it, at the next logged step. Also after the last step, since another training
            may follow; a signal that comes while the processes still tell each other goes to
            whoever handled it before.
    """
    dispatch = cfg_train.steps_per_dispatch
    checkpoints = folder / "checkpoints"
    writes, alone = multihost.is_writer(), jax.process_count() == 1
    found = checkpoint.newest_good_step(checkpoints, rename=True) if writes else None
    start = multihost.of_writer(-1 if found is None else found)
    with checkpoint.open_manager(checkpoints) as manager, jax.set_mesh(mesh), _signals() as stop:
        if start >= 0:
            abstract = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
            state = checkpoint.restore(manager, start, abstract)
            if start < steps and writes:
                print(f"{label}: going on from step {start}", flush=True)
        start = max(start, 0)
        open_writer = metrics.Writer if writes else metrics.Silent
        if evaluate is not None and multihost.of_writer(
                writes and _left_out(folder, start, steps, cfg_train.eval_every)):
            with contextlib.closing(open_writer(folder, start)) as writer:
                writer.write(start, evaluate(state))
        if start >= steps:
            if multihost.any_of(bool(stop)):
                _end(stop, label, start, writes)
            return state
        run = compile_step(step_fn, shardings, dispatch)
        single = run if dispatch == 1 else compile_step(step_fn, shardings)
        data = parallel.put_replicated(mesh, feed.data)
        writer, saved, unread = open_writer(folder, start), start, []
        profile = observe.Profile(folder, cfg_train.get("profile_from", 0),
                                  cfg_train.get("profile_steps", 0) if writes else 0)
        watch = observe.Watch(label, cfg_train.batch_size, start, mesh.size)
        progress = (metrics.Progress if writes else metrics.Silent)(label, steps, start)
        with contextlib.closing(writer), contextlib.closing(progress), \
                contextlib.closing(profile), contextlib.closing(feed.batches(start)) as batches:
            for step, count, batch in _dispatches(watch.timed(batches), start, steps, dispatch):
                profile.before(step - count, count)
                if refresh is not None:
                    state = refresh(state, data, step - count)
                batch = parallel.put_rows(mesh, batch, axis=0 if count == 1 else 1)
                watch.count(step_fn, state, data, batch, count)
                state, values = (single if count == 1 else run)(state, data, batch)
                profile.after(step, values)
                unread.append((step, values))
                progress.update(count)
                due = {what: step == steps or (every and step % every < count)
                       for what, every in (("log", cfg_train.log_every),
                                           ("save", cfg_train.save_every),
                                           ("eval", cfg_train.eval_every))}
                # Several processes must save at one step, and ask each other now and then. CPUs do
                # not keep to the order of exchanges: one that asks while another is still in its
                # step can wait for ever.
                if due["log"] and not alone:
                    jax.block_until_ready(values)
                interrupted = bool(stop) if alone else due["log"] and multihost.any_of(bool(stop))
                if due["log"] or due["save"] or interrupted:
                    last = _read(unread, label, folder, saved, members)
                    unread = []
                    progress.update(0, f"loss {last['train/loss']:.4f}")
                if due["log"]:
                    writer.write(step, last | watch.read(step))
                if (evaluate is not None and due["eval"] and cfg_train.eval_every
                        and not interrupted):  # who sent a signal may not wait that long
                    writer.write(step, evaluate(state))
                if due["save"] or interrupted:
                    saved = _save(manager, step, state, label, folder, saved, members)
                if due["log"]:
                    watch.reset(step)
                if interrupted:
                    _end(stop, label, step, writes)
        if multihost.any_of(bool(stop)):  # during the last evaluation, or the save
            _end(stop, label, steps, writes)
        if writes:
            print(watch, flush=True)
    return state


def _save(manager, step, state, label, folder, saved, members) -> int:
    """Saves a state that is finite; gives its step."""
    if not jax.device_get(is_finite(state)):
        bad = [name for i, name in enumerate(members)
               if not jax.device_get(is_finite(jax.tree.map(lambda x, i=i: x[i], state)))]
        raise _no_number(label, f"the state after step {step} is not finite", bad, folder, saved)
    checkpoint.save(manager, step, state)
    return step


def _end(stop, label, step, writes):
    number = stop[0] if stop else signal.SIGTERM  # another process's
    if writes:
        print(f"{label}: stopped by {number.name} at step {step}, which is saved; the same command "
              "goes on from there", flush=True)
    raise Interrupted(128 + number.value)


def _dispatches(batches: Iterator, start: int, steps: int, dispatch: int):
    """Yields (step after it, how many steps, batch); the rest of a division is done singly, and so
    are the steps to the next multiple where a run goes on between two."""
    step = start
    while step < steps:
        count = dispatch if steps - step >= dispatch and step % dispatch == 0 else 1
        parts = [next(batches) for _ in range(count)]
        step += count
        yield step, count, parts[0] if count == 1 else jax.tree.map(lambda *a: np.stack(a), *parts)


def _read(unread: list, label: str, folder: epath.Path, saved: int,
          members: Sequence[str]) -> dict[str, float]:
    """Fetches the metrics of the steps since the last look; the last step's are returned."""
    fetched = jax.device_get([values for _, values in unread])
    for (step, _), values in zip(unread, fetched):
        losses = np.atleast_1d(values["loss"])
        if not np.isfinite(losses).all():
            at = int(np.flatnonzero(~np.isfinite(losses))[0])
            bad = [name for i, name in enumerate(members)
                   if not np.isfinite(np.atleast_1d(values[f"{i}/loss"])[at])]
            what = f"the loss of step {step - losses.size + 1 + at} is {losses[at]}"
            raise _no_number(label, what, bad, folder, saved)
    return {f"train/{k}": float(np.atleast_1d(v)[-1]) for k, v in fetched[-1].items()}


def _no_number(label: str, what: str, bad: list[str], folder: epath.Path,
               saved: int) -> NonFinite:
    """`bad`: which of several models are meant."""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    who = f", of {', '.join(bad[:3])}{more}" if bad else ""
    return NonFinite(
        f"{label}: {what}{who}",
        f"; the last checkpoint in {folder / 'checkpoints'} is that of step {saved}. Lower "
        f"optim.lr or add optim.warmup_steps{', or leave out what diverges,' if bad else ''} in a "
        "new --workdir; the same command would repeat it")


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether weights, statistics and optimiser state are numbers: the loss of a step was computed
    before its update, so it cannot say."""
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in leaves
                              if jnp.issubdtype(x.dtype, jnp.inexact)]))


def _left_out(folder: epath.Path, step: int, steps: int, every: int) -> bool:
    """Whether a signal kept the evaluation that was due at a saved step from being made."""
    if not every or not step or (step % every and step != steps):
        return False
    lines = metrics.read_lines(folder / "metrics.jsonl")
    return not any(line["step"] == step and "train/loss" not in line for line in lines)


@contextlib.contextmanager
def _signals():
    """Collects SIGTERM and SIGINT while training, so that the loop can save before it ends."""
    seen = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number, frame):
        if seen:  # a second one does not wait for the save
            raise KeyboardInterrupt
        seen.append(signal.Signals(number))

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:  # since the loop last asked
        signal.raise_signal(seen[0])


if __name__ == "__main__":
    no_program("jax_cl_bd --config=FILE --workdir=DIR --stages=pretrain")
