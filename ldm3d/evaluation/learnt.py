"""The parts of an evaluation that learn from training volumes: covariates and categories by regression, downstream utility."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d.config.sections import Config
from ldm3d.covariates import CovariateSchema
from ldm3d.data.conditions import ScanImages
from ldm3d.errors import InputError
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.subgroups import ERROR_TOLERANCE, VolumeScores, minus_real
from ldm3d.evaluation.utility import downstream_utility
from ldm3d.metrics.features import Extractor
from ldm3d.pipeline import Pipeline
from ldm3d.processes import Processes
from ldm3d.rulers.categories import Reader, count_hits
from ldm3d.rulers.regression import TrainingFeatures, training_features

CATEGORY_TOLERANCE = 0.1  # a small gap: in the share of hits


def features_of_training(
    pipeline: Pipeline, config: Config, trained: pd.DataFrame, extractor: Extractor, processes: Processes
) -> TrainingFeatures | None:
    """Features of training volumes; None, with a warning, if there are none."""
    try:
        if trained.empty:
            raise InputError("the regression is fitted to volumes that the model was trained on, and --data has none of them")
        people = list(trained["subject"])
        rows = trained[pipeline.schema.names].to_dict("records")
        return training_features(pipeline, rows, people, ScanImages(config, trained).made, extractor, processes)
    except InputError as error:  # the other figures are still useful
        warnings.warn(f"no covariate is predicted: {error}", stacklevel=2)
        return None


def add_categories(result: Evaluation, learnt: TrainingFeatures, schema: CovariateSchema) -> None:
    """Whether the requested category is recognised on generated volumes."""
    for covariate in schema:
        if covariate.kind == "categorical":
            try:
                features, values, people = learnt.labelled(covariate.name)
                reader = Reader(features, values, people)
            except InputError as error:  # the other figures are still useful
                warnings.warn(f"{covariate.name} is not predicted: {error}", stacklevel=2)
                continue
            _recognise(result, covariate.name, reader)


def _recognise(result: Evaluation, name: str, reader: Reader) -> None:
    """A category on real, reconstructed and generated volumes; by group, the latter two minus real."""
    known = np.full(len(result.subjects), np.nan)
    real = result.subjects, result.people, range(len(result.subjects))
    for kind, (rows, people, sources) in (
        ("real", real),
        ("reconstructed", real),
        ("generated", (result.requests, result.requested_people, result.sources)),
    ):
        given = [i for i, row in enumerate(rows) if row[name] is not None]
        if not given:
            continue
        rows, people, sources = ([each[i] for i in given] for each in (rows, people, sources))
        hits = count_hits(name, kind, reader(result.features[kind][given]), [row[name] for row in rows], people)
        result.categories.append(hits)
        values, title = hits.right, f"{name} recognised, {kind}"
        if kind == "real":
            known[given] = values
        else:
            values, title = minus_real(values, known, sources), f"{title} minus real"
        small = CATEGORY_TOLERANCE, kind == "real"
        result.scores.append(VolumeScores(f"{title}: share correct", values, rows, people, "high", *small))


def add_utility(result: Evaluation, learnt: TrainingFeatures, names: Sequence[str]) -> None:
    """Regressors of each covariate, fitted to real volumes, to synthetic volumes and to both."""
    result.utility = []
    for name in names:
        own, values = learnt.with_value(name)
        real = learnt.features[own], np.array(values, dtype=float)
        synthetic = _with_value(result.features["generated"], result.requests, name)
        tested = _with_value(result.features["real"], result.subjects, name)
        rows = [row for row in result.subjects if row[name] is not None]
        people = [person for person, row in zip(result.people, result.subjects) if row[name] is not None]
        try:
            useful = downstream_utility(name, real, synthetic, tested, people)
        except InputError as error:  # the other figures are still useful
            warnings.warn(f"downstream utility for {name} is not assessed: {error}", stacklevel=2)
            continue
        result.utility.append(useful)
        for kind, errors in useful.errors.items():
            title, small, of_real = f"{name}, trained on {kind}", ERROR_TOLERANCE * useful.mae[kind], kind == "real"
            if not of_real:
                errors, title = minus_real(errors, useful.errors["real"], range(len(errors))), f"{title} minus real"
            result.scores.append(VolumeScores(f"{title}: MAE", errors, rows, people, "low", small, of_real))


def _with_value(features: NDArray, rows: list[dict], name: str) -> tuple[NDArray, NDArray]:
    own = [i for i, row in enumerate(rows) if row[name] is not None]
    return features[own], np.array([rows[i][name] for i in own], dtype=float)
