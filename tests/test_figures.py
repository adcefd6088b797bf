"""Pictures of volumes."""

import numpy as np

from ldm3d import figures


def test_a_mosaic_has_no_empty_places_beside_a_few_volumes():
    volume = np.full((1, 8, 10, 8), 0.5, np.float32)
    few, row, more = (figures.mosaic([volume] * count, ["title"] * count, (4.5, 4.5, 4.5)) for count in (1, 4, 6))
    assert 4 * few.get_size_inches()[0] == row.get_size_inches()[0] == more.get_size_inches()[0]
    assert [len(each.axes) for each in (few, row, more)] == [1, 4, 8]
