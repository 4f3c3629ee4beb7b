"""Outlines of the objects in data/scenes.py, as signed distances.

Each function takes u (right), v (down), float32 arrays in units of the object's radius, and gives
the distance to its outline, negative inside (exact or a close bound: it is used for a soft edge of
one pixel). Each fits into the unit circle or nearly so.
"""

import numpy as np


def circle(u, v):
    return np.hypot(u, v) - np.float32(0.92)


def square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.78)


def triangle(u, v):
    slope = np.float32(0.866) * np.abs(u) - np.float32(0.5) * (v + np.float32(0.08))
    return np.maximum(v - np.float32(0.62), slope - np.float32(0.44))


def star(u, v):
    # Folded into half of one of its five arms, whose edge runs from the tip to the inner corner.
    arm = np.float32(np.pi / 5)
    angle = np.abs((np.arctan2(u, -v) + arm) % (2 * arm) - arm)
    r = np.hypot(u, v)
    x, y = r * np.cos(angle), r * np.sin(angle)
    inner_x, inner_y = np.float32(0.4 * np.cos(np.pi / 5)), np.float32(0.4 * np.sin(np.pi / 5))
    run, rise = np.float32(1) - inner_x, inner_y
    return ((x - 1) * rise + y * run) / np.hypot(run, rise)


def cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - np.float32(0.92), np.minimum(u, v) - np.float32(0.27))


def heart(u, v):
    side, v = np.float32(0.78), v + np.float32(0.05)
    point = (np.abs(u) + np.abs(v) - side) * np.float32(0.7071)
    lobe = np.hypot(np.abs(u) - side / 2, v + side / 2) - side * np.float32(0.7071)
    return np.minimum(point, lobe)


def ring(u, v):
    return np.abs(np.hypot(u, v) - np.float32(0.72)) - np.float32(0.2)


def crescent(u, v):
    bite = np.float32(0.72) - np.hypot(u - np.float32(0.45), v)
    return np.maximum(np.hypot(u, v) - np.float32(0.95), bite)


def diamond(u, v):
    return (np.abs(u) * np.float32(1 / 0.55) + np.abs(v) - np.float32(1)) * np.float32(0.48)


def bowtie(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(u - np.float32(0.92),
                      (v - np.float32(0.72) * u - np.float32(0.06)) * np.float32(0.81))


def bar(u, v):
    return np.maximum(np.abs(u) - np.float32(0.95), np.abs(v) - np.float32(0.28))


def cup(u, v):
    hollow = np.maximum(np.abs(u) - np.float32(0.38), v - np.float32(0.34))
    return np.maximum(np.maximum(np.abs(u), np.abs(v)) - np.float32(0.82), -hollow)


SHAPES = {shape.__name__: shape for shape in (
    circle, square, triangle, star, cross, heart, ring, crescent, diamond, bowtie, bar, cup)}
