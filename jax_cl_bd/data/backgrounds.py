"""What lies behind the objects of data/scenes.py: patterns and dim colours, in two disjoint sets.

The first set is that of training and tests; the second (OTHER_PATTERNS, OTHER_COLORS) belongs to
the shifted split, and no caption has words for it.
"""

import numpy as np

from jax_cl_bd.data import draws

# sRGB in [0, 1], dim beside the objects' colours.
COLORS = {"red": (.38, .14, .14), "green": (.12, .30, .14), "blue": (.12, .17, .42),
          "brown": (.36, .25, .14), "purple": (.27, .14, .36), "gray": (.36, .36, .36),
          "black": (.07, .07, .07), "teal": (.10, .31, .33)}
PATTERNS = ("plain", "gradient", "tiled", "lined", "noisy", "cloudy", "wavy")
OTHER_COLORS = {"olive": (.33, .32, .08), "rust": (.46, .21, .06), "plum": (.36, .10, .26),
                "sage": (.28, .39, .29), "steel": (.22, .31, .42), "sand": (.47, .41, .31)}
OTHER_PATTERNS = ("ringed", "bricked", "speckled", "zigzag", "hatched")


def draw(facts: dict, side: int, noise_seed: int, row: int) -> np.ndarray:
    """One background, float32 [3, side, side]; `facts` of data/scenes.py."""
    colors, patterns = ((OTHER_COLORS, OTHER_PATTERNS) if facts["shifted"] else (COLORS, PATTERNS))
    shade = np.float32(0.85 + 0.3 * facts["background_shade"])
    color = np.float32(tuple(colors.values())[facts["background_color"]])[:, None, None] * shade
    pattern = _pattern(patterns[facts["background"]], facts, side, noise_seed, row)
    return color * (1 + np.float32(0.25) * pattern) + np.float32(0.03) * pattern


def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the pixels, float32 [side, 1] and [1, side]."""
    centers = np.arange(side, dtype=np.float32) + np.float32(0.5)
    return centers[:, None], centers[None, :]


def _pattern(kind, facts, side, noise_seed, row):
    # float32 [side, side] in [-1, 1]
    y, x = grid(side)
    angle, phase, unit = 2 * np.pi * facts["direction"], 2 * np.pi * facts["phase"], 32 / side
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == "gradient":
        return (along - along.mean()) * np.float32(1.4 / side)
    if kind == "lined":
        return np.sin(along * np.float32(1.3 * unit) + np.float32(phase))
    if kind == "wavy":
        bend = np.sin(x * np.float32(0.35 * unit) + np.float32(phase)) * 3
        return np.sin(y * np.float32(0.9 * unit) + bend + np.float32(angle))
    if kind == "tiled":
        cell = np.float32(4 / unit)
        even = (np.floor((x + cell * facts["phase"]) / cell)
                + np.floor((y + cell * facts["direction"]) / cell)) % 2
        return (even * 2 - 1).astype(np.float32)
    if kind == "noisy":
        return _noise(noise_seed, row, side)
    if kind == "cloudy":
        coarse, up = _noise(noise_seed, row, 5), _enlarge(side)
        return up @ coarse @ up.T
    if kind == "plain":
        return np.zeros((side, side), np.float32)
    return _other(kind, facts, side, noise_seed, row, x * np.float32(unit), y * np.float32(unit))


def _other(kind, facts, side, noise_seed, row, x, y):
    # The same for the shifted split; x, y in units of 1 / 32 of the side.
    right, down = np.float32(32 * facts["phase"]), np.float32(32 * facts["direction"])
    if kind == "ringed":  # circles around a place of the image
        return np.sin(np.hypot(x - right, y - down) * np.float32(1.1))
    if kind == "bricked":  # lines of bricks, every other one moved by half
        course = np.floor((y + down) / 5)
        joint = ((x + right + 4 * (course % 2)) % 8 < 1) | ((y + down) % 5 < 1)
        return np.where(joint, np.float32(-1), np.float32(0.6))
    if kind == "speckled":  # one pixel of eight is bright
        return np.where(_noise(noise_seed, row, side) > 0.75, np.float32(1), np.float32(-0.3))
    if kind == "zigzag":
        fold = np.abs((x + right) % 8 - 4)
        return np.where((y + down + fold) % 6 < 3, np.float32(0.8), np.float32(-0.8))
    diagonals = np.sin((x + y + right) * np.float32(0.8)), np.sin((x - y + down) * np.float32(0.8))
    return np.maximum(*diagonals)  # hatched


def _noise(seed, row, side):
    u = draws.uniform(seed, np.array([row]), side * side)
    return (u.reshape(side, side) * 2 - 1).astype(np.float32)


def _enlarge(side):
    at = np.linspace(0, 4, side)[:, None]
    return np.clip(1 - np.abs(at - np.arange(5)), 0, None).astype(np.float32)
