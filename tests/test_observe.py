"""What training says of its own cost."""

import types

import jax
import jax.numpy as jnp
import pytest

from jax_cl_bd import flops, observe


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def feed(self, seconds):
        while True:
            self.now += seconds
            yield {}


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(observe, "time", made)
    monkeypatch.setattr(observe, "SETTLED", 1)
    return made


def look(watch, batches, clock, steps):
    """What is read after each step of 3 seconds."""
    for step in range(1, steps + 1):
        next(batches)
        clock.now += 3.0
        yield watch.read(step)
        clock.now += 50.0  # measuring and saving
        watch.reset(step)


def test_a_feed_that_starves_the_device_is_named_once(capsys, clock, monkeypatch):
    monkeypatch.setattr(observe.jax, "default_backend", lambda: "gpu")
    watch = observe.Watch("pretrain victim", 8, 0)
    for found in look(watch, watch.timed(clock.feed(1.0)), clock, 4):
        assert found == {"images_per_second": 2.0, "feed_wait": 0.25}
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1 and "pretrain victim waits for its feed 25% of the time" in warned[0]
    assert "data.workers" in warned[0]
    assert str(watch) == "pretrain victim: at the end 2 images/s, 25% of the time at the feed"


def test_a_cpu_that_is_its_own_host_is_not(capsys, clock):
    watch = observe.Watch("x", 8, 0)
    assert all(found["feed_wait"] == 0.25
               for found in look(watch, watch.timed(clock.feed(1.0)), clock, 4))
    assert not capsys.readouterr().err and str(watch) == "x: at the end 2 images/s"


def test_a_feed_that_keeps_up_is_not(capsys, clock, monkeypatch):
    monkeypatch.setattr(observe.jax, "default_backend", lambda: "gpu")
    watch = observe.Watch("x", 8, 0)
    for found in look(watch, watch.timed(clock.feed(0.5)), clock, 4):
        assert found["feed_wait"] == pytest.approx(1 / 7)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12), ("NVIDIA T4", None)])
def test_the_peak_is_that_of_the_very_card(monkeypatch, name, peak):
    device = types.SimpleNamespace(device_kind=name)
    monkeypatch.setattr(observe.jax, "devices", lambda: [device])
    assert observe.peak_flops() == peak


def test_mfu_is_flops_over_the_peak_of_known_devices(monkeypatch, clock):
    assert observe.Watch("x", 1, 0).peak is None  # of a CPU
    monkeypatch.setattr(observe, "peak_flops", lambda: 1e6)
    watch = observe.Watch("x", 4, 0)
    calls = []

    def step(state, data, batch):
        calls.append(1)
        return state @ data, batch.shape

    for _ in range(2):
        watch.count(step, jnp.ones((10, 20)), jnp.ones((20, 30)), jnp.ones((3, 7)), 3)
    assert watch.flops == 2 * 10 * 20 * 30 and len(calls) == 1
    clock.now += 0.5
    assert watch.read(1)["mfu"] == pytest.approx(2 * 12_000 / 1e6)


def test_a_profile_holds_its_window(tmp_path):
    from etils import epath

    profile, folder = observe.Profile(epath.Path(tmp_path), 1, 2), tmp_path / "profile"
    seen = []
    for step in range(1, 5):
        profile.before(step - 1, 1)
        seen.append(profile.running)
        profile.after(step, jax.jit(jnp.sin)(jnp.ones(4)))
    assert seen == [False, True, True, False] and not profile.running
    assert list(folder.rglob("*.xplane.pb"))
    never = observe.Profile(epath.Path(tmp_path / "none"), 0, 0)
    never.before(0, 1)
    assert not never.running


def test_flops_of_products_loops_and_convolutions():
    def loop(w, x):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0].sum()

    w, x = jnp.ones((8, 8)), jnp.ones((16, 8))
    assert flops.count(loop, w, x) == 3 * 2 * 16 * 8 * 8
    assert flops.count(jax.grad(loop, (0, 1)), w, x) == 3 * 3 * 2 * 16 * 8 * 8
    recomputed = jax.grad(jax.checkpoint(loop), (0, 1))  # its last products too
    assert flops.count(recomputed, w, x) == 4 * 3 * 2 * 16 * 8 * 8

    def conv(kernel, image):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    kernel, image = jnp.ones((3, 3, 8, 16)), jnp.ones((4, 32, 32, 8))
    forward = 2 * 4 * 16 * 16 * 16 * 9 * 8
    assert flops.count(conv, kernel, image) == forward
    assert flops.count(jax.grad(conv, (0, 1)), kernel, image) == 3 * forward
