"""The jitted optimiser of triggers: attacks learn one with it, detectors invert one."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from jax_cl_bd.metrics import Progress

LOOK_EVERY = 25  # dispatches between two looks at the loss; each waits for the device


def minimise(loss: Callable, start: Any, batches: Iterator, *, steps: int,
             tx: optax.GradientTransformation, key: jax.Array,
             project: Callable[[Any], Any] = lambda params: params, data: Any = None,
             members: bool = False, steps_per_dispatch: int = 1, control: tuple | None = None,
             label: str = "trigger") -> tuple[Any, np.ndarray]:
    """Minimises loss(params, data, batch, key) by `steps` steps of gradient descent.

    Args:
        loss: a pure function with a scalar value.
        start: pytree of the first parameters. With `members`, every leaf has a leading axis, one
            entry per restart, class or encoder; all are optimised side by side under vmap, on the
            same batches with keys of their own, and nothing passes between them.
        batches: pytrees of host arrays, at least `steps` of them.
        project: takes parameters back into their set after every step, e.g. a clip to [0, 1].
        data: pytree of arrays passed to every step (closed over, they would be constants).
        steps_per_dispatch: steps scanned in one dispatch. Keep 1 on a CPU (style 17).
        control: (first state, update), for weights that follow the loss and for the best found so
            far: the loss is then loss(params, data, batch, key, state) -> (value, info), and after
            it comes update(state, params, info) -> state, with the params before the step. The
            state is returned in the place of the parameters. Not with members.

    Returns:
        The parameters and the loss before each step, float32 [steps] or [steps, members].

    Raises:
        FloatingPointError: a loss is not finite; names the step.
    """
    assert not (members and control), "members have no control"

    def update(params, opt_state, data, batch, key, state=None):
        if control:
            (value, info), grads = jax.value_and_grad(loss, has_aux=True)(params, data, batch, key,
                                                                          state)
            state = control[1](state, params, info)
        else:
            value, grads = jax.value_and_grad(loss)(params, data, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return project(optax.apply_updates(params, updates)), opt_state, value, state

    def one(carry, batch, data):
        params, opt_state, step, state = carry
        now = jax.random.fold_in(key, step)
        if members:
            count = jax.tree.leaves(params)[0].shape[0]
            keys = jax.random.split(now, count)
            params, opt_state, value, _ = jax.vmap(update, (0, 0, None, None, 0))(
                params, opt_state, data, batch, keys)
        else:
            params, opt_state, value, state = update(params, opt_state, data, batch, now, state)
        return (params, opt_state, step + 1, state), value

    @jax.jit
    def dispatch(carry, group, data):
        if len(group) == 1:
            carry, value = one(carry, group[0], data)
            return carry, value[None]
        stacked = jax.tree.map(lambda *parts: jax.numpy.stack(parts), *group)
        return jax.lax.scan(lambda c, b: one(c, b, data), carry, stacked)

    first = jax.vmap(tx.init)(start) if members else tx.init(start)
    carry = (start, first, 0, control and control[0])
    history, progress = [], Progress(label, steps)
    done = 0
    while done < steps:
        count = min(steps_per_dispatch, steps - done)
        carry, values = dispatch(carry, [next(batches) for _ in range(count)], data)
        history.append(values)
        done += count
        progress.update(count)
        if len(history) % LOOK_EVERY == 0 or done == steps:
            _check(history, label)
            progress.update(0, f"loss {np.mean(np.asarray(history[-1])):.4f}")
    progress.close()
    return carry[3 if control else 0], np.concatenate([np.asarray(v) for v in history])


def _check(history, label):
    losses = np.concatenate([np.asarray(v) for v in history])
    if not np.isfinite(losses).all():
        step = int(np.argwhere(~np.isfinite(losses))[0, 0])
        raise FloatingPointError(f"{label}: the loss of step {step + 1} is not finite; lower its "
                                 "learning rate")
