"""Several patches at once: where they lie, what they show, and what a small box shows."""

import jax
import ml_collections
import numpy as np
import pytest

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import several_patches

KEY = jax.random.key(5)


def settings(**changes):
    base = dict(name="several_patches", patches=3, size=3, opacity=1.0, train_place="random",
                train_box=(0.0, 1.0), test_place="random", test_box=(0.1, 0.9))
    return ml_collections.ConfigDict({**base, **changes})


def made(**changes):
    return several_patches.init(settings(**changes), jax.random.key(0))


def put(params, images, boxes, key=KEY):
    return np.asarray(jax.jit(several_patches.apply)(params, images, np.array(boxes), key))


def by_loops(params, images, boxes):
    """Pieces pasted into the corners of whole-pixel boxes, in NumPy."""
    out, size = images.copy(), params["image"].shape[1]
    for image, (y, x, h, w) in zip(out, boxes):
        places = [(y, x), (y + h - size, x + w - size), (y, x + w - size), (y + h - size, x)]
        for piece, (down, across) in zip(params["image"], places):
            here = np.s_[down:down + size, across:across + size]
            image[here] += params["opacity"] * (piece - image[here])
    return out


@pytest.mark.parametrize("patches, opacity", [(2, 1.0), (3, 0.6), (4, 1.0)])
def test_pieces_lie_in_the_corners_of_the_box(patches, opacity):
    params = made(patches=patches, opacity=opacity)
    images = np.random.default_rng(0).random((4, 24, 20, 3)).astype(np.float32)
    boxes = [(0, 0, 24, 20), (3, 5, 6, 6), (1, 2, 12, 9), (10, 4, 7, 16)]
    np.testing.assert_allclose(put(params, images, boxes), by_loops(params, images, boxes),
                               rtol=0, atol=1e-5)
    np.testing.assert_array_equal(put(params, images, boxes, jax.random.key(6)),
                                  put(params, images, boxes))  # the key has no say
    np.testing.assert_array_equal(put(params, images, np.zeros((4, 4))), images)


def test_a_small_box_shows_one_piece_that_the_key_draws():
    params = made()
    images = np.full((60, 8, 8, 3), 0.5, np.float32)
    out = put(params, images, [(2, 4, 3, 3)] * 60)
    shown = out[:, 2:5, 4:7]
    likeness = np.abs(shown[:, None] - params["image"][None]).max(axis=(2, 3, 4)) < 1e-5
    assert (likeness.sum(1) == 1).all() and likeness.sum(0).min() > 8  # each of the three
    changed = (out != images).any(-1)
    changed[:, 2:5, 4:7] = False
    assert not changed.any()
    np.testing.assert_array_equal(put(params, images[:7], [(2, 4, 3, 3)] * 7), out[:7])


def test_places_fill_the_box_of_their_phase_and_depend_on_their_row_alone():
    sizes = np.full((4000, 2), 32)
    for training, low, high in ((True, 0, 32), (False, 3, 28)):
        boxes = several_patches.place(settings(), sizes, np.random.default_rng(0),
                                      training=training)
        for axis in (0, 1):
            first, last = boxes[:, axis], boxes[:, axis] + boxes[:, 2 + axis]
            assert first.min() == low and last.max() == high
            np.testing.assert_array_equal(np.unique(boxes[:, 2 + axis]),
                                          np.arange(6, high - low + 1))
        again = several_patches.place(settings(), sizes[:9], np.random.default_rng(0),
                                      training=training)
        np.testing.assert_array_equal(again, boxes[:9])
    centre = several_patches.place(settings(test_place="center"), [(32, 40), (8, 8)],
                                   np.random.default_rng(0), training=False)
    np.testing.assert_array_equal(centre, [(8, 10, 16, 20), (1, 1, 6, 6)])


def test_others_of_the_kind_and_other_pictures_keep_the_places():
    params, images, box = made(), np.full((1, 16, 16, 3), 0.2, np.float32), [(1, 2, 13, 9)]
    picture = np.full((80, 80, 3), 0.7, np.float32)
    covered = (put(params, images, box) != images).any(-1)
    for other in (several_patches.same_kind(params, jax.random.key(1)),
                  several_patches.showing(params, picture)):
        out = put(other, images, box)
        np.testing.assert_array_equal((out != images).any(-1), covered)
        assert np.abs(out - put(params, images, box)).max() > 0.1
    np.testing.assert_allclose(out[covered], 0.7, atol=1e-5)
    assert covered.sum() == 27


@pytest.mark.parametrize("changes, message", [
    (dict(patches=1), "patches is 1; several patches are 2 to 4"),
    (dict(patches=5), "2 to 4"), (dict(size=0), "at least 1"),
    (dict(opacity=0.0), "weight of the trigger"),
    (dict(train_place="four_corners"), "unknown attack.trigger.train_place"),
    (dict(test_box=(0.9, 0.1)), "0 <= low < high")])
def test_settings_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        several_patches.check(settings(**changes))


def test_no_room_is_said_with_the_size_that_fits():
    with pytest.raises(UserError, match=r"test_box of an image of 14 x 16 px.*size=5 or less"):
        several_patches.place(settings(size=6), [(32, 32), (14, 16)], np.random.default_rng(0),
                              training=False)
    several_patches.place(settings(size=5), [(14, 16)], np.random.default_rng(0), training=False)
