"""The evaluation page: four verdicts, an answer to "may I use it for these people?", pictures that say what they are."""

import collections
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_sections import SCHEMA, N, evaluation, finding

from ldm3d import figures
from ldm3d.covariates import Covariate, CovariateSchema, in_words
from ldm3d.data.bands import EVERYONE, people_by_band
from ldm3d.evaluation.coverage import Cell, coverage
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.subgroups import VolumeScores, gaps
from ldm3d.evaluation.utility import Utility
from ldm3d.geometry import Grid
from ldm3d.report.page import Goal, Section, write_page
from ldm3d.report.sections import subgroups
from ldm3d.report.sections.coverage import answer, matrices
from ldm3d.report.sections.evaluation import sections, verdicts
from ldm3d.report.verdicts import FOLLOWS, REAL, RECONSTRUCTION, SAFE, Verdict
from ldm3d.report.volumes import people_section, volume_table
from ldm3d.report.write import FILES, TEMPLATE
from ldm3d.statistics.conformal import Rate


def good() -> Evaluation:
    """A model without fault, on everybody."""
    found = evaluation()
    found.ssim_foreground = found.ssim_foreground + 0.3
    found.realism = [finding("spread")]
    found.gaps = fair(0.0)
    return found


def fair(gap: float) -> list:
    """Gaps by sex of a score that men have so much more of."""
    subjects = evaluation().subjects
    values = np.random.default_rng(2).standard_normal(N) * 0.1 + gap * np.array([row["sex"] == "M" for row in subjects])
    return gaps(SCHEMA, {"sex": []}, [VolumeScores("error", values, subjects, range(N), "low", 1.0, decides=True)])


def audit(copied: bool = False) -> SimpleNamespace:
    threshold = SimpleNamespace(false_rate=0.05, false_interval=(0.02, 0.09), held_out=100)
    found = {"copies": lambda: Rate(30 if copied else 2, 100), "threshold": threshold, "has_copies": copied}
    return SimpleNamespace(**found, plain=5 if copied else 0, membership=None)


def lights(found: Evaluation, audited=None) -> dict:
    return {verdict.question: verdict.light for verdict in verdicts(found, audited)}


def test_a_model_without_fault_has_four_green_verdicts():
    assert lights(good(), audit()) == dict.fromkeys((RECONSTRUCTION, FOLLOWS, REAL, SAFE), "green")


def worse(part: str) -> tuple[Evaluation, SimpleNamespace]:
    found, audited = good(), audit()
    if part == "blurred":
        found.psnr_foreground_db = found.psnr_foreground_db - 8
    elif part == "deaf":
        found.comparisons = evaluation(slope=0.4).comparisons
    elif part == "strange":
        found.realism = [finding("spread"), finding("recall", 9, 9)]
    elif part == "unfair":
        found.gaps = fair(5.0)
    elif part == "copies":
        audited = audit(copied=True)
    return found, audited


@pytest.mark.parametrize(
    "part, question",
    [("blurred", RECONSTRUCTION), ("deaf", FOLLOWS), ("strange", REAL), ("unfair", SAFE), ("copies", SAFE)],
)
def test_one_fault_turns_its_own_verdict_red_and_no_other(part, question):
    found = lights(*worse(part))
    assert found.pop(question) == "red" and set(found.values()) == {"green"}


@pytest.mark.parametrize("question", [FOLLOWS, REAL, SAFE])
def test_what_was_not_assessed_is_not_praised(question):
    found, audited = good(), audit()
    if question == FOLLOWS:
        found.comparisons = [c for c in found.comparisons if c.kind == "kept"]
    elif question == REAL:
        found.realism = []
    else:
        audited = None
    (verdict,) = [each for each in verdicts(found, audited) if each.question == question]
    assert verdict.light == "grey" and verdict.answer == "cannot be told" and verdict.missing[0] in verdict.reasons
    assert lights(*worse("unfair"))[SAFE] == "red"  # what is known to be bad stays bad


def test_a_verdict_names_what_decides():
    goals = [Goal("r", 0.5, low=0.9), Goal("slope", 1.0, 0.8, 1.2), Goal("error", 1.4, high=1.5, interval=(1.0, 2.0))]
    verdict = Verdict(FOLLOWS, goals)
    assert (verdict.light, verdict.reasons) == ("red", ["r: 0.500, wanted at least 0.9"])
    assert verdict.count == "1 of 3 figures is within the threshold." and Verdict(FOLLOWS, goals[1:]).light == "amber"
    assert Verdict(FOLLOWS, goals[1:2]).answer == "yes" and Verdict(FOLLOWS, []).light == "grey"


# May I use it?

AGED = CovariateSchema(
    (Covariate("age", "continuous", "years", (0, 120)), Covariate("sex", "categorical", categories=("F", "M")))
)


def aged() -> Evaluation:
    """Of old women there are many, of old men none; regressors of synthetic volumes fail for people over 80."""
    ages = {"F": range(60, 95), "M": range(60, 80)}
    rows = [{"age": float(age), "sex": sex} for sex, years in ages.items() for age in years for _ in range(2)]
    count = len(rows)
    found = Evaluation(*[np.full(count, 30.0)] * 4, subjects=rows, requests=rows, order=list(range(count)))
    found.people, found.training, found.training_people = list(range(count)), rows[:], list(range(count))
    error = np.random.default_rng(0).uniform(4, 6, count)
    old = np.array([row["age"] >= 80 for row in rows])
    errors = {"real": error, "synthetic": error * np.where(old, 2, 1), "both": error}
    found.utility = [Utility("age", count, {}, {}, {}, {}, {}, errors)]
    return found


def test_who_asks_for_women_over_80_is_answered():
    schema = AGED.fit(aged().training)
    (found,) = coverage(schema, aged())
    assert found.rows == ["below 60", "60 to 70", "70 to 80", "80 to 90", "90 to 100", "100 and more", EVERYONE]

    def said(row: str, column: str) -> tuple[str, str]:
        given = answer(found.at(row, column), found.task)
        return given.light, given.word

    assert said("80 to 90", "F") == ("red", "no") and said("60 to 70", "F") == ("green", "yes")
    assert said("80 to 90", "M") == ("red", "no, never seen") and said("100 and more", EVERYONE) == ("red", "no, never seen")
    cell = found.at("80 to 90", "F")
    assert (cell.trained, cell.tested, cell.ratio) == (20, 20, pytest.approx(2))
    assert found.at(EVERYONE, EVERYONE).tested == 110 == sum(found.at(row, EVERYONE).tested for row in found.rows[:-1])
    (matrix,) = matrices([found])
    assert matrix["title"] == "To train a regressor of age?" and matrix["columns"] == ["sex F", "sex M", "everyone"]
    assert dict(matrix["rows"])["80 to 90"][0].reasons[2].startswith("error 2.00 times that of real")


@pytest.mark.parametrize(
    "cell, light",
    [
        (Cell("", "", 50, 50, 1.1, 1.0, 1.2), "green"),
        (Cell("", "", 50, 50, 1.2, 1.0, 1.4), "amber"),
        (Cell("", "", 50, 50, 1.6, 1.4, 1.8), "red"),
        (Cell("", "", 50, 9, 1.0, 0.9, 1.1), "grey"),
        (Cell("", "", 9, 50, 1.0, 0.9, 1.1), "amber"),
        (Cell("", "", 0, 50, 1.0, 0.9, 1.1), "red"),
        (Cell("", "", None, 50, 1.0, 0.9, 1.1), "green"),
        (Cell("", "", 50, 50), "grey"),
    ],
)
def test_answers_go_by_training_testing_and_interval(cell, light):
    assert answer(cell, "age").light == light
    assert cell.trained == 0 or answer(cell, "").light != "green"  # nothing was trained on synthetic volumes


def test_small_numbers_of_people_are_not_told():
    assert answer(Cell("", "", 1, 4), "age").reasons == ("1 to 4 in training", "1 to 4 held out")


def test_the_model_s_own_account_counts_people_whose_scans_are_not_at_hand():
    given, found = aged(), aged()
    found.training = found.training_people = None
    scans = pd.DataFrame(given.training).assign(subject=given.training_people)
    schema = AGED.fit(given.training)
    table = {"columns": ["", "all", "train"], "rows": [["subjects", "110", "110"], ["site: A", "9 (8%)", "9 (8%)"]]}
    data = {"scans": {"train": 110}, "subjects": {"train": 110}, "few": {"sex: F": 70, "sex: M": 40}, "table": table}
    account = {"data": {**data, "bands": people_by_band(scans, schema)}}
    (counted,), (told,) = coverage(schema, given), coverage(schema, found, account)
    assert [cell.trained for cell in told.cells] == [cell.trained for cell in counted.cells]
    assert "not counted" not in str(matrices([told])) and "are counted where" not in matrices([told])[0]["lead"]

    found.training, found.training_people = given.training[:9], given.training_people[:9]  # a part of them
    assert coverage(schema, found, account)[0].cells == told.cells
    (part,) = coverage(schema, found)  # nothing says that they are a part
    assert part.at(EVERYONE, EVERYONE).trained == 9
    found.training = found.training_people = None

    (older,) = coverage(schema, found, {"data": data})  # an older version's
    cells = [(row, column) for row in (EVERYONE, "70 to 80") for column in ("F", EVERYONE)]
    assert [older.at(*cell).trained for cell in cells] == [70, 110, None, None]
    people = people_section(found, schema, account)
    assert "110 scans that the model was trained on" in people.text and people.table["columns"] == ["", "train", "test"]
    assert people.table["rows"][0] == ["subjects", "110", "110"] and ["site: A", "9 (8%)", "none"] in people.table["rows"]
    assert "neither in its folder nor in --data" in people_section(found, schema).text


def test_small_numbers_of_people_are_not_in_an_account():
    scans = pd.DataFrame({"subject": [*"abcdefg"], "age": [61.0, 65, 69, 71, 72, 75, np.nan], "sex": ["F"] * 3 + ["M"] * 4})
    cells = {(band, sex): count for band, sex, count in people_by_band(scans.assign(sex=scans["sex"]), AGED)["people"]}
    assert cells == {
        ("all", "all"): 7, ("all", "F"): 4, ("all", "M"): 4, (60, "all"): 4, (60, "F"): 4, (70, "all"): 4, (70, "M"): 4
    }  # fmt: skip


def test_without_regressors_or_covariates():
    found = aged()
    found.utility = found.training = None
    (only,) = coverage(AGED.fit(found.subjects), found)
    assert {answer(cell, only.task).light for cell in only.cells} == {"grey"}
    assert "--downstream" in matrices([only])[0]["lead"] and coverage(CovariateSchema(()), found) == []


# Pictures and tables


def test_slices_say_where_they_are_and_what_they_are():
    volume = np.zeros((1, 16, 20, 24), np.float32)
    volume[:, 2:-2, 2:-2, 4:20] = 0.8
    volume[:, 2:8, 2:-2, 4:20] = 0.4  # the person's left
    grid = Grid.centred((16, 20, 24), (5.0, 5.0, 4.0), (0, 0, 10.0))
    figure = figures.lightbox([volume, volume], ["REAL", "SYNTHETIC"], grid.affine, 3)
    assert [text.get_text() for text in figure.texts] == ["REAL", "SYNTHETIC"] and len(figure.axes) == 6
    for axis, above in zip(figure.axes, (True, True, True, False, False, False)):
        words = [text.get_text() for text in axis.texts]
        image = axis.images[0].get_array()
        assert {"L", "R"} <= set(words) and (axis.get_position().y0 > 0.4) == above
        assert image[10, 3] == pytest.approx(0.4) and image[10, 12] == pytest.approx(0.8)  # left is on the left
        left, right = (next(text for text in axis.texts if text.get_text() == side).get_position()[0] for side in "LR")
        assert left < right
    heights = [next(t.get_text() for t in axis.texts if t.get_text().startswith("z")) for axis in figure.axes[:3]]
    planes = [6, 12, 18]  # from 12% to 92% of planes 4 to 19, which have signal
    assert heights == [f"z = {grid.affine[2, 2] * z + grid.affine[2, 3]:+.0f} mm" for z in planes]
    bar = figure.axes[0].lines[0].get_xdata()
    assert bar[1] - bar[0] == 50 and "50 mm" in [text.get_text() for text in figure.axes[0].texts]


def test_a_forest_has_a_row_a_gap_and_the_table_is_folded():
    found = fair(5.0) + fair(0.0)
    (figure,) = subgroups.draw(found).values()
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["error", "error"]
    (section,) = subgroups.subgroup_sections(found, collections.defaultdict(str))
    assert section.fold == "Table of all 2 figures" and section.pictures[0]["name"] == "gaps-sex"
    assert not subgroups.draw([]) and not subgroups.subgroup_sections(found)[0].fold


def test_columns_are_named_in_words():
    assert in_words("ventricular_volume_ml, generated minus real: MAE") == "ventricular volume, generated minus real: MAE"
    assert Covariate("ventricular_volume_ml", "continuous", "ml").label == "ventricular volume (ml)"
    assert in_words("age") == "age" and in_words("ml") == "ml"
    found = [SimpleNamespace(figure="a_ml, generated: bias")]
    assert subgroups._title(found[0].figure, {"a_ml": "ml"}) == "a, generated: bias (ml)"


def test_every_volume_has_a_row_that_names_nobody():
    found = good()
    found.people = [f"sub-{i}" for i in range(N)]
    found.requests = found.requests[:30]
    real = [float(i) for i in range(N)]
    found.measured = {"ml": {"real": real, "reconstructed": real, "generated": [math.nan, *real[1:30]]}}
    table = volume_table(found, SCHEMA)
    assert list(table["volumes"].value_counts()) == [N, 30] and "sub-" not in table.to_csv()
    assert {"number", "held_out", "ml", "sex", "measured_ml", "reconstructed_ml", "psnr_foreground_db"} <= set(table)
    assert pd.isna(table["measured_ml"][N]) and table["measured_ml"][N + 3] == 3 and pd.isna(table["psnr_db"][N])
    people = people_section(found, SCHEMA)
    assert people.table["columns"] == ["", "all", "test"] and people.table["rows"][0] == ["subjects", "120", "120"]


def written(folder) -> Path:
    """The page of a model without fault, with one pair of pictures."""
    found = good()
    detail = sections(found, SCHEMA, collections.defaultdict(lambda: "data:image/png;base64,"), None)
    answers = [Verdict(v.question, v.goals, v.missing, detail[v.question]) for v in verdicts(found, None)]
    lightbox = [{"source": "data:image/png;base64,AA", "caption": "A pair.", "name": "pair-1", "number": "1", "file": "p.png"}]
    (covered,) = matrices(coverage(SCHEMA, found))
    more = {"verdicts": answers, "lightbox": lightbox, "lead": "Lead.", "matrices": [covered], "files": FILES}
    return write_page(folder, "Title", [Section("People")], {}, (), TEMPLATE, **more)


def test_the_page_has_pictures_before_verdicts_before_folded_detail(tmp_path):
    page = written(tmp_path).read_text()
    places = [
        page.index(f'id="{key}"') for key in ("figure-1", "verdicts", "use", "reconstruction", "follows", "real", "safe")
    ]
    assert page.index("No regressor was trained", places[2]) < page.index(
        '<table class="use">'
    )  # why it is grey, before it is
    assert places == sorted(places) and page.index("<details>", places[3]) < page.index("Reconstruction of held-out")
    for key in ("pictures", "verdicts", "use", "reconstruction", "follows", "real", "safe", "files", "made"):
        assert page.count(f'id="{key}"') == 1 and f'href="#{key}"' in page
    assert "http" not in page and "<script" not in page and "@media print" in page
    assert "green: reached" in page and "volumes.tsv" in page and "cannot be told" in page
