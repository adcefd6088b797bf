"""Covariates: cells of a table to tensors, and what is said of a cell that cannot be one."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from ldm3d.covariates import Covariate, CovariateSchema, describe, drop_covariates
from ldm3d.errors import InputError
from ldm3d.notation import read_number

AGE = Covariate("age", "continuous", unit="years", range=(0, 120))
SEX = Covariate("sex", "categorical", categories=("F", "M"))
SITE = Covariate("site", "categorical", categories=("0", "1", "12"))
SCHEMA = CovariateSchema((AGE, SEX, SITE))


@pytest.mark.parametrize(
    "cell", [None, "", " ", "n/a", "N/A", "NaN", "nan", "None", "null", math.nan, np.nan, np.float32("nan")]
)
@pytest.mark.parametrize("covariate", [AGE, SEX], ids=["continuous", "categorical"])
def test_missing_cells(covariate, cell):
    assert covariate.parse(cell) is None


@pytest.mark.parametrize(
    "cell, value", [(42, 42.0), ("42.5", 42.5), (" 7 ", 7.0), (np.int64(3), 3.0), ("1e1", 10.0), (0, 0.0), (120, 120.0)]
)
def test_numbers(cell, value):
    parsed = AGE.parse(cell)
    assert parsed == value
    assert isinstance(parsed, float)


@pytest.mark.parametrize(
    "text, value, kind",
    [
        *[("42.5", 42.5, "plain"), (" 7 ", 7, "plain"), ("-1e1", -10, "plain"), ("+3", 3, "plain"), (".5", 0.5, "plain")],
        *[("26,9", 26.9, "decimal comma"), ("0,743", 0.743, "decimal comma"), ("1234,567", 1234.567, "decimal comma")],
        *[("89+", 89, "open-ended"), ("89 +", 89, "open-ended"), (">89", 89, "open-ended"), ("≥ 89,5", 89.5, "open-ended")],
        *[("35-40", 37.5, "range"), ("35 – 40", 37.5, "range"), ("35 to 40", 37.5, "range"), ("1,5-2,5", 2, "range")],
    ],
)
def test_numbers_as_published(text, value, kind):
    assert read_number(text) == (pytest.approx(value), kind)


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,234", r"'1,234' can be read in two ways; write 1.234 or 1234$"),
        ("1,234,567", r"can be read in two ways; write 1234567$"),
        *[("nan", "nan is not finite"), ("1e999", "1e999 is not finite"), ("1_2", "'1_2' is not a number")],
        *[(text, "is not a number") for text in ("", "old", "40-35", "1990-05-12", "-2+3", "1.234,5", "+", "-", "9" * 101)],
    ],
)
def test_texts_that_are_no_number(text, message):
    with pytest.raises(ValueError, match=message):
        read_number(text)


@pytest.mark.parametrize("cell, category", [("F", "F"), ("f", "F"), (" m ", "M")])
def test_categories_in_any_case(cell, category):
    assert SEX.parse(cell) == category


@pytest.mark.parametrize("cell, category", [(0, "0"), ("1", "1"), (1.0, "1"), ("12.0", "12"), (np.float64(0), "0")])
def test_codes_of_categories(cell, category):
    """A column of codes with a gap in it comes from pandas as floats."""
    assert SITE.parse(cell) == category
    assert SITE.parse(pd.Series([cell, None], dtype=object)[0]) == category


@pytest.mark.parametrize(
    "covariate, cell, message",
    [
        (AGE, "old", r"^age: 'old' is not a number \(expected years\)$"),
        (AGE, -1, r"^age: -1 is outside its range 0 to 120 years$"),
        (AGE, "120.5", r"^age: 120.5 is outside its range 0 to 120 years$"),
        (AGE, "inf", r"^age: inf is not finite; leave the cell empty"),
        (SEX, "X", r"^sex: 'X' is not one of F, M$"),
        (SITE, 2.0, r"^site: '2.0' is not one of 0, 1, 12$"),
        (SITE, 1.5, r"^site: '1.5' is not one of 0, 1, 12$"),
    ],
)
def test_cells_that_cannot_be_used(covariate, cell, message):
    with pytest.raises(InputError, match=message):
        covariate.parse(cell)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "age", "kind": "number"}, "kind is 'number'; use continuous or categorical"),
        ({"name": "sex", "kind": "categorical"}, "`categories` goes with categorical"),
        ({"name": "age", "kind": "continuous", "categories": ("a",)}, "`categories` goes with categorical"),
    ],
)
def test_covariates_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        Covariate(**arguments)


def test_two_covariates_of_one_name():
    with pytest.raises(InputError, match="different names, got age, age"):
        CovariateSchema((AGE, AGE))


@pytest.mark.parametrize("asked, example", [("89+", "89"), ("35-40", "37.5"), (">89", "89")])
def test_a_request_is_one_number(asked, example):
    with pytest.raises(InputError, match=f"^age: '.*' is not one number; write one, for example {example}$"):
        AGE.parse(asked)
    assert AGE.parse("26,9") == 26.9  # one number, as half of the world writes it


def test_aliases_are_known_to_requests_and_kept_with_the_model():
    lesion = Covariate("lesion", "categorical", categories=("none", "mild"), aliases={"none": ("0",), "mild": ("1", "MCI")})
    assert [lesion.parse(text) for text in ("none", "None", 0, "0.0")] == ["none"] * 4
    assert (lesion.parse("mci"), lesion.parse("")) == ("mild", None)
    schema = CovariateSchema((AGE, lesion, SEX))
    assert CovariateSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    with pytest.raises(InputError, match="aliases of X, which are no categories"):
        Covariate("sex", "categorical", categories=("F", "M"), aliases={"X": ("3",)})


def test_schemas_without_aliases_read_and_write_as_before_there_were_any():
    old = {
        **{"name": "sex", "kind": "categorical", "unit": "", "range": None, "categories": ["F", "M"], "mean": 0.0, "std": 1.0},
        **{"seen": None, "required": False},
    }
    schema = CovariateSchema.from_dict([old])
    assert schema == CovariateSchema((SEX,)) and json.loads(json.dumps(schema.to_dict())) == [old]


def test_labels_carry_units():
    assert (AGE.label, SEX.label) == ("age (years)", "sex")


# A schema


def test_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match=r"unknown covariate 'aeg'; did you mean 'age'\?.* age, sex, site"):
        SCHEMA.parse({"aeg": 3})


def test_unknown_name_like_none_is_a_readable_sentence():
    with pytest.raises(InputError, match=r"unknown covariate 'weight'[;.:] .*age, sex, site"):
        SCHEMA.parse({"weight": 3})


def test_parse_leaves_open_what_is_not_asked():
    assert SCHEMA.parse({"sex": "m"}) == {"age": None, "sex": "M", "site": None}


def test_fit_on_known_values():
    rows = [{"age": 20, "sex": "F", "site": 0}, {"age": "40", "sex": "M", "site": 1}, {"age": 60, "sex": "M", "site": 1}]
    fitted = SCHEMA.fit(rows)
    assert fitted["age"].mean == pytest.approx(40)
    assert fitted["age"].std == pytest.approx(math.sqrt(800 / 3))  # of the split itself, not of a population
    assert fitted["age"].seen == (20, 60)
    assert fitted["sex"] == SEX  # a category needs no normalisation
    assert SCHEMA["age"] == AGE, "fit must not change the schema that it is asked of"


def test_fit_ignores_missing_values():
    with_gaps = [
        {"age": 20, "sex": "F", "site": 0},
        {"age": "n/a", "sex": None, "site": 1},
        {"age": 40, "sex": "M"},
        {"site": 0},
    ]
    fitted = SCHEMA.fit(with_gaps)
    assert (fitted["age"].mean, fitted["age"].std, fitted["age"].seen) == (30, 10, (20, 40))


def test_fit_refuses_what_cannot_be_learnt():
    with pytest.raises(InputError, match="'sex' has no value in the training split"):
        SCHEMA.fit([{"age": 20, "site": 0}, {"age": 30, "site": 1}])
    with pytest.raises(InputError, match="'age' is 20 for every training subject"):
        SCHEMA.fit([{"age": 20, "sex": "F", "site": 0}, {"age": 20, "sex": "M", "site": 1}])
    with pytest.raises(InputError, match="age: 130 is outside its range"):
        SCHEMA.fit([{"age": 130, "sex": "F", "site": 0}])


def test_fitted_values_have_mean_0_and_deviation_1():
    rows = [{"age": age, "sex": "F", "site": "1"} for age in (18, 25, 33, 71, 90)]
    values = SCHEMA.fit(rows).encode(rows)[:, 0, 0]
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_encode_gives_value_and_presence():
    fitted = SCHEMA.fit([{"age": 20, "sex": "F", "site": 0}, {"age": 40, "sex": "M", "site": 12}])
    context = fitted.encode([{"age": 45, "sex": "m", "site": 12.0}, {"sex": "F"}, {}])
    assert context.dtype == torch.float32
    assert context.tolist() == [
        [[1.5, 1], [1, 1], [2, 1]],
        [[0, 0], [0, 1], [0, 0]],  # value 0, category 0 and nothing at all are told apart by the presence
        [[0, 0], [0, 0], [0, 0]],
    ]


def test_order_of_tokens_is_the_schema_s_not_the_row_s():
    assert torch.equal(SCHEMA.encode([{"site": 1, "age": 3}]), SCHEMA.encode([{"age": 3, "site": 1}]))


def test_context_leads_back_to_the_values():
    rows = [
        {"age": 71.25, "sex": "M", "site": "12"},
        {"age": None, "sex": "F", "site": "0"},
        {"age": 3.5, "sex": None, "site": "1"},
    ]
    fitted = SCHEMA.fit(rows)
    for row, tokens in zip(rows, fitted.encode(rows)):
        for covariate, (value, present) in zip(fitted, tokens.tolist()):
            again = None
            if present and covariate.kind == "categorical":
                again = covariate.categories[int(value)]
            elif present:
                again = value * covariate.std + covariate.mean
            assert again == (
                pytest.approx(row["age"], abs=1e-5) if covariate.name == "age" and present else row[covariate.name]
            )


def test_contexts_without_rows_or_covariates():
    assert SCHEMA.encode([]).shape == (0, 3, 2)
    assert CovariateSchema(()).encode([{}, {}]).shape == (2, 0, 2)


def test_numbers_of_categories_in_order():
    assert SCHEMA.num_categories == [0, 2, 3]


def test_schema_survives_json():
    fitted = SCHEMA.fit([{"age": 20, "sex": "F", "site": 0}, {"age": 47, "sex": "M", "site": 12}])
    assert CovariateSchema.from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


def test_warns_of_what_training_never_saw():
    fitted = SCHEMA.fit([{"age": 20, "sex": "F", "site": 0}, {"age": 40, "sex": "M", "site": 1}])
    with pytest.warns(UserWarning, match=r"^age 19, 41.5 years: training saw 20 to 40 only") as caught:
        fitted.warn_beyond_seen([{"age": 41.5}, {"age": 30}, {"age": 19}, {"age": 41.5}, {"age": None}, {"sex": "M"}])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.warn_beyond_seen([{"age": 20}, {"age": 40.0, "sex": "F"}, {}])
        SCHEMA.warn_beyond_seen([{"age": 119}])  # not fitted: nothing was seen, nothing can be beyond it


# Dropping


def test_drop_is_decided_by_its_own_uniform_number():
    context = torch.tensor([[[1.5, 1.0], [1.0, 1.0], [-2.0, 1.0]]]).repeat(3, 1, 1)
    # chosen below 0.2; then each covariate is dropped below the rate in column 1
    uniform = torch.tensor([[0.1, 0.95, 0.9, 0.9, 0.9], [0.19, 0.4, 0.5, 0.39, 0.41], [0.21, 1.0, 0.5, 0.5, 0.5]])
    kept = drop_covariates(context, uniform, 0.2)[..., 1]
    assert kept.tolist() == [[0, 0, 0], [1, 0, 1], [1, 1, 1]]


def test_dropped_covariates_keep_neither_value_nor_presence():
    generator = torch.Generator().manual_seed(0)
    context = torch.stack([torch.randn(500, 4, generator=generator) + 5, torch.ones(500, 4)], dim=-1)
    dropped = drop_covariates(context, torch.rand(500, 6, generator=generator), 0.5)
    gone = dropped[..., 1] == 0
    assert 0 < gone.sum() < gone.numel()
    assert (dropped[gone] == 0).all()
    assert torch.equal(dropped[~gone], context[~gone])


def test_missing_covariates_stay_missing():
    context = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert torch.equal(drop_covariates(context, torch.full((1, 4), 0.99), 0.5), context)


@pytest.mark.parametrize("probability", [0.15, 0.5])
def test_every_number_of_open_covariates_is_equally_likely(probability):
    """Of the chosen samples a quarter each has 0, 1, 2 or 3 of 3 open (the integral of the binomial over its rate)."""
    n = 100_000
    uniform = torch.rand(n, 5, generator=torch.Generator().manual_seed(1))
    gone = drop_covariates(torch.ones(n, 3, 2), uniform, probability)[..., 1] == 0  # (n, 3)

    def close(happened, expected):
        assert happened.float().mean().item() == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / n))

    for k in range(3):
        close(gone[:, k], probability / 2)
        close(gone.sum(dim=1) == k + 1, probability / 4)
    close(~gone[:, 0] & gone[:, 1] & gone[:, 2], probability / 12)  # the first one alone is asked


def test_nothing_dropped_at_probability_0():
    context = torch.ones(50, 3, 2)
    assert torch.equal(drop_covariates(context, torch.zeros(50, 5), 0.0), context)


def test_a_request_in_a_line_is_rounded():
    row = {"age": 72, "sex": "F", "ventricular_volume_ml": 46.42318741607666, "brain_volume_ml": 1209.48, "cells": 123456.7}
    assert describe(row) == "age 72, sex F, ventricular volume 46.42, brain volume 1209, cells 123457"
    assert describe({"age": 71.5, "volume": 0.001234, "sex": None}) == "age 71.5, volume 0.001234"
