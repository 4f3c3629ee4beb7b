"""What training costs while it runs: its rate, where the time goes, memory, MFU, a profile."""

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
from etils import epath

from jax_cl_bd import flops

# Dense bf16 peak of a device, FLOP/s, by the beginning of its name, the first that fits: NVIDIA's
# data sheets of the H100 (SXM, PCIe, NVL), H200 (SXM, NVL) and A100, half of their figures with
# sparsity, and docs.cloud.google.com/tpu/docs. MFU of other devices is not known.
PEAKS = (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100", 989e12),
         ("NVIDIA H200 NVL", 835e12), ("NVIDIA H200", 989e12), ("NVIDIA A100", 312e12),
         ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12),
         ("TPU v6", 918e12))
STARVES = 0.2  # share of the time at the feed that is worth a warning
SETTLED = 20  # steps after which the feed's first filling no longer counts


def peak_flops() -> float | None:
    """Peak FLOP/s of one device, or None where it is not known."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS if kind.startswith(name)), None)


def peak_memory() -> int | None:
    """The most bytes that a device of this process held at once; None on a CPU."""
    found = [stats["peak_bytes_in_use"] for d in jax.local_devices()
             if (stats := d.memory_stats()) and "peak_bytes_in_use" in stats]
    return max(found, default=None)


class Watch:
    """Rates since the last look: images per second, the share of the time at the feed, MFU.

    A CPU is host and device at once: a feed that waits there for the cores starves nobody, so
    there it is not warned of.
    """

    def __init__(self, label: str, batch_size: int, step: int, devices: int = 1):
        self.label, self.batch_size, self.devices = label, batch_size, devices
        self.first, self.warned, self.last = step, False, {}
        self.flops, self.peak = None, peak_flops()
        self.host_is_device = jax.default_backend() == "cpu"
        self.reset(step)

    def reset(self, step: int) -> None:
        """Begins anew, so that what was measured and saved in between does not count."""
        self.step, self.begun, self.waited = step, time.monotonic(), 0.0

    def count(self, step_fn, state, data, batch, steps: int = 1) -> None:
        """Counts the FLOPs of one step, once, where a peak is known to set them against.

        `batch`: of a dispatch of so many `steps`, with an axis for them if there are several.
        """
        if self.flops is None and self.peak is not None:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[steps > 1:], x.dtype), batch)
            self.flops = flops.count(step_fn, state, data, one)

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; notes how long each is waited for."""
        while True:
            begun = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - begun
            yield batch

    def read(self, step: int) -> dict[str, float]:
        """{"images_per_second", "feed_wait": share of the time} and, where they are known,
        "peak_memory_bytes" of a device and "mfu"."""
        elapsed = time.monotonic() - self.begun
        rate = (step - self.step) / elapsed
        self.last = {"images_per_second": rate * self.batch_size,
                     "feed_wait": self.waited / elapsed}
        if (memory := peak_memory()) is not None:
            self.last["peak_memory_bytes"] = memory
        if self.flops is not None:
            self.last["mfu"] = rate * self.flops / (self.peak * self.devices)
        if (self.last["feed_wait"] > STARVES and step > self.first + SETTLED
                and not self.warned and not self.host_is_device):
            self.warned = True
            print(f"warning: {self.label} waits for its feed {self.last['feed_wait']:.0%} of the "
                  "time; raise --config.data.workers, or hold the images in device memory with "
                  "--config.data.feed=resident", file=sys.stderr)
        return dict(self.last)

    def __str__(self) -> str:
        known = self.last
        said = [f"{known['images_per_second']:,.0f} images/s"]
        if not self.host_is_device:
            said.append(f"{known['feed_wait']:.0%} of the time at the feed")
        if "peak_memory_bytes" in known:
            said.append(f"{known['peak_memory_bytes'] / 1e9:.2f} GB of a device's memory")
        if "mfu" in known:
            said.append(f"MFU {known['mfu']:.2f}")
        return f"{self.label}: at the end {', '.join(said)}"


class Profile:
    """Traces steps first + 1 to first + count into folder/profile, for TensorBoard or Perfetto.

    Dispatches are traced whole. A count of 0 traces nothing; steps before those of a resumed run
    are left out.
    """

    def __init__(self, folder: epath.Path, first: int, count: int):
        self.folder, self.first, self.last = folder / "profile", first, first + count
        self.running = False

    def before(self, step: int, count: int) -> None:
        """Told of the steps done before each dispatch, and how many it does."""
        if not self.running and step < self.last and step + count > self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, step: int, values) -> None:
        """Told of the steps done after it, with its results."""
        if self.running and step >= self.last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self.running:
            self.running = False
            with contextlib.suppress(RuntimeError):  # of a run that breaks
                jax.profiler.stop_trace()
                print(f"profile: {self.folder}", flush=True)
