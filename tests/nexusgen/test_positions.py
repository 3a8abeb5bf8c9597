import numpy as np
import pytest

from nexusgen.errors import ShapeError
from nexusgen.positions import conversation_positions, image_offsets

IMAGE = 9


def test_text_counts_up_on_all_three_axes():
    positions, following = conversation_positions(np.array([1, 2, 3]), [], IMAGE)
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert following == 3


def test_an_image_spans_its_grid_and_text_goes_on_after_its_larger_side():
    ids = np.array([1, *[IMAGE] * 6, 2, IMAGE, 3])
    positions, following = conversation_positions(ids, [(2, 3), (1, 1)], IMAGE)
    assert positions[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 4, 5, 6]
    assert positions[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 4, 5, 6]
    assert positions[2].tolist() == [0, 1, 2, 3, 1, 2, 3, 4, 5, 6]
    assert following == 7


def test_adjacent_images_keep_their_own_grids():
    positions, following = conversation_positions(np.array([IMAGE] * 5), [(1, 1), (2, 2)], IMAGE)
    assert positions[2].tolist() == [0, 1, 2, 1, 2]
    assert following == 3


def test_offsets_run_in_raster_order():
    assert image_offsets(2, 2).tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]


@pytest.mark.parametrize(("ids", "grids"), [([1, IMAGE], []), ([IMAGE, 1], [(1, 2)]), ([1, 1], [(1, 1)])])
def test_grids_that_do_not_fit_are_refused(ids, grids):
    with pytest.raises(ShapeError):
        conversation_positions(np.array(ids), grids, IMAGE)
