"""draws.py: SplitMix64 by its published numbers, uniform, and a function of (seed, row, column)."""

import numpy as np

from jax_cl_bd.data import draws


def test_the_mixer_is_splitmix64():
    """The first outputs of the reference generator started at 1234567 (rosettacode.org,
    Pseudo-random numbers/Splitmix64): state k is start + k times the golden gamma."""
    gamma, start = 0x9E3779B97F4A7C15, 1234567
    states = np.array([(start + k * gamma) % 2**64 for k in range(5)], np.uint64)
    assert draws._mix(states).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821]


def test_an_entry_depends_on_seed_row_and_column_alone():
    whole = draws.uniform(3, np.arange(500), 20)
    assert whole.dtype == np.float64 and (0 <= whole).all() and (whole < 1).all()
    np.testing.assert_array_equal(draws.uniform(3, [77, 3], 8), whole[[77, 3], :8])
    assert (draws.uniform(4, np.arange(500), 20) != whole).all()
    assert len(np.unique(whole)) == whole.size


def test_uniform_and_uncorrelated():
    u = draws.uniform(1, np.arange(40_000), 12)
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - u.size / 50) ** 2 / (u.size / 50)).sum() < 95  # chi2 of 49, p = 1e-4
    assert np.abs(np.corrcoef(u.T) - np.eye(12)).max() < 0.025
    for lag in (1, 2, 256):
        assert abs(np.corrcoef(u[:-lag, 0], u[lag:, 0])[0, 1]) < 0.025


def test_subsets_are_even_and_ordered_at_random():
    chosen = draws.subsets(5, np.arange(20_000), 3, 8)
    assert chosen.shape == (20_000, 3) and all(len(set(row)) == 3 for row in chosen[:500].tolist())
    for place in chosen.T:
        assert abs(np.bincount(place, minlength=8) - 2500).max() < 5 * 2500**0.5
    np.testing.assert_array_equal(draws.subsets(5, np.arange(50), 2, 8), chosen[:50, :2])
