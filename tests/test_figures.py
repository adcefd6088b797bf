"""Pictures of volumes."""

import numpy as np
from matplotlib.colors import to_rgba
from PIL import Image

from ldm3d import figures
from ldm3d.films import save_film
from ldm3d.geometry import planes_of, slices, slices_through


def test_a_mosaic_has_no_empty_places_beside_a_few_volumes():
    volume = np.full((1, 8, 10, 8), 0.5, np.float32)
    few, row, more = (figures.mosaic([volume] * count, ["title"] * count, (4.5, 4.5, 4.5)) for count in (1, 4, 6))
    assert 4 * few.get_size_inches()[0] == row.get_size_inches()[0] == more.get_size_inches()[0]
    assert [len(each.axes) for each in (few, row, more)] == [1, 4, 8]


def test_slices_have_sides_and_a_scale():
    shape, spacing = (1, 9, 12, 8), (4.0, 2.0, 3.0)
    planes, wide = planes_of(shape, spacing)
    columns = slices(np.ones(shape, np.float32), spacing).shape[1]
    assert wide == 2 * 36 + 24 == 2 * columns  # pixels of 2 mm
    assert [(low, high) for *_, low, high in planes] == [("L", "R"), ("L", "R"), ("P", "A")]
    figure = figures.mosaic([np.ones(shape, np.float32)], ["title"], spacing)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.texts] == ["L", "R", "L", "R", "P", "A", "50 mm"]
    (bar,) = axis.lines
    left, right = bar.get_transform().transform([bar.get_xydata()[0], bar.get_xydata()[1]])[:, 0]
    assert np.isclose((right - left) / axis.get_window_extent().width * wide, 50)


def test_pictures_go_through_what_is_marked():
    """A lesion away from the middle: in all three slices, which stay where they are for what they show as well."""
    lesion = np.zeros((20, 24, 16), bool)
    lesion[2:5, 18:22, 1:4] = True
    x, y, z = slices_through(lesion)
    assert x in range(2, 5) and y in range(18, 22) and z in range(1, 4)
    image = slices(lesion[None].astype(np.float32), where=(x, y, z))
    assert [image[:, start:end].sum() for start, end in ((0, 20), (20, 40), (40, 64))] == [12, 9, 12]
    assert not slices(lesion[None].astype(np.float32)).any()
    slab = np.zeros((20, 24, 16), bool)
    slab[:, :, 2:5] = True  # missing slices
    assert slices_through(slab) == (9, 12, 2)
    assert slices_through(~slab) == slices_through(np.zeros_like(slab)) == (9, 12, 8)
    shades = [figures.mosaic([lesion[None]] * 2, ["a", "b"], (1, 1, 1), where=[None, (x, y, z)]).axes[k] for k in (0, 1)]
    assert [axis.images[0].get_array().any() for axis in shades] == [False, True]
    coloured = figures.overlay(0.5 * lesion[None], lesion[None], (1, 1, 1), "", "", where=(x, y, z)).axes[0]
    assert coloured.images[1].get_array().max() == 1


def test_a_film_has_sides_too(tmp_path):
    dark = np.zeros((2, 1, 8, 8, 8), np.float32)
    save_film(dark, ["", ""], (4, 4, 4), tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        first = np.asarray(film.convert("L"))
    planes, _ = planes_of((8, 8, 8), (4, 4, 4))
    for start, end, *_ in planes:
        for edge in (start * first.shape[1] + 6, end * first.shape[1] - 6):
            assert first[:, int(edge) - 5 : int(edge) + 5].max() > 100


def arrows(axis) -> list[tuple[float, float, str]]:
    """Where arrowheads are, and whether they point left or right."""
    found = []
    for drawn in axis.collections:
        outline = drawn.get_paths()[0].vertices if drawn.get_paths() else np.zeros((0, 2))
        if len(outline) == 4 and len(drawn.get_offsets()) == 1:  # a triangle
            tip = "<" if outline[0, 0] < outline[1, 0] else ">"
            found.append((*map(float, drawn.get_offsets()[0]), tip))
    return found


def test_an_interval_that_is_cut_is_marked_as_cut():
    rows = [
        ("within", 1.0, 0.5, 2.0, 0.7, "#b3261e"),
        ("goes on", 2.0, 0.5, 6.2, 0.7, "#b3261e"),
        ("beyond", 7.0, 5.0, 9.0, 8.0, "#1f7a55"),
    ]
    (axis,) = figures.forest(rows, "label").axes
    assert arrows(axis) == [(4.0, 1.0, ">"), (4.0, 2.0, ">")]
    assert [text.get_text() for text in axis.texts] == ["2.0 (to 6.2)", "7.0 (to 9.0)"]
    assert axis.texts[1].get_color() == "#1f7a55"

    values = np.array([[-9.0, 0.0, 1.0], [-1.0, 0.0, 5.0], [-1.0, 0.0, 1.0]])
    (axis,) = figures.ranges(["a", "b", "c"], {"one": values, "two": values[::-1]}, "label", "title").axes
    assert [(x, tip) for x, _, tip in arrows(axis)] == [(-4.0, "<"), (4.0, ">"), (4.0, ">"), (-4.0, "<")]
    assert len({tuple(to_rgba(line.get_color())) for line in axis.lines}) == 2
