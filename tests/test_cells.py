"""Cells as published: what is read with a warning, what stands for a missing value, numbers that no measurement explains."""

import math
import warnings

import numpy as np
import pytest

from ldm3d.config.data import CovariateConfig
from ldm3d.data.cells import read_cells
from ldm3d.data.outliers import implausible
from ldm3d.errors import InputError

AGE = {"name": "age", "kind": "continuous", "unit": "years"}
SEX = {"name": "sex", "kind": "categorical", "categories": ["F", "M"]}
ADULTS = [18, 25, 31, 44, 52, 60, 67, 73, 85, 90]


def read(cells, of_all_columns=None, **changes):
    """Values of one column, AGE's or SEX's settings with changes."""
    config = CovariateConfig(**(SEX if changes.get("kind") == "categorical" else AGE) | changes)
    return read_cells({config.name: cells}, [config], of_all_columns, lambda i, name: f"row {i}, {name}")[config.name]


@pytest.fixture
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_ages_as_published_are_read_with_one_warning_that_counts():
    with pytest.warns(UserWarning) as caught:
        ages = read(["50", "89+", ">89", "35-40", "26,9", "89+", "", "41.5"])
    assert ages == [50, 89, 89, 37.5, 26.9, 89, None, 41.5]
    (message,) = [str(warning.message) for warning in caught]
    assert ("age: 3 open-ended (" in message and "89+ as 89" in message) or ">89 as 89" in message
    assert "1 ranges (35-40 as 37.5), 1 with a decimal comma (26,9 as 26.9)" in message


def test_a_range_of_the_covariate_holds_for_lenient_numbers_too():
    with pytest.warns(UserWarning, match="1 cells are out of range") as caught:
        assert read(["50", "130+"], range=(0, 120)) == [50, None]
    assert any("row 1, age: 130 is not within 0 to 120 years" in str(warning.message) for warning in caught)


def test_plain_numbers_draw_no_warning(quietly):
    assert read(["50", "n/a", " 60.5 "]) == [50, None, 60.5]


@pytest.mark.parametrize("cells", [["female", "Male", "F", "woman", "m"], ["f", "MALE", "girl", "Women", "boy"]])
def test_the_usual_words_for_sexes(cells, quietly):
    assert read(cells, kind="categorical") == ["F", "M", "F", "F", "M"]
    assert read(cells, kind="categorical", categories=["male", "female"]) == ["female", "male", "female", "female", "male"]


def test_one_sex_alone_or_two_of_one_kind_are_taken_at_their_word():
    for categories in (["M", "S"], ["woman", "girl", "M"]):
        with pytest.raises(InputError, match="'female' is not one of"):
            read(["female"], kind="categorical", categories=categories)


def test_codes_mean_what_the_config_says_and_nothing_else(quietly):
    named = {"F": ["2", "femme"], "M": 1}
    assert read(["1", "2", "2.0", "Femme", "female"], kind="categorical", categories=named) == ["M", "F", "F", "F", "F"]
    with pytest.raises(InputError) as caught:
        read(["1", "2", "F", "2"], kind="categorical")
    message = str(caught.value)
    assert message.startswith("3 cells cannot be used:\n  row 0, sex: '1' is not one of F, M\n")
    assert "sex: if '1', '2' stand for categories, write which: `categories: {F: [...], M: [...]}`" in message


@pytest.mark.parametrize("word", ["none", "NA", "nan", "null"])
def test_a_category_called_like_a_missing_value_is_a_category(word, quietly):
    assert read([word, word.upper(), "mild", ""], kind="categorical", categories=[word, "mild"]) == [word, word, "mild", None]
    assert read([word], kind="categorical") == [None]


def test_words_and_numbers_that_stand_for_missing_values(quietly):
    cells = ["-9999", "-9999.0", "-1e4", "unknown", "50", "60", "70"]
    assert read(cells, missing=["-9999", "-10000", "unknown"]) == [None] * 4 + [50, 60, 70]
    assert read(cells, ["-9999", "-10000", "unknown"]) == [None] * 4 + [50, 60, 70]
    assert read(["9", "F"], kind="categorical", missing=["9"]) == [None, "F"]
    assert read(["9", "9"], ["9"], kind="categorical", categories=["9", "8"]) == ["9", "9"]  # of all columns: listed wins
    assert read(["50", "-9999"], ["-1"], missing=["-9999"]) == [50, None]  # the covariate's own list


def test_unexplained_codes_are_refused_with_the_way_out():
    cells = [*map(str, ADULTS), "-9999", "-9999", "999"]
    with pytest.raises(InputError) as caught:
        read(cells)
    message = str(caught.value)
    assert "age is -9999 in 2 cells, 999 in 1 cells, while the other 10 values lie between 18 and 90" in message
    assert "`missing: [-9999, 999]`" in message and "`missing: []`" in message
    assert read(cells, missing=["-9999", "999"])[-3:] == [None] * 3
    with pytest.warns(UserWarning, match=r"age is 999 in 1 cells.*`missing: \[-9999, 999\]`"):
        assert read(cells, missing=["-9999"])[-1] == 999  # a given list is complete


def test_an_empty_list_says_that_every_number_is_a_value(quietly):
    assert read([*map(str, ADULTS), "-9999"], missing=[])[-1] == -9999


@pytest.mark.parametrize(
    "code", [-9999, -999, -99, -99.9, -9, -8, -4, -1, 999, 888, 7777, 99999, -32768, 2**31 - 1, 1e6, 1e30, -1e30]
)
def test_numbers_that_are_no_age(code):
    assert implausible([*ADULTS, code, code]) == {code: 2}


@pytest.mark.parametrize(
    "values, found",
    [
        ([70, 70, 70, -9999], [-9999]),
        ([50, 60, -9999], [-9999]),
        ([24, 26, 27, 28, 29, 30, 99], [99]),  # a scale of 30 points
        ([20, 22, 25, 30] * 10 + [25_000], [25_000]),  # mm^3 among ml
        ([-1.2, 0.4, 2.1, -0.3, 0.9, -999], [-999]),
    ],
)
def test_codes_in_other_columns(values, found):
    assert sorted(implausible(values)) == found


@pytest.mark.parametrize(
    "values",
    [
        [],
        [999],
        [-9, -9],
        [45, 99],
        [7.0] * 20,
        [*ADULTS, 99, 101],
        [0, 1, -1, 2, 1, 0],
        [-2, -1, 0, 1, 88],
        [0.0] * 60 + [0.2, 0.4, 1, 3, 12, 45, 88, 0.1, 0.3],
        [100] * 30 + [67, 43, -38, -9],  # laterality of hands
        [*np.random.default_rng(0).lognormal(1, 2, 5000)],
        [*np.random.default_rng(0).standard_t(2, 5000)],
        [*range(700, 1400, 7), 888, 999],  # brain volumes
    ],
    ids=str.split("none one pair ages constant old change deltas zeros laterality lognormal tails brains"),
)
def test_columns_that_are_left_in_peace(values):
    assert not implausible(values)


def test_free_text_does_not_flood_the_message():
    cells = [f"{i} " + "word " * 200 for i in range(5000)]
    for settings in ({}, {"kind": "categorical"}, {"kind": "categorical", "categories": [f"site{i}" for i in range(900)]}):
        with pytest.raises(InputError) as caught:
            read(cells, **settings)
        assert str(caught.value).startswith("5000 cells cannot be used") and "and 4990 more" in str(caught.value)
        assert len(str(caught.value)) < 6000


def test_a_missing_float_is_no_category():
    config = CovariateConfig(name="note", kind="categorical", categories=["nan", "x"])
    assert config.covariate().parse(math.nan) is None and config.covariate().parse("nan") == "nan"
