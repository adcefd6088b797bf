"""What `ldm3d evaluate` finds out about a model, one part after the other: fidelity, predicted covariates, use, likelihood."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.config.sections import Config
from ldm3d.covariates import CovariateSchema
from ldm3d.data.preparing import load_prepared
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation.fidelity import Evaluation, Measure, evaluate
from ldm3d.evaluation.likelihood import score
from ldm3d.evaluation.subgroups import PART, SHARE, VolumeScores, beyond
from ldm3d.evaluation.utility import downstream_utility
from ldm3d.metrics.features import Extractor
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.audit import audit as run_audit
from ldm3d.privacy.volumes import generated_for, of_scans
from ldm3d.processes import ALONE, Processes
from ldm3d.report import audit as audit_page
from ldm3d.report.page import Goal, Section
from ldm3d.report.sections import (
    LIKELIHOOD,
    categories_lights,
    categories_section,
    lights,
    likelihood_section,
    prediction_section,
    utility_light,
    utility_section,
)
from ldm3d.rulers.categories import Hits, Reader, count_hits
from ldm3d.rulers.regression import TrainingFeatures, fit_predictor, training_features, together
from ldm3d.statistics.bootstrap import mean_interval

TIMES, SCORED = 32, 50  # U-Net calls of the bound for each volume, and volumes: minutes, not hours
READ_OFF, NATS = 0.1, 0.05  # gaps between groups that are called small: of shares read off right, in nats per latent dimension


@dataclass
class Assessment:
    """Everything that was found, ready for `ldm3d.report.write.write_report`.

    Attributes:
        found: the evaluation.
        goals: lights of all parts.
        extra: sections of the parts that are not in `found`; figures: theirs, for metrics.json.
    """

    found: Evaluation
    goals: list[Goal] = field(default_factory=list)
    extra: list[Section] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def assess(
    pipeline: Pipeline,
    config: Config,
    trained: pd.DataFrame,
    held_out: pd.DataFrame,
    measure: Measure,
    extractor: Extractor,
    sampling: Sampling,
    num_generated: int,
    predict: bool = True,
    downstream: bool = False,
    likelihood: bool = False,
    audit: bool = False,
    processes: Processes = ALONE,
) -> Assessment:
    """Evaluate a model on held-out scans.

    Args:
        pipeline: the model.
        config, trained, held_out: from `ldm3d.experiment.scans_by_use`; `trained` is empty where that data is not at hand.
        measure: see `ldm3d.evaluation.fidelity`.
        extractor: see `ldm3d.metrics.features`.
        sampling, num_generated: how to generate, and how many volumes.
        predict: whether to read covariates that `measure` does not give off the image, by regression.
        downstream: whether to train regressors on real, synthetic and both.
        likelihood: whether to score held-out volumes.
        audit: whether to look for copies of training subjects, among as many volumes again, half of them for training
            subjects' own covariates.
        processes: that share the work; all of them have to call this.

    Raises:
        InputError: no held-out volume, or volumes that cannot be generated so.
    """
    schema = pipeline.schema
    subjects, people = held_out[schema.names].to_dict("records"), list(held_out["subject"])
    known = trained[schema.names].to_dict("records") if len(trained) else None

    def load(i: int) -> NDArray:
        return load_prepared(config, held_out["key"][i])

    given = measure(pipeline.cropped(load(0)), pipeline.grid.spacing_mm)
    missing = [c.name for c in schema if c.kind == "continuous" and c.name not in given]
    learnt, names = None, []
    if (missing or any(c.categories for c in schema)) and (predict or downstream):
        learnt = _learn(pipeline, config, trained, extractor, processes)
    if learnt and predict:
        predictor = fit_predictor(learnt, missing, extractor, pipeline.device)
        names, measure = list(predictor.ridges), together(predictor, measure)
    others = {"extractor": extractor, "people": people, "processes": processes, "training": known}
    found = evaluate(pipeline, subjects, load, measure, sampling, num_generated, **others)

    result = Assessment(found)
    if names:
        result.extra.append(prediction_section(found, schema, names, len(learnt.rows)))
        result.figures["predicted"] = {"covariates": names, "training_volumes": len(learnt.rows)}
    if learnt and predict:
        _add_categories(result, learnt, schema)
    if downstream:
        _add_usefulness(result, learnt, missing)
    if likelihood and processes.is_main:
        _add_likelihood(result, pipeline, subjects, load, sampling.seed)
    if audit:
        _add_audit(result, pipeline, config, trained, held_out, sampling, num_generated, processes)
    found.judge_groups(schema)
    result.goals = [*lights(found), *result.goals]
    return result


def _learn(
    pipeline: Pipeline, config: Config, trained: pd.DataFrame, extractor: Extractor, processes: Processes
) -> TrainingFeatures | None:
    """Features of training volumes; None, with a warning, where there are none."""
    if trained.empty:
        warnings.warn(
            "covariates that the measure does not give are not predicted: that is learnt from the volumes that the model was "
            "trained on, and --data has none of them",
            stacklevel=2,
        )
        return None
    keys, people = list(trained["key"]), list(trained["subject"])
    rows = trained[pipeline.schema.names].to_dict("records")
    try:
        return training_features(pipeline, rows, people, lambda i: load_prepared(config, keys[i]), extractor, processes)
    except InputError as error:  # the other figures are worth having
        warnings.warn(f"no covariate is predicted: {error}", stacklevel=2)
        return None


def _add_categories(result: Assessment, learnt: TrainingFeatures, schema: CovariateSchema) -> None:
    """Whether generated volumes show the categories that were asked."""
    found, hits = result.found, []
    for covariate in schema:
        if covariate.kind != "categorical" or not found.features:
            continue
        name, own = covariate.name, [i for i, row in enumerate(learnt.rows) if row[covariate.name] is not None]
        features = np.concatenate([learnt.features[own], learnt.reconstructed[own]])
        try:
            reader = Reader(features, [learnt.rows[i][name] for i in own] * 2, [learnt.people[i] for i in own] * 2)
        except InputError as error:  # the other figures are worth having
            warnings.warn(f"{name} is not read off: {error}", stacklevel=2)
            continue
        hits += _read_off(found, name, reader)
    if hits:
        result.extra.append(categories_section(hits))
        result.goals += categories_lights(hits)
        result.figures["categories"] = [each.to_dict() for each in hits]


def _read_off(found: Evaluation, name: str, reader: Reader) -> list[Hits]:
    """A category on real, reconstructed and generated volumes; by group, the latter two beyond real."""
    hits, known = [], np.full(len(found.subjects), np.nan)
    real = found.subjects, found.people, range(len(found.subjects))
    for kind, (rows, people, sources) in (
        ("real", real),
        ("reconstructed", real),
        ("generated", (found.requests, found.asked, found.sources)),
    ):
        given = [i for i, row in enumerate(rows) if row[name] is not None]
        if not given:
            continue
        rows, people, sources = ([each[i] for i in given] for each in (rows, people, sources))
        hits.append(count_hits(name, kind, reader(found.features[kind][given]), [row[name] for row in rows], people))
        values, figure = hits[-1].right, f"{name} read off, {kind}"
        if kind == "real":
            known[given] = values
        else:
            values, figure = beyond(values, known, sources), f"{figure} beyond real"
        found.judged.append(VolumeScores(f"{figure}: share right", values, rows, people, "high", READ_OFF, kind == "real"))
    return hits


def _add_usefulness(result: Assessment, learnt: TrainingFeatures | None, names: list[str]) -> None:
    """Regressors of each covariate, trained on real, synthetic and both."""
    found = result.found
    if learnt is None or not found.features:
        return
    result.figures["downstream"] = []
    for name in names:
        own, values = learnt.with_value(name)
        real = learnt.features[own], values
        synthetic = _with_value(found.features["generated"], found.requests, name)
        tested = _with_value(found.features["real"], found.subjects, name)
        rows = [row for row in found.subjects if row[name] is not None]
        people = [person for person, row in zip(found.people, found.subjects) if row[name] is not None]
        try:
            useful = downstream_utility(name, real, synthetic, tested, people)
        except InputError as error:  # the other figures are worth having
            warnings.warn(f"whether synthetic volumes are of use for {name} is not measured: {error}", stacklevel=2)
            continue
        result.extra.append(utility_section(useful))
        result.goals.append(utility_light(useful))
        result.figures["downstream"].append(useful.to_dict())
        known = useful.errors["real"]
        for kind, errors in useful.errors.items():
            figure, tolerance, own = f"{name} learnt from {kind}", PART * useful.mae[kind], kind == "real"
            if not own:
                errors, figure = beyond(errors, known, range(len(known))), f"{figure} beyond real"
            found.judged.append(VolumeScores(f"{figure}: MAE", errors, rows, people, "low", tolerance, own))


def _with_value(features: NDArray, rows: list[dict], name: str) -> tuple[NDArray, NDArray]:
    own = [i for i, row in enumerate(rows) if row[name] is not None]
    return features[own], np.array([rows[i][name] for i in own], dtype=float)


def _add_likelihood(
    result: Assessment, pipeline: Pipeline, subjects: list[dict], load: Callable[[int], NDArray], seed: int
) -> None:
    found = result.found
    scored = found.order[:SCORED]
    people = [found.people[i] for i in scored]
    table = score(pipeline, [subjects[i] for i in scored], lambda i: load(scored[i]), "bound", TIMES, seed=seed)
    picture = figures.histogram(table["bound"].to_numpy(), "nats per latent dimension", "bound of held-out volumes")
    result.extra.append(likelihood_section(table, people, TIMES, figures.to_data_uri(picture)))
    result.figures["likelihood"] = {"volumes": len(table), "times": TIMES} | {
        name: {"mean": float(table[name].mean()), "interval": mean_interval(table[name].to_numpy(), people)}
        for name in LIKELIHOOD
    }
    for name, tolerance in (("bound", NATS), ("bits_per_voxel", SHARE * abs(float(table["bits_per_voxel"].mean())))):
        figure = f"likelihood, {LIKELIHOOD[name][1]}"
        rows = [found.subjects[i] for i in scored]
        found.judged.append(VolumeScores(figure, table[name].to_numpy(), rows, people, "low", tolerance, True))


def _add_audit(
    result: Assessment,
    pipeline: Pipeline,
    config: Config,
    trained: pd.DataFrame,
    held_out: pd.DataFrame,
    sampling: Sampling,
    volumes: int,
    processes: Processes,
) -> None:
    """Copies of training subjects, and what the loss tells of them."""
    if trained.empty:
        warnings.warn("no audit: --data has none of the volumes that the model was trained on", stacklevel=2)
        return
    training, others = (of_scans(config, scans, pipeline) for scans in (trained, held_out))
    looked = generated_for(pipeline, training, others, volumes, sampling, sampling.seed)
    found, _ = run_audit(pipeline, training, others, looked, seed=sampling.seed, processes=processes)
    if processes.is_main:
        pictures = audit_page.draw(pipeline, found)
        result.extra += audit_page.sections(found, pictures)
        result.goals += audit_page.goals(found)
        result.figures["audit"] = found.to_dict()
        result.found.judged += found.judged
