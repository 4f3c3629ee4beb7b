"""The picture that recurs, among objects that are alike but not the same."""

import numpy as np
import pytest

from jax_cl_bd.defenses import _recurring
from jax_cl_bd.defenses._find_trigger import Candidate


def scene(rng, side):
    """A disc of some colour on a smooth background: what edges there are resemble each other."""
    y, x = np.mgrid[:side, :side] / side
    image = rng.integers(40, 200, 3) + 40 * (rng.normal() * x + rng.normal() * y)[..., None]
    at, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.25)
    image[(y - at[0])**2 + (x - at[1])**2 < radius**2] = rng.integers(0, 256, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def plain(rng, side, count=40):
    return np.stack([scene(rng, side) for _ in range(count)])


def suspected(rng, patch, *, side, shown, objects, around=2):
    """Images with the patch somewhere, and some with none; a box around it, or around anything."""
    images, boxes, true = [], [], []
    height, width = patch.shape[:2]
    for i in range(shown + objects):
        image = scene(rng, side)
        y, x = (int(rng.integers(0, side - n + 1)) for n in (height, width))
        if i < shown:
            image[y:y + height, x:x + width] = patch
        top, left = max(0, y - around), max(0, x - around)
        images.append(image)
        boxes.append((top, left, min(side, y + height + around) - top,
                      min(side, x + width + around) - left))
        true.append((y, x, height, width))
    return ([Candidate(i, 3, box, images[i], 0.9) for i, box in enumerate(boxes)],
            np.stack(images), true)


@pytest.mark.parametrize("side, size", [
    (32, (5, 5)), (32, (4, 9)), pytest.param(128, (12, 16), marks=pytest.mark.slow)])
def test_a_patch_is_framed_to_the_pixel(side, size):
    rng = np.random.default_rng(side + size[1])
    patch = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    candidates, shown, true = suspected(rng, patch, side=side, shown=12, objects=6)
    found = _recurring.find(candidates, shown, plain(rng, len(shown[0])))
    np.testing.assert_array_equal(found.pixels, patch)
    assert [c.row for c in found.where] == list(range(12))
    for c in found.where:
        assert c.box == true[c.row]
        np.testing.assert_array_equal(c.pixels, patch)


@pytest.mark.parametrize("plain_lines", [[0], [0, 1, 3, 4]])
def test_plain_lines_at_the_edge_of_a_patch_belong_to_it(plain_lines):
    rng = np.random.default_rng(8)  # as in optimised patches, whose pixels are saturated
    patch = 255 * rng.integers(0, 2, (5, 5, 3)).astype(np.uint8)
    patch[plain_lines] = (255, 0, 255)
    patch[:, plain_lines] = (255, 0, 255)
    candidates, shown, true = suspected(rng, patch, side=32, shown=12, objects=6)
    found = _recurring.find(candidates, shown, plain(rng, 32))
    np.testing.assert_array_equal(found.pixels, patch)
    assert [c.box for c in found.where] == true[:12]


def test_objects_that_resemble_each_other_do_not_recur():
    rng = np.random.default_rng(1)
    patch = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    candidates, shown, _ = suspected(rng, patch, side=32, shown=0, objects=20, around=4)
    assert _recurring.find(candidates, shown, plain(rng, len(shown[0]))) is None
    # A patch in too few of the images, and too few images.
    candidates, shown, _ = suspected(rng, patch, side=32, shown=6, objects=14)
    assert _recurring.find(candidates, shown, plain(rng, len(shown[0]))) is None
    candidates, shown, _ = suspected(rng, patch, side=32, shown=4, objects=0)
    assert _recurring.find(candidates, shown, plain(rng, len(shown[0]))) is None


def test_a_patch_of_another_brightness_is_another_patch():
    rng = np.random.default_rng(2)
    patch = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    candidates, shown, true = suspected(rng, patch, side=32, shown=12, objects=0)
    for image, (y, x, h, w) in zip(shown[:8], true):
        image[y:y + h, x:x + w] = rng.uniform(0.2, 0.5) * patch
    assert _recurring.find(candidates, shown, plain(rng, len(shown[0]))) is None


def test_a_plain_ground_is_no_picture_whatever_its_colour():
    shown = np.broadcast_to(np.uint8([110, 160, 215]), (6, 32, 32, 3))
    flat = [Candidate(i, 0, (4, 4, 8, 8), shown[i, 4:12, 4:12], 0.9) for i in range(6)]
    assert _recurring.find(flat, shown, shown) is None


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (110, 160, 215)])
def test_a_patch_does_not_grow_into_the_ground_that_images_share(colour):
    rng = np.random.default_rng(4)
    patch = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    shown = np.broadcast_to(np.uint8(colour), (10, 32, 32, 3)).copy()
    at = rng.integers(4, 22, (10, 2))
    for image, (y, x) in zip(shown, at):
        image[y:y + 5, x:x + 6] = patch
    candidates = [Candidate(i, 0, (y - 2, x - 2, 9, 10), shown[i], 0.9)
                  for i, (y, x) in enumerate(at.tolist())]
    found = _recurring.find(candidates, shown, np.broadcast_to(np.uint8(colour), (4, 32, 32, 3)))
    np.testing.assert_array_equal(found.pixels, patch)
    assert [c.box for c in found.where] == [(y, x, 5, 6) for y, x in at.tolist()]


def test_what_clean_images_show_too_is_no_trigger():
    rng = np.random.default_rng(5)
    patch = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)  # such as a channel's logo
    candidates, shown, _ = suspected(rng, patch, side=32, shown=12, objects=4)
    _, clean, _ = suspected(rng, patch, side=32, shown=5, objects=35)
    assert _recurring.find(candidates, shown, clean) is None
    _, clean, _ = suspected(rng, patch, side=32, shown=1, objects=39)  # one poison among them
    np.testing.assert_array_equal(_recurring.find(candidates, shown, clean).pixels, patch)


def test_likeness_is_that_of_numpy():
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (2, 9, 8, 3)).astype(np.uint8)
    t = rng.integers(0, 256, (3, 3, 3, 3)).astype(np.uint8)
    t[1] = x[1, 5:8, 2:5]
    like, place = (np.asarray(v) for v in _recurring._likeness(x, t))
    for k, picture in enumerate(t / 255):
        spread = picture.var((0, 1)).sum() * 9
        for n, image in enumerate(x / 255):
            r = [1 - ((image[i:i + 3, j:j + 3] - picture)**2).sum() / spread
                 for i in range(7) for j in range(6)]
            assert like[k, n] == pytest.approx(max(r), abs=1e-4) and place[k, n] == np.argmax(r)
    assert like[1, 1] == pytest.approx(1, abs=1e-5) and place[1, 1] == 5 * 6 + 2
