"""The loop: resume, dispatches, signals, non-finite losses; with a model that compiles at once."""

import contextlib
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax import monitoring
from ml_collections import ConfigDict

from jax_cl_bd import checkpoint, parallel, train
from jax_cl_bd.train import Interrupted, NonFinite, TrainState, born_sharded, fit

TX = optax.sgd(0.1, momentum=0.9)
DATA = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)


class Feed:
    data = {"rows": DATA}

    def batches(self, step):
        while True:
            yield {"index": np.random.default_rng(step).integers(0, 64, 8).astype(np.int32)}
            step += 1


def init(key):
    params = {"w": jax.random.normal(key, (3,))}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, batch_stats={},
                      opt_state=TX.init(params), extra={}, key=key)


def step_fn(state, data, batch, *, bad_step=-1):
    x = data["rows"][batch["index"]]
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (8,))

    def loss_of(params):
        return jnp.mean((x @ params["w"] - 1 + 0.1 * noise) ** 2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state)
    loss = jnp.where(state.step + 1 == bad_step, jnp.nan, loss)
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                         opt_state=opt_state), {"loss": loss}


def run(folder, steps, *, step=step_fn, dispatch=1, save_every=5, evaluate=None, log_every=5,
        eval_every=5, around=contextlib.nullcontext, refresh=None):
    mesh = parallel.make_mesh(ConfigDict({"data": -1, "fsdp": 1}))
    state, shardings = born_sharded(init, jax.random.key(3), mesh)
    cfg = ConfigDict({"log_every": log_every, "save_every": save_every, "batch_size": 8,
                      "eval_every": eval_every if evaluate else 0, "steps_per_dispatch": dispatch})
    with around():
        return fit(step, state, shardings, Feed(), folder=epath.Path(folder), steps=steps,
                   cfg_train=cfg, mesh=mesh, label="test", evaluate=evaluate,
                   refresh=refresh)


def losses(folder):
    lines = [json.loads(t) for t in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


def test_five_and_five_steps_equal_ten(tmp_path):
    whole = run(tmp_path / "whole", 10)
    run(tmp_path / "parts", 5)
    parts = run(tmp_path / "parts", 10)
    np.testing.assert_array_equal(whole.params["w"], parts.params["w"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_metrics_after_the_restored_step_are_cut(tmp_path):
    run(tmp_path, 10, log_every=1)
    checkpoint_10 = tmp_path / "checkpoints" / "10"
    (checkpoint_10 / "digests.json").unlink()  # as if killed before the step was whole
    run(tmp_path, 10, log_every=1)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 11))


def test_steps_of_one_dispatch_equal_single_steps(tmp_path):
    single = run(tmp_path / "single", 12)
    scanned = run(tmp_path / "scanned", 12, dispatch=5)  # 5 + 5 + 1 + 1
    np.testing.assert_allclose(single.params["w"], scanned.params["w"], rtol=1e-6)
    assert [s for s, _ in losses(tmp_path / "scanned")] == [5, 10, 12]


def test_a_refresh_is_asked_before_every_dispatch_and_again_after_a_resume(tmp_path):
    def asked(folder, steps, dispatch):
        calls = []

        def refresh(state, data, step):
            assert int(state.step) == step and data["rows"].shape == DATA.shape
            calls.append(step)
            grown = {"w": state.params["w"] + (0.1 if step == 5 else 0)}
            return state.replace(params=grown)

        return run(folder, steps, dispatch=dispatch, refresh=refresh), calls

    whole, calls = asked(tmp_path / "whole", 12, 1)
    assert calls == list(range(12))
    asked(tmp_path / "parts", 5, 1)  # saved before the refresh that is due at 5
    parts, calls = asked(tmp_path / "parts", 12, 1)
    assert calls == list(range(5, 12))
    np.testing.assert_array_equal(whole.params["w"], parts.params["w"])
    asked(tmp_path / "odd", 3, 1)  # steps are single up to the next multiple of the dispatch
    _, calls = asked(tmp_path / "odd", 17, 5)
    assert calls == [3, 4, 5, 10, 15, 16]


def test_one_compile_of_the_step(tmp_path):
    run(tmp_path / "warm", 1)  # whatever else is compiled once per process
    seen = []
    monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: seen.append(1)
        if name == "/jax/core/compile/backend_compile_duration" else None)

    def counted(state, data, batch):  # a new function, so that jit cannot reuse
        return step_fn(state, data, batch)

    calls = []
    run(tmp_path / "counted", 4, step=counted, log_every=1, save_every=100, eval_every=1,
        evaluate=lambda state: calls.append(len(seen)) or {})
    assert len(calls) == 4 and calls[0] == calls[-1]  # nothing is compiled after step 1


def test_loss_that_is_not_finite_names_its_step_and_keeps_the_checkpoint(tmp_path):
    def breaks(state, data, batch):
        return step_fn(state, data, batch, bad_step=8)

    with pytest.raises(NonFinite, match=r"step 8 is nan.*that of step 5"):
        run(tmp_path, 20, step=breaks)
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == 5


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    def breaks(state, data, batch):
        state, values = step_fn(state, data, batch)
        bad = jnp.where(state.step == 8, jnp.nan, 1.0)
        return state.replace(params=jax.tree.map(lambda w: w * bad, state.params)), values

    with pytest.raises(NonFinite, match=r"state after step 8 is not finite.*that of step 6"):
        run(tmp_path, 20, step=breaks, save_every=2)
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == 6


@pytest.mark.parametrize("at", [5, 10])
def test_a_signal_is_obeyed_before_an_evaluation_that_is_made_up_for_later(tmp_path, at,
                                                                           monkeypatch):
    def evaluate(state):
        return {"eval/step": float(state.step)}

    def shot(self, step):
        for now, batch in enumerate(batches(self, step), 1):
            if now == at:  # while its batch is fetched
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def evaluated():
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        return [line["eval/step"] for line in map(json.loads, lines) if "eval/step" in line]

    batches = Feed.batches
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Feed, "batches", shot)
        run(tmp_path, 10, evaluate=evaluate)
    assert at not in evaluated()
    for _ in range(2):
        run(tmp_path, 10, evaluate=evaluate)
        assert evaluated() == [5, 10]


def test_sigterm_saves_and_the_next_run_goes_on(tmp_path):
    whole = run(tmp_path / "whole", 20)
    shots = []

    def shoot(state):
        if not shots:
            shots.append(os.kill(os.getpid(), signal.SIGTERM))
        return {}

    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "shot", 20, save_every=1000, evaluate=shoot)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "shot" / "checkpoints")) == 6
    resumed = run(tmp_path / "shot", 20)
    np.testing.assert_array_equal(whole.params["w"], resumed.params["w"])


def kill_once(at):
    """An evaluation during which SIGTERM arrives, at one step, once."""
    shots = []

    def evaluate(state):
        if int(state.step) == at and not shots:
            shots.append(os.kill(os.getpid(), signal.SIGTERM))
        return {"eval/step": float(state.step)}

    return evaluate


class Several:
    """jax, as a process of two sees it."""

    process_count = staticmethod(lambda: 2)

    def __getattr__(self, name):
        return getattr(jax, name)


@pytest.mark.parametrize("several", [False, True])
def test_a_signal_during_the_last_evaluation_is_obeyed(tmp_path, monkeypatch, several):
    """Else another training may begin, and nobody sends the signal again."""
    if several:
        monkeypatch.setattr(train, "jax", Several())
    for _ in range(2):  # the second is made up for later, and nothing is left to train
        with pytest.raises(Interrupted) as stopped:
            run(tmp_path, 10, evaluate=kill_once(10), save_every=1000)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == 10
        lines = [json.loads(t) for t in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["eval/step"] for line in lines if "eval/step" in line] == [5, 10]
        kept = [json.dumps(line) for line in lines if line.get("eval/step") != 10]
        (tmp_path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert int(run(tmp_path, 10, evaluate=kill_once(11)).step) == 10


def test_several_processes_ask_each_other_only_once_their_steps_are_done(tmp_path, monkeypatch):
    did = []

    def note(what, answer):
        did.append(what)
        return answer

    several = Several()
    several.block_until_ready = lambda values: note("waited", jax.block_until_ready(values))
    monkeypatch.setattr(train, "jax", several)
    monkeypatch.setattr(train.multihost, "any_of", lambda value: note("asked", value))
    run(tmp_path, 4, log_every=2, save_every=100)
    assert did == ["waited", "asked", "waited", "asked", "asked"]  # at last nothing runs any more


def test_a_signal_that_comes_too_late_to_be_told_goes_to_who_handled_it_before(tmp_path,
                                                                               monkeypatch):
    def answer(value):
        os.kill(os.getpid(), signal.SIGTERM)
        return value

    seen = []
    monkeypatch.setattr(train.multihost, "any_of", answer)
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert int(run(tmp_path, 5).step) == 5
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_the_loop_moves_nothing_implicitly(tmp_path):
    # It fetches by device_get and places by explicit shardings alone.
    run(tmp_path, 3, around=lambda: jax.transfer_guard("disallow"))


def test_no_key_is_used_twice(tmp_path):
    with jax.debug_key_reuse(True):
        run(tmp_path, 3)
