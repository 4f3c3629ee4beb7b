"""The loop: resume, dispatches, signals, non-finite losses; with a model that compiles at once."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax import monitoring

from jax_cl_bd import checkpoint, train
from jax_cl_bd.train import Interrupted, NonFinite
from tests.toy_loop import DATA, Feed, init, losses, run, step_fn


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


@pytest.mark.parametrize("what, dispatch, saved", [("loss", 1, 7), ("loss", 5, 5), ("state", 1, 7)])
def test_of_models_trained_together_the_one_that_diverges_is_named(tmp_path, what, dispatch, saved):
    """Of four, the second at step 8."""
    def first(key):
        return jax.vmap(init)(jax.random.split(key, 4))

    def step(state, data, batch):
        state, values = jax.vmap(step_fn, in_axes=(0, None, None))(state, data, batch)
        bad = jnp.where((state.step == 8) & (jnp.arange(4) == 1), jnp.nan, 1.0)
        if what == "state":
            state = state.replace(params={"w": state.params["w"] * bad[:, None]})
        loss = values["loss"] * (bad if what == "loss" else 1)
        return state, {f"{i}/loss": loss[i] for i in range(4)} | {"loss": loss.mean()}

    with pytest.raises(NonFinite, match=rf"{what} .*step 8 is (nan|not finite), of seed=1; .*that "
                                        f"of step {saved}.*leave out what diverges"):
        run(tmp_path, 20, step=step, first=first, dispatch=dispatch, save_every=1,
            members=[f"seed={i}" for i in range(4)])
    assert checkpoint.newest_good_step(epath.Path(tmp_path / "checkpoints")) == saved


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
