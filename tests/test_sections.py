"""What the page says of an evaluation whose figures are known."""

import collections

import numpy as np
import pytest

from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.subgroups import VolumeScores, gaps
from ldm3d.evaluation.support import OutsideTraining, outside_training
from ldm3d.report.sections.evaluation import lights
from ldm3d.report.sections.evaluation import sections as sections_by_question
from ldm3d.report.sections.fidelity import fidelity_table
from ldm3d.report.sections.regression import categories_lights
from ldm3d.report.sections.training import denoising_section
from ldm3d.rulers.categories import count_hits
from ldm3d.statistics.agreement import compare
from ldm3d.statistics.equivalence import Finding

SCHEMA = CovariateSchema((Covariate("ml", "continuous", "ml"), Covariate("sex", "categorical", categories=("F", "M"))))
N = 120


def evaluation(slope: float = 1.0, kept: float = 1.0, noise: float = 1.0, missing: int = 0) -> Evaluation:
    """Measured on generated volumes: slope * asked; on reconstructions: kept * what is on originals."""
    rng = np.random.default_rng(0)
    true = rng.uniform(20, 60, N)
    real = true + rng.standard_normal(N)
    shown = slope * true + noise * rng.standard_normal(N)
    shown[:missing] = np.nan
    qualities = [mean + deviation * rng.standard_normal(N) for mean, deviation in ((29, 1), (0.9, 0.02), (25, 1), (0.6, 0.02))]
    found = Evaluation(*qualities, people=list(range(N)), order=list(range(N)))
    found.subjects = found.requests = [{"ml": value, "sex": "FM"[i % 2]} for i, value in enumerate(true)]
    for kind, reference, measured in (("real", true, real), ("kept", real, kept * real), ("generated", true, shown)):
        found.comparisons.append(compare("ml", kind, reference, measured, range(N)))
    return found


def light_of(found: Evaluation) -> dict[str, str]:
    return {goal.name: goal.verdict[0] for goal in lights(found)}


def test_a_good_model_is_green_where_it_is_good():
    found = light_of(evaluation())
    assert found.pop("Reconstruction of the foreground, SSIM") == "red"
    assert len(found) == 7 and set(found.values()) == {"green"}


@pytest.mark.parametrize(
    "change, name",
    [
        ({"slope": 0.6}, "ml, requested and measured: slope, minus that of real"),
        ({"slope": 0.6}, "ml, requested and measured: mean absolute error, relative to real"),
        ({"noise": 40}, "ml, requested and measured: r, relative to real"),
        ({"kept": 1.1}, "ml, bias by the autoencoder"),
        ({"missing": 5}, "Generated volumes that could be measured"),
    ],
)
def test_what_is_wrong_is_red(change, name):
    assert light_of(evaluation(**change))[name] == "red"


def test_the_ruler_has_an_interval_too():
    """Of 30 people, a ruler that errs as much as what it judges may be better or worse than it by a third: not settled."""
    rng = np.random.default_rng(5)
    true = rng.uniform(20, 60, 30)
    real, made = (true + 8 * rng.standard_normal(30) for _ in range(2))
    found = Evaluation(*[np.full(30, value) for value in (30.0, 0.95, 30.0, 0.95)], people=list(range(30)))
    found.subjects = found.requests = [{"ml": value, "sex": None} for value in true]
    for kind, measured in (("real", real), ("generated", 0.9 * (made - true) + true)):
        found.comparisons.append(compare("ml", kind, true, measured, range(30)))
    (error,) = [goal for goal in lights(found) if "error" in goal.name]
    c, ruler = found.comparisons[1], found.comparisons[0].agreement.mae
    own = [end / ruler for end in c.intervals["mae"]]  # as if the ruler's error were known
    low, high = error.interval
    assert error.found == pytest.approx(c.agreement.mae / ruler) and low < error.found < high
    assert np.log(high / low) == pytest.approx(2**0.5 * np.log(own[1] / own[0]), rel=0.25)


@pytest.mark.parametrize("r, settled", [(0.7, ("slope", "mean absolute error")), (0.9, ("r", "slope", "mean absolute error"))])
def test_a_perfect_model_is_never_red_and_green_where_the_ruler_is_good(r, settled, most=200):
    """A regressor that reaches r on real people, and a generator that draws exactly what is asked, in 8 datasets."""
    seen = collections.Counter()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        age = rng.uniform(20, 80, most)
        found = Evaluation(*[np.full(most, value) for value in (30.0, 0.95, 30.0, 0.95)], people=list(range(most)))
        found.subjects = found.requests = [{"ml": value, "sex": None} for value in age]
        for kind in ("real", "generated"):
            said = age.mean() + r**2 * (age - age.mean()) + age.std() * r * (1 - r**2) ** 0.5 * rng.standard_normal(most)
            found.comparisons.append(compare("ml", kind, age, said, range(most)))
        for goal in lights(found):
            if "requested and measured" in goal.name:
                seen[goal.name.split(": ")[1].split(",")[0], goal.verdict[0]] += 1
    assert not any(light == "red" for _, light in seen)
    assert min(seen[name, "green"] for name in settled) >= 6, seen  # with a ruler of 0.7, 200 volumes leave r amber in half


def test_a_measure_that_fails_on_real_volumes_judges_nobody():
    found = evaluation()
    true = [row["ml"] for row in found.subjects]
    found.comparisons[0] = compare("ml", "real", true, np.random.default_rng(1).uniform(20, 60, N), range(N))
    names = light_of(found)
    assert names["ml, requested and measured: r"] == "grey" and len([name for name in names if name.startswith("ml")]) == 1


def finding(name: str, value: float = 1.05, excess: float = 0.0) -> Finding:
    return Finding(name, value, value, value, 0.9, 1.5, excess, excess - 0.1, excess + 0.1, 0.2, "low", 60, 60)


def test_one_light_stands_for_all_metrics_of_realism():
    found = evaluation()
    for findings, light in (
        ([finding("spread")], "green"),
        ([finding("spread"), finding("frechet", excess=0.2)], "green"),  # too few for one that does not decide
        ([finding("spread", excess=0.2), finding("frechet")], "grey"),
        ([finding("frechet")], "grey"),  # none that decides was taken
        ([finding("spread"), finding("frechet", 0.5)], "amber"),
        ([finding("spread"), finding("frechet", 0.5), finding("recall", 9, 9)], "red"),
    ):
        found.realism = findings
        assert light_of(found)["Metrics of realism beyond the margin"] == light


def test_quality_is_given_with_and_without_air_and_the_foreground_judged():
    found = evaluation()
    (text,) = [section.text for section in sections(found, SCHEMA, pictures()) if section.title.startswith("Reconstruction")]
    assert "foreground, PSNR 24.97 dB" in text and "SSIM 0.599" in text and "air included, PSNR 2" in text
    assert {"psnr_db", "psnr_foreground_db", "ssim_foreground"} <= found.to_dict()["reconstruction"].keys()
    assert [goal.found for goal in lights(found)][:2] == [found.psnr_foreground_db.mean(), found.ssim_foreground.mean()]


def test_the_measure_s_own_gap_is_not_the_model_s():
    found = evaluation()
    worse = np.array([5.0 * (row["sex"] == "M") for row in found.subjects]) + np.random.default_rng(2).standard_normal(N)
    for own, light in ((True, "green"), (False, "red")):
        figures = [VolumeScores("error", worse, found.subjects, range(N), "low", 1.0, own)]
        figures.append(VolumeScores("nothing", 0.01 * worse % 0.01, found.subjects, range(N), "low", 1.0, decides=True))
        found.gaps = gaps(SCHEMA, {"sex": []}, figures)
        assert light_of(found)["Gaps between groups of people"] == light
    (section,) = [
        section for section in sections(found, SCHEMA, pictures()) if section.title.startswith("Subgroup analysis by sex")
    ]
    assert section.table["columns"] == ["figure", "F", "M", "gap", "by chance", "tolerance", "verdict"]
    assert "F: 60, M: 60" in section.text
    assert [row[-2:] for row in section.table["rows"]] == [["1.000", "gap"], ["1.000", "no gap"]]
    assert section.lights["gap"] == "red"


def sections(*arguments) -> list:
    return [section for detail in sections_by_question(*arguments).values() for section in detail]


def pictures() -> dict[str, str]:
    return collections.defaultdict(lambda: "data:image/png;base64,")


def test_sections_hold_every_row_and_name_requests_beyond():
    found = evaluation()
    found.outside = [OutsideTraining(i, "ml 99", "training range 20 to 60") for i in range(12)]
    titles = {section.title: section for section in sections(found, SCHEMA, pictures())}
    table = titles["Conditioning: covariates, requested and measured"].table
    assert [row[:3] for row in table["rows"]] == [["ml (ml)", "real", "120"], ["ml (ml)", "generated", "120"]]
    assert all(cell.endswith(")") for row in table["rows"] for cell in row[3:])  # an interval each
    beyond = titles["Requests outside of the training data"]
    assert "12 of 120" in beyond.text and "checked alone" in beyond.text and len(beyond.table["rows"]) == 10
    assert light_of(found)["Requests outside of the training data"] == "red"
    assert [row[:2] for row in titles["Reconstruction of held-out volumes"].table["rows"]] == [["ml (ml)", "120"]]
    frame = fidelity_table(found)
    assert list(frame["kind"]) == ["real", "kept", "generated"] and (frame["slope_low"] <= frame["slope_high"]).all()


@pytest.mark.parametrize("kind, colour", [("as in training", "green"), ("combined at random", "red"), ("older", "red")])
def test_two_hundred_requests_and_what_training_saw(kind, colour):
    """Requests that people make as they are; ventricles of the old for the young; ages that training hardly has."""

    def people(number: int, seed: int, years: float = 0) -> list[dict]:
        rng = np.random.default_rng(seed)
        ages = rng.uniform(20, 80, number) + years
        return [{"age": age, "ml": age / 2 + 3 * rng.standard_normal()} for age in ages]

    training, requests = people(400, 1), people(200, 2, 12 if kind == "older" else 0)
    if kind == "combined at random":
        mixed = np.random.default_rng(3).permutation([row["ml"] for row in requests])
        requests = [row | {"ml": ml} for row, ml in zip(requests, mixed)]
    schema = CovariateSchema((Covariate("age", "continuous", "years"), Covariate("ml", "continuous", "ml"))).fit(training)
    found = evaluation()
    found.requests, found.outside = requests, outside_training(schema, requests, training)
    assert light_of(found)["Requests outside of the training data"] == colour


def test_categories_are_judged_by_what_is_told_on_real_people():
    asked = ["F", "M"] * 50
    wrong = ["M", "F"] * 50

    def light(on_real: int, on_generated: int) -> str:
        """Of so many volumes right, of 100."""
        both = [
            count_hits("sex", kind, asked[:right] + wrong[right:], asked, range(100))
            for kind, right in (("real", on_real), ("generated", on_generated))
        ]
        (goal,) = categories_lights(both)
        return goal.verdict[0]

    assert [light(90, 95), light(90, 60), light(90, 82), light(52, 95)] == ["green", "red", "amber", "grey"]


def test_denoising_says_at_which_levels_the_gaussian_is_better():
    pictures = {"denoising": "data:,"}
    behind = denoising_section({"0.05": (0.002, 0.004), "3": (0.57, 0.38)}, pictures)
    assert "At 3 it is worse than the Gaussian: longer training would help." in behind.text
    assert [row[-1] for row in behind.table["rows"]] == ["yes", "no"]
    ahead = denoising_section({"0.05": (0.002, 0.004), "3": (0.31, 0.38)}, pictures)
    assert "better than the Gaussian at every level" in ahead.text
