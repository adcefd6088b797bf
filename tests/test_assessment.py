"""`ldm3d evaluate` with all its parts, on a model that has learnt next to nothing: that everything is found and said."""

import functools
import json
import re

import pandas as pd
import pytest
from conftest import command_line

from ldm3d.evaluation import discriminability, utility
from ldm3d.metrics import discriminability as metric
from ldm3d.metrics import features
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.rulers import regression


def refuse(constant: str):
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def page_and_metrics(experiment, tmp_path, monkeypatch):
    """Of an evaluation with every part; five people are enough to learn from, here."""
    for module in (regression, utility):
        monkeypatch.setattr(module, "MIN_PEOPLE", 5)
    arguments = ["--data", experiment / "data", "--out", tmp_path, "--num", 8, "--steps", 1, "--downstream", "--likelihood"]
    command_line("evaluate", experiment / "run/model", *arguments)
    text = (tmp_path / "metrics.json").read_text()
    return (tmp_path / "report.html").read_text(), json.loads(text, parse_constant=refuse)


def test_every_part_is_found_and_said(page_and_metrics, experiment):
    page, metrics = page_and_metrics
    scans = pd.read_csv(experiment / "run/prepared/scans.tsv", sep="\t")
    trained = int((scans["split"] == "train").sum())
    assert metrics["predicted"] == {"covariates": ["age"], "training_volumes": trained}
    kinds = {(row["covariate"], row["kind"]) for row in metrics["fidelity"]}
    assert {("age", "real"), ("age", "generated"), ("ventricular_volume_ml", "kept")} <= kinds
    for row in metrics["fidelity"]:
        assert row["mae_low"] <= row["mae"] <= row["mae_high"] and row["bias_low"] <= row["bias"] <= row["bias_high"]
    order, asked = metrics["held_out"]["order"], metrics["held_out"]["generated_for"]
    assert sorted(order) == list(range(5)) and asked == [*order, *order[:3]]
    quality = metrics["reconstruction"]
    assert quality["psnr_foreground_db"]["mean"] < quality["psnr_db"]["mean"] and quality["ssim_foreground"]["mean"] < 1
    (useful,) = metrics["downstream"]
    assert useful["covariate"] == "age" and useful["tested"] == 5 and useful["volumes"]["real"] == 6
    bound = metrics["likelihood"]["bound"]
    assert metrics["likelihood"]["volumes"] == 5 and bound["interval"][0] < bound["mean"] < bound["interval"][1]
    assert {gap["grouping"] for gap in metrics["fairness"]} == {"sex", "age"}
    assert {gap["verdict"] for gap in metrics["fairness"]} == {"too few to tell"}  # of five people nothing can be said
    lights = {goal["name"]: goal["light"] for goal in metrics["goals"]}
    assert set(lights.values()) <= {"green", "amber", "red", "grey"} and lights["Gaps between groups of people"] == "grey"
    for text in (
        "Requests outside of the training data",
        "by sex",
        "by age",
        "Downstream utility: age",
        "Likelihood of",
        "95% interval",
    ):
        assert text in page
    assert page.count("data:image/png;base64,") > 10
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # which a megabyte of base64 holds by chance, once in a while


def test_ages_are_not_predicted_without_the_data_that_was_trained_on(experiment, tmp_path, capsys):
    scans = pd.read_csv(experiment / "run/prepared/scans.tsv", sep="\t", dtype=str)
    held_out = scans[scans["split"] == "test"].rename(columns={"subject": "participant_id"})
    held_out.to_csv(tmp_path / "table.csv", index=False)
    arguments = ["--data", tmp_path / "table.csv", "--root", experiment / "data", "--num", 3, "--steps", 1]
    command_line("evaluate", experiment / "run/model", *arguments, "--out", tmp_path / "out")
    assert "--data has none of them" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "predicted" not in metrics and {row["covariate"] for row in metrics["fidelity"]} == {"ventricular_volume_ml"}


def test_a_learned_ruler_predicts_what_a_measure_would_give(experiment, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(regression, "MIN_PEOPLE", 11)
    arguments = ["--data", experiment / "data", "--num", 3, "--steps", 1, "--measure", "learned"]
    command_line("evaluate", experiment / "run/model", *arguments, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["predicted"]["covariates"]) == {"age", "ventricular_volume_ml"}
    assert {row["covariate"] for row in metrics["fidelity"]} == {"age", "ventricular_volume_ml"}
    assert "drop --no-predict" in fails("evaluate", experiment / "run/model", *arguments, "--no-predict")


def test_a_segmenter_and_a_classifier_judge_anatomy(experiment, tmp_path, monkeypatch, capsys):
    """With the segmenter's features where no others are asked for; five people, and two steps of the classifier."""
    network = SegmentationUNet({"brain": [4, 5], "ventricles": [6, 7]}, (4, 8))
    network.save_pretrained(tmp_path / "segmenter")
    for module in (metric, discriminability):
        monkeypatch.setattr(module, "FEWEST", 5)
    monkeypatch.setattr(discriminability, "classifier_auc", functools.partial(metric.classifier_auc, folds=2, steps=2))
    asked, load = [], features.load_extractor
    monkeypatch.setattr(features, "load_extractor", lambda name: asked.append(name) or load(name))
    arguments = ["--data", experiment / "data", "--segmenter", tmp_path / "segmenter", "--num", 12, "--steps", 1]
    command_line("evaluate", experiment / "run/model", *arguments, "--out", tmp_path / "out", "--no-predict")
    said = capsys.readouterr().out
    assert "segment 22 volumes" in said and "of 5 generated and 5 reconstructed volumes" in said
    metrics = json.loads((tmp_path / "out/metrics.json").read_text(), parse_constant=refuse)
    found = metrics["anatomy"]
    assert list(found["dice"]) == ["brain", "ventricles"] and len(found["middle"]) == 10
    assert [each["name"] for each in found["generated"]] == ["all", *found["middle"]]
    assert asked == [f"segmenter:{tmp_path / 'segmenter'}"]
    told = metrics["discriminability"]
    assert told["people"] == 5 and 0 <= told["auc"] <= 1 and told["variety"] > 0
    names = {goal["name"] for goal in metrics["goals"]}
    assert {"Anatomy within the middle 90% of real people", "Generated told from reconstructed volumes, AUC"} <= names
    page = (tmp_path / "out/report.html").read_text()
    for text in ("brain thickness (mm)", "Told apart, and variety", "ventricles overlap"):
        assert text in page
    assert (tmp_path / "out/anatomy.png").is_file()
