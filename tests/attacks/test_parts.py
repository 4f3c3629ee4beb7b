import numpy as np

from jax_cl_bd.attacks._parts import cover


def test_image_of_that_size_comes_back():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(cover(image, 16, 16), image)


def test_takes_the_largest_centred_part_of_the_aspect():
    # Columns numbered: of a 20x50 image, a square part is columns 15..34.
    image = np.repeat(np.arange(50, dtype=np.uint8)[None, :, None] * 5, 20, 0).repeat(3, 2)
    np.testing.assert_array_equal(cover(image, 20, 20), image[:, 15:35])
    np.testing.assert_array_equal(cover(image.swapaxes(0, 1).copy(), 20, 20),
                                  image[:, 15:35].swapaxes(0, 1))
    # Aspect 5:2 in another size covers everything, 5:1 cuts rows.
    assert cover(image, 10, 25).shape == (10, 25, 3)
    assert abs(int(cover(image, 10, 50)[5, 0, 0]) - 0) <= 3
