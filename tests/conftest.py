"""One process, 8 simulated CPU devices, and compiled programs kept between runs."""

import os
from pathlib import Path

# All of this has to stand before the first import of jax. JAX_PLATFORMS=cuda pytest -m gpu works.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Devices share few cores: one may wait long for another, which XLA would take for a deadlock.
_XLA_FLAGS = {"--xla_force_host_platform_device_count": 8,
              "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
              "--xla_cpu_collective_call_terminate_timeout_seconds": 600}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given] + [f"{k}={v}" for k, v in _XLA_FLAGS.items() if k not in _given]).strip()
# XLA runs a thread for each device; BLAS (SciPy, scikit-learn) must not add one for each core.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "2")
# By environment, so that the processes that tests start use the same cache.
_cache = Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # grain and config files look at flags


def pytest_collection_modifyitems(items):
    """Skips what needs a device that is not here, also under `make test-all`."""
    for kind in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(kind)]
        if marked and not _has(kind):
            skip = pytest.mark.skip(reason=f"needs a {kind.upper()} and JAX_PLATFORMS set to it")
            for item in marked:
                item.add_marker(skip)


def _has(kind):
    try:
        return bool(jax.devices(kind))
    except RuntimeError:
        return False
