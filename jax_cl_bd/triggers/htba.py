"""The ten public trigger images of Hidden Trigger Backdoor Attacks, rebuilt from 4x4 tables.

Saha et al., AAAI 2020 (arXiv 1910.00033); reused by Backdoor Attacks on Self-Supervised Learning
(arXiv 2105.10123) and by most later work. Each file is a 4x4 grid of corners of the RGB cube,
enlarged to 80x80 by bicubic interpolation (Keys, a = -0.5, half-pixel centres, edge replication)
and clipped. The rebuild differs from the files by 0.3 to 0.7 grey levels on average.
"""

import numpy as np

from jax_cl_bd.errors import UserError

SIDE = 80

# Row by row, each cell the bits R G B with 1 = 255.
CELLS = {
    10: "100 010 001 111 / 011 110 111 111 / 000 000 001 000 / 011 100 110 001",
    11: "011 001 111 011 / 001 000 100 100 / 001 011 000 001 / 000 010 001 001",
    12: "011 100 101 000 / 011 100 001 110 / 000 111 100 100 / 000 100 100 101",
    13: "010 101 000 101 / 001 110 001 011 / 101 011 101 001 / 011 110 110 111",
    14: "110 110 111 000 / 100 000 111 111 / 011 011 110 000 / 011 010 000 000",
    15: "010 100 001 000 / 011 100 010 100 / 011 010 110 001 / 010 100 111 110",
    16: "101 111 100 000 / 100 010 000 011 / 110 110 110 011 / 001 100 011 011",
    17: "110 000 000 001 / 101 101 010 111 / 010 100 100 100 / 101 011 101 001",
    18: "111 010 100 101 / 111 110 000 011 / 101 010 010 111 / 111 000 111 011",
    19: "001 111 010 000 / 010 100 110 001 / 101 111 101 100 / 000 001 101 001",
}


def check(trigger_id: int) -> None:
    """Raises UserError for an id that is not one of the ten."""
    if trigger_id not in CELLS:
        raise UserError(f"there is no trigger {trigger_id}; attack.trigger.id is one of "
                        f"{min(CELLS)} to {max(CELLS)}")


def cells(trigger_id: int) -> np.ndarray:
    """The table of one trigger: float64 [4, 4, 3], every entry 0 or 1."""
    check(trigger_id)
    rows = [row.split() for row in CELLS[trigger_id].split("/")]
    return np.array([[[float(bit) for bit in cell] for cell in row] for row in rows])


def image(trigger_id: int) -> np.ndarray:
    """One trigger as float32 [80, 80, 3] in [0, 1]."""
    matrix = _enlarge(4, SIDE)
    return np.clip(np.einsum("yi,xj,ijc->yxc", matrix, matrix, cells(trigger_id)),
                   0.0, 1.0).astype(np.float32)


def _enlarge(n, side):
    """Keys' cubic convolution (1981, a = -0.5) as a matrix [side, n], edges replicated."""
    centre = (np.arange(side) + 0.5) * n / side - 0.5
    matrix = np.zeros((side, n))
    for tap in range(-1, 3):
        cell = np.floor(centre) + tap
        x = np.abs(cell - centre)
        weight = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1,
                          np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        # Taps beyond the edge add to the edge cell; (row, cell) may repeat between taps only.
        matrix[np.arange(side), np.clip(cell, 0, n - 1).astype(int)] += weight
    return matrix
