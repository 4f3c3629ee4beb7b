"""How the C library keeps memory between training steps on a CPU."""

import ctypes
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_pages() -> bool:
    """Makes glibc keep the pages of freed buffers; call it before jax allocates anything.

    On a CPU, XLA allocates a step's buffers anew with malloc. By default glibc takes large ones
    from the system by mmap and gives them back at once, so that every step faults in and zeroes the
    same pages again; docs/results.md ("Speed") has what that costs. The process then keeps its
    peak of memory until it ends.

    Returns:
        Whether it was done: not where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return all([mallopt(name, value) == 1 for name, value in settings])
