"""Covariates that follow from others: the law is found, a person keeps the place, an edit takes it along."""

import numpy as np
import pytest
import torch
from test_placed import AFFINES, scan, tiny_pipeline

from ldm3d.applications.changes import followed, with_followers
from ldm3d.config.data import CovariateConfig
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.errors import InputError
from ldm3d.following import Following

A, B = (30.0, 8.0, -2.0), (3.0, 0.7, 0.2)  # ventricles of 30 ml, more and more different with x


def people(count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, 2))
    design = np.column_stack([np.ones(count), x])
    return x, design @ A + np.exp(design @ B / 2) * rng.standard_normal(count)


def test_mean_and_spread_are_found():
    found = Following.fit(*people())
    np.testing.assert_allclose(found.mean, A, atol=0.25)
    np.testing.assert_allclose(found.log_variance, B, atol=0.08)


def test_a_person_keeps_the_place_among_people_alike():
    """By hand: at x = 1 the mean is 8 larger and the spread exp(0.35) times; 5 above the mean becomes 5 exp(0.35)."""
    law = Following(A, B, (0.0, 0.0))
    there = law.moved(35.0, (0.0, 0.0), (1.0, 0.0))
    assert there == pytest.approx(38 + 5 * np.exp(0.35))
    assert law.moved(there, (1.0, 0.0), (0.0, 0.0)) == pytest.approx(35.0)
    assert law.moved(35.0, (0.0, None), (1.0, None)) == pytest.approx(there)  # what is not known is as usual


def test_few_people_tell_a_mean_and_fewer_nothing():
    found = Following.fit(*(each[:59] for each in people()))
    x, y = (each[:59] for each in people())
    np.testing.assert_allclose(found.mean, np.linalg.lstsq(np.column_stack([np.ones(59), x]), y, rcond=None)[0])
    assert found.log_variance[1:] == (0, 0)
    with pytest.raises(InputError, match="29 people with all values are too few; at least 30"):
        Following.fit(*(each[:29] for each in people()))


def test_what_follows_of_few_people_stays_open():
    rows = [{"age": 50.0 + n, "sex": "FM"[n % 2], "ventricles": 20.0 + n} for n in range(20)]
    with pytest.warns(UserWarning, match="ventricles is to follow age, sex, and does not where a scan is edited.*20 people"):
        found = schema(follows=("age", "sex")).fit(rows)
    before = {"age": 50.0, "sex": "F", "ventricles": 25.0}
    assert found["ventricles"].following is None and followed(found, before, {**before, "age": 60.0})["ventricles"] == 25


def schema(**of_ventricles) -> CovariateSchema:
    age = Covariate("age", "continuous", "years", (0, 120))
    sex = Covariate("sex", "categorical", categories=("F", "M"))
    return CovariateSchema((age, sex, Covariate("ventricles", "continuous", "ml", (0, 60), **of_ventricles)))


def fitted() -> CovariateSchema:
    rng = np.random.default_rng(1)
    rows = []
    for n in range(400):
        age, sex = float(rng.uniform(20, 90)), "FM"[n % 2]
        rows.append({"age": age, "sex": sex, "ventricles": 10 + 0.5 * (age - 20) + (2 if sex == "M" else 0)})
        rows[-1]["ventricles"] += float(rng.normal(0, 0.1 + 0.05 * (age - 20)))
    return schema(follows=("age", "sex")).fit(rows)


def test_a_schema_fits_it_and_keeps_it():
    found = fitted()
    assert CovariateSchema.from_dict(found.to_dict()) == found
    before = {"age": 50.0, "sex": "F", "ventricles": 25.0}
    after = followed(found, before, {**before, "age": 60.0})
    assert after["ventricles"] == pytest.approx(30.0, abs=0.3)
    assert followed(found, before, {**before, "sex": "M"})["ventricles"] == pytest.approx(27.0, abs=0.4)
    assert followed(found, before, {**before, "age": 60.0}, held=["ventricles"])["ventricles"] == 25
    assert followed(found, {**before, "ventricles": None}, {**before, "ventricles": None, "age": 60.0})["ventricles"] is None
    assert followed(found, {**before, "ventricles": 45.0}, {**before, "ventricles": 45.0, "age": 89.0})["ventricles"] == 60


def test_names_that_cannot_be_followed():
    with pytest.raises(InputError, match="which is none of those before it"):
        schema(follows=("age", "weight"))
    with pytest.raises(InputError, match="only a continuous one"):
        Covariate("sex", "categorical", categories=("F", "M"), follows=("age",))
    config = CovariateConfig(name="v", kind="continuous", follows=["age"])
    assert config.covariate().follows == ("age",)
    assert "follows" not in CovariateConfig(name="v", kind="continuous").model_dump()  # as in folders of older versions


def test_what_is_not_given_is_measured_if_it_is_to_follow():
    own = {"age": 50.0, "sex": "F", "ventricles": None}
    looks = []

    def look():
        looks.append(1)
        return {"ventricles": 25.0}

    known, (target,) = with_followers(fitted(), own, [{**own, "age": 60.0}], ["age"], look)
    assert known["ventricles"] == 25 and target["ventricles"] == pytest.approx(30, abs=0.3)
    for held, measured in ((["age", "ventricles"], look), (["age"], lambda: {"ventricles": float("nan")}), (["age"], dict)):
        known, (target,) = with_followers(fitted(), own, [{**own, "age": 60.0}], held, measured)
        assert known["ventricles"] is target["ventricles"] is None
    assert with_followers(fitted(), own, [own], [], look)[0]["ventricles"] is None  # nothing changes
    assert looks == [1]


def test_an_edit_takes_along_what_follows():
    pipe = tiny_pipeline()
    law = Following((50.0, 20.0), (2.0, 0.0), (0.0,))
    pipe.schema = CovariateSchema(
        (
            Covariate("age", "continuous", "years", (0, 120), mean=50, std=20, seen=(20, 80)),
            Covariate("sex", "continuous", "", (0, 120), mean=50, std=20, seen=(20, 80), follows=("age",), following=law),
        )
    )
    pipe.unet.arguments["num_categories"] = [0, 0]
    image = scan(AFFINES["along the axes"])
    options = {"steps": 2, "method": "noise", "measure": lambda *_: {"sex": 55.0}}
    done = pipe.edit(image, {"age": 50}, age="+10", **options)
    assert done.source["sex"] == 55 and done.targets[0]["sex"] == pytest.approx(65)
    same = pipe.edit(image, {"age": 50, "sex": 55}, {"age": 60, "sex": 65}, **options)
    torch.testing.assert_close(done.latents, same.latents)
    assert pipe.edit(image, {"age": 50}, age="+10", hold=["sex"], **options).targets[0]["sex"] is None
    assert pipe.edit(image, {"age": 50}, age="+10", **{**options, "measure": None}).source["sex"] is None
    with pytest.raises(InputError, match="unknown covariate"):
        pipe.edit(image, {"age": 50}, age="+10", hold=["size"], **options)
