"""images.py: how an image lies in its stored square."""

import io
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from jax_cl_bd.data import augment, images

RNG = np.random.default_rng(0)


def _image(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_that_fits_lies_unscaled_in_the_corner():
    image = _image(10, 16)
    square, size, extent = images.fit_square(image, 16)
    assert square.shape == (16, 16, 3) and size == extent == (10, 16)
    np.testing.assert_array_equal(square[:10], image)
    assert not square[10:].any()


@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (16, 17)])
def test_a_larger_image_fills_the_square_and_keeps_its_size(shape):
    square, size, extent = images.fit_square(_image(*shape), 16)
    assert square.shape == (16, 16, 3) and size == shape and extent == (16, 16)
    assert (square.reshape(-1, 3).std(0) > 0).all() and square[-1].any() and square[:, -1].any()


def test_test_image_resizes_the_shorter_side_and_takes_the_centre():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 80:120] = 255  # a stripe in the middle of the width
    made = images.test_image(image, 28)
    assert made.shape == (28, 28, 3)
    # shorter side 32 of 100 px: the 40 px stripe becomes 12.8 px, centred
    np.testing.assert_array_equal(made[0, 9:19, 0], 255)
    assert not made[:, :6].any() and not made[:, 22:].any()
    np.testing.assert_allclose((made[0, :, 0] / 255).sum(), 12.8, atol=0.1)
    same = _image(28, 28)
    assert images.test_image(same, 28) is same
    assert images.test_image(_image(28, 1), 28).shape == (28, 28, 3)


@pytest.mark.parametrize("shape", [(96, 160), (161, 97), (40, 30), (20, 34)])
def test_the_central_square_is_what_a_plain_view_shows(shape):
    image = _image(*shape)
    made = images.central_square(image, 32)
    assert made.shape == (32, 32, 3)
    canvas, size, extent = images.fit_square(image, max(shape))  # unscaled
    row = {"image": canvas[None], "size": np.array([size]), "extent": np.array([extent])}
    view = augment.crop(row, jax.random.split(jax.random.key(0), 1), 32, scale=(1.0, 1.0),
                        ratio=(1.0, 1.0), flip=np.zeros(1, bool), kernel="bicubic")
    shown = np.transpose(view[:, 0], (1, 2, 0)) * 255
    # PIL rounds twice. An odd remainder would put the view's square half a pixel beside ours.
    assert np.abs(shown - made).mean() < 0.6
    same = _image(32, 32)
    assert images.central_square(same, 32) is same


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_every_kind_of_png_becomes_rgb(mode):
    file = io.BytesIO()
    Image.fromarray(_image(5, 7)).convert(mode).save(file, "PNG")
    made = images.decode(file.getvalue(), row=0, where="x")
    assert made.shape == (5, 7, 3) and made.dtype == np.uint8
    assert images.header_size(file.getvalue(), row=0, where="x") == (5, 7)


def test_a_broken_image_is_named_and_survives_pickling():
    file = io.BytesIO()
    Image.fromarray(_image(64, 64)).save(file, "PNG")
    for broken in (b"", b"no image", file.getvalue()[:len(file.getvalue()) // 2]):
        with pytest.raises(images.CorruptRow, match=r"row 7 \(shard-3\)") as caught:
            images.decode(broken, row=7, where="shard-3")
    assert "repair it and run the same command again, or" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.row == 7
