"""The page: lights that state thresholds, nothing fetched, nothing that a name could run."""

import json
import math

import numpy as np
import pytest

from ldm3d.report.page import Goal, Section, found, plain, write_page


@pytest.mark.parametrize(
    "goal, light",
    [
        (Goal("r", 0.95, low=0.9), "green"),
        (Goal("r", 0.85, low=0.9), "red"),
        (Goal("r", 0.95, low=0.9, interval=(0.91, 0.97)), "green"),
        (Goal("r", 0.95, low=0.9, interval=(0.89, 0.97)), "amber"),
        (Goal("r", 0.88, low=0.9, interval=(0.8, 0.91)), "amber"),
        (Goal("r", 0.85, low=0.9, interval=(0.8, 0.89)), "red"),
        (Goal("slope", 1.0, 0.8, 1.2, interval=(0.7, 1.1)), "amber"),
        (Goal("slope", 1.5, 0.8, 1.2, interval=(1.3, 1.7)), "red"),
        (Goal("r", math.nan, low=0.9), "grey"),
        (Goal("r", 0.95, low=0.9, interval=(math.nan, math.nan)), "grey"),
        (Goal("gaps", 0, high=0, judged=("grey", "too few to tell")), "grey"),
    ],
)
def test_lights_go_by_the_interval(goal, light):
    assert goal.verdict[0] == light and goal.verdict[1]


def test_goals_in_words():
    assert Goal("a", 1, low=0.9).wanted == "at least 0.9" and Goal("a", 1, high=5, unit="%").wanted == "at most 5%"
    assert found(Goal("a", 31.234, unit="dB", interval=(30.1, 32.25))) == "31.23 dB (30.10 to 32.25)"
    assert found(Goal("a", math.nan)) == "none" and found(Goal("a", 1234.5)) == "1,234" and found(Goal("a", 2)) == "2"


def test_page_is_self_contained_and_says_colours_in_words(tmp_path):
    sections = [
        Section(
            "First <b>",
            "Text & more.",
            {"columns": ["a", "b"], "rows": [["<script>", "as real"]]},
            lights={"as real": "green"},
        ),
        Section("Second", pictures=[{"source": "data:image/png;base64,AAAA", "caption": "A picture."}], note="Small print."),
    ]
    goals = [Goal("Quality", 31.2, low=28, unit="dB", interval=(30.0, 32.0)), Goal("Gaps", 2, high=0)]
    page = write_page(tmp_path / "new", "A title", sections, {"model": "abc", "made": "2026-01-02T03:04"}, goals).read_text()
    assert "http" not in page and "<script" not in page and 'src="data:' in page and "2026-01-02" in page
    for text in (
        "at least 28 dB",
        "31.20 dB (30.00 to 32.00)",
        "green: reached",
        "at most 0",
        "red: not reached",
        "Small print.",
    ):
        assert text in page
    assert "&lt;script&gt;" in page and "First &lt;b&gt;" in page and '<span class="light green">as real</span>' in page


def test_what_is_not_finite_is_null_in_json():
    values = {"a": np.float32(1.5), "b": (math.nan, math.inf), "c": np.array([1, 2]), "d": [{"e": np.bool_(True)}], "f": None}
    text = json.dumps(plain(values), allow_nan=False)
    assert json.loads(text) == {"a": 1.5, "b": [None, None], "c": [1, 2], "d": [{"e": True}], "f": None}
