"""Random numbers as a pure function of (seed, row, column), for many rows at once.

A generator per row would cost 20 microseconds to seed; a counter hashed by SplitMix64 (Steele, Lea
and Flood 2014, the finaliser of Java's SplittableRandom) costs nanoseconds and needs no state.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniform(seed: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """Draws float64 [N, columns] in [0, 1): entry (row, c) depends on seed, row and c alone."""
    rows = np.asarray(rows, np.uint64).reshape(-1, 1)
    key = _mix(np.full((1, 1), seed, np.uint64))
    bits = _mix(_mix(rows ^ key) + np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)) * 2.0**-53


def subsets(seed: int, rows: np.ndarray, k: int, n: int) -> np.ndarray:
    """Draws for each row k different numbers below n, in random order: int64 [N, k]."""
    return np.argsort(uniform(seed, rows, n), axis=1, kind="stable")[:, :k]


def _mix(x):
    # Arrays wrap around silently, which is what is wanted; NumPy scalars would warn.
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))
