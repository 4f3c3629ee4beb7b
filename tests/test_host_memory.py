"""Freed pages are kept: a buffer taken again and again faults its pages in once."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from jax_cl_bd import host_memory
done = sys.argv[1] == "keep" and host_memory.keep_pages()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    np.ones(2**26, np.uint8)
before = faults()
for _ in range(10):
    np.ones(2**26, np.uint8)
print(int(done), faults() - before)
"""


def _faults(word: str) -> tuple[bool, int]:
    out = subprocess.run([sys.executable, "-c", PROGRAM, word], check=True, capture_output=True,
                         text=True).stdout.split()
    return bool(int(out[0])), int(out[1])


def test_freed_pages_are_kept():
    done, kept = _faults("keep")
    if not done:
        pytest.skip("the C library is not glibc")
    _, given_back = _faults("leave")
    assert given_back >= 10  # at least once per buffer, huge pages or not
    assert kept < given_back / 5


def test_other_systems_are_left_alone(monkeypatch):
    from jax_cl_bd import host_memory

    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert not host_memory.keep_pages()
