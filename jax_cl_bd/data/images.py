"""Host-side geometry of single images: into the stored square, and into a test image.

Images are either stored by `fit_square` and measured as `test_image` makes them, or both stored and
measured as `central_square` makes them (data.center_crop); an image that is side x side goes
through all three unchanged.
"""

import io

import numpy as np
from PIL import Image

SHORTER_SIDE = 256 / 224  # the usual ImageNet test resize before a centre crop


class CorruptRow(RuntimeError):
    """An image that cannot be read; names its row and where it is stored."""

    def __init__(self, row: int, where: str, why: str):
        super().__init__(row, where, why)  # all arguments, so that it survives pickling
        self.row, self.where, self.why = row, where, why

    def __str__(self):
        return (f"row {self.row} ({self.where}) cannot be read: {self.why}; repair it and run the "
                "same command again, or leave such rows out in a new --workdir: "
                "--config.data.skip_corrupt=True")


def decode(encoded: bytes, *, row: int, where: str) -> np.ndarray:
    """Decodes JPEG, PNG, ... to uint8 [H, W, 3]; grey and palette images become RGB.

    Raises:
        CorruptRow: whatever the decoder stumbles over, naming the row and where it is stored.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
        raise CorruptRow(row, where, str(error) or type(error).__name__) from error


def header_size(encoded, *, row: int, where: str) -> tuple[int, int]:
    """(height, width) from the header of an open file or of bytes, without decoding pixels."""
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            return image.height, image.width
    except Exception as error:
        raise CorruptRow(row, where, str(error) or type(error).__name__) from error


def fit_square(image: np.ndarray, side: int) -> tuple[np.ndarray, tuple, tuple]:
    """Stores an image in a square without losing its shape (design: images that keep their shape).

    One that fits lies unscaled in the top-left corner, zeros around it; a larger one is resized
    (antialiased bicubic) to fill the square, its aspect kept in `size`.

    Args:
        image: uint8 [H, W, 3].
    Returns:
        uint8 [side, side, 3], size (H, W), extent (rows, columns that are filled).
    """
    size = image.shape[:2]
    if max(size) > side:
        return resize(image, side, side), size, (side, side)
    if size == (side, side):
        return image, size, size
    square = np.zeros((side, side, 3), np.uint8)
    square[:size[0], :size[1]] = image
    return square, size, size


def test_image(image: np.ndarray, side: int) -> np.ndarray:
    """Makes the image [side, side, 3] that is measured: shorter side resized to
    round(side * 256 / 224), then the centre; unchanged if it already is side x side."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    shorter = round(side * SHORTER_SIDE)
    factor = shorter / min(height, width)
    image = resize(image, max(shorter, round(height * factor)),
                   max(shorter, round(width * factor)), Image.Resampling.BILINEAR)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top:top + side, left:left + side]


def test_images(source, rows, side: int) -> np.ndarray:
    """The images of some rows of a source as they are measured: uint8 [N, side, side, 3]."""
    found = np.zeros((len(rows), side, side, 3), np.uint8)
    for i, row in enumerate(rows):
        found[i] = test_image(source[int(row)]["image"], side)
    return found


def central_square(image: np.ndarray, side: int) -> np.ndarray:
    """Cuts out the central square and resizes it (antialiased bicubic) to side x side.

    What a view with crop scale and ratio 1 shows of the image. CLIP's own code resizes first and
    crops then, so that pixels just outside the square weigh on its edges: the difference.
    """
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = np.ascontiguousarray(image[top:top + short, left:left + short])
    return resize(square, side, side)


def resize(image: np.ndarray, height: int, width: int,
           resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """Resizes uint8 [H, W, 3], antialiased."""
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


test_image.__test__ = False  # its name makes pytest take it for a test
