import numpy as np
import pytest
from PIL import Image

from jax_cl_bd.errors import UserError
from jax_cl_bd.triggers import htba


@pytest.mark.parametrize("trigger_id", range(10, 20))
def test_equals_pil_bicubic_of_an_edge_padded_grid(trigger_id):
    # PIL's bicubic is Keys with a = -0.5 at half-pixel centres; padding the grid by two replicated
    # cells on each side makes its border behave as edge replication does.
    cells = htba.cells(trigger_id)
    padded = np.pad(cells, ((2, 2), (2, 2), (0, 0)), mode="edge")
    channels = [np.asarray(Image.fromarray(padded[..., c].astype(np.float32)).resize(
        (160, 160), Image.Resampling.BICUBIC))[40:120, 40:120] for c in range(3)]
    expected = np.clip(np.stack(channels, -1), 0, 1)
    np.testing.assert_allclose(htba.image(trigger_id), expected, rtol=0, atol=1e-5)


def test_table_of_one_trigger_cell_by_cell():
    red, green, blue = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    white, black = [1, 1, 1], [0, 0, 0]
    cyan, yellow, magenta = [0, 1, 1], [1, 1, 0], [1, 0, 1]
    expected = {
        10: [[red, green, blue, white], [cyan, yellow, white, white],
             [black, black, blue, black], [cyan, red, yellow, blue]],
        14: [[yellow, yellow, white, black], [red, black, white, white],
             [cyan, cyan, yellow, black], [cyan, green, black, black]],
        19: [[blue, white, green, black], [green, red, yellow, blue],
             [magenta, white, magenta, red], [black, blue, magenta, blue]]}
    for trigger_id, table in expected.items():
        np.testing.assert_array_equal(htba.cells(trigger_id), table)


def test_centres_of_the_cells_show_their_colour():
    for trigger_id in htba.CELLS:
        centres = htba.image(trigger_id)[10::20, 10::20]
        np.testing.assert_array_equal(centres > 0.5, htba.cells(trigger_id) > 0.5)


def test_all_ten_differ():
    images = [htba.image(i) for i in htba.CELLS]
    assert len(images) == 10
    for i in range(10):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 0.1


def test_unknown_id():
    with pytest.raises(UserError, match="no trigger 9;.*10 to 19"):
        htba.image(9)
