"""Assess a model: `evaluate` for fidelity, realism and subgroups, `assess` for these and the optional parts.

The optional parts are covariates and categories that are predicted by regression, downstream utility, and likelihood.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.config.sections import Config
from ldm3d.covariates import CovariateSchema
from ldm3d.data.preparing import load_prepared
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation import sweeps
from ldm3d.evaluation.anatomy import REFERENCES, class_names, compare_anatomy
from ldm3d.evaluation.discriminability import tell_apart
from ldm3d.evaluation.fidelity import compare_kinds, group_scores
from ldm3d.evaluation.likelihood import COLUMNS, score
from ldm3d.evaluation.realism import PAIRED_VOLUMES, FeatureSet, assess_realism
from ldm3d.evaluation.realism_by_group import realism_gaps
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.samples import Measure, Sample, Sampler, usable
from ldm3d.evaluation.selection import in_turn
from ldm3d.evaluation.subgroups import ERROR_TOLERANCE, MEAN_TOLERANCE, VolumeScores, groupings, minus_real
from ldm3d.evaluation.support import outside_training
from ldm3d.evaluation.utility import downstream_utility
from ldm3d.metrics.discriminability import FOLDS, STEPS
from ldm3d.metrics.features import Extractor
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE, Processes
from ldm3d.rulers.categories import Reader, count_hits
from ldm3d.rulers.regression import MAX_VOLUMES, TrainingFeatures, fit_predictor, together, training_features
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.rulers.volumetry import apply_measure

SHOWN = 3  # volumes that are kept for pictures
BOUND_TIMES, SCORED = 32, 50  # U-Net calls of the bound for each volume, and volumes: minutes, not hours
CATEGORY_TOLERANCE, NATS_TOLERANCE = 0.1, 0.05  # small gaps: in the share of hits, and in nats per latent dimension


def evaluate(
    pipeline: Pipeline,
    subjects: Sequence[Mapping[str, Any]],
    load: Callable[[int], NDArray],
    measure: Measure,
    sampling: Sampling,
    num_generated: int = 200,
    extractor: Extractor | None = None,
    people: Sequence[Hashable] | None = None,
    processes: Processes = ALONE,
    training: Sequence[Mapping[str, Any]] | None = None,
    segmenter: Segmenter | None = None,
    classifier: bool = False,
) -> Evaluation:
    """Reconstruct held-out volumes, generate for their covariates, measure both, and sweep each continuous covariate.

    Args:
        pipeline: the model.
        subjects: covariates of each held-out volume; missing values are left open and not assessed.
        load: index of a subject -> volume (C, X, Y, Z) on the pipeline's grid.
        measure: see `ldm3d.evaluation.samples.Measure`.
        sampling: how to generate.
        num_generated: volumes to generate for held-out subjects' covariates, in the order of `ldm3d.evaluation.selection`,
            repeated if there are fewer.
        extractor: of features, by which distributions are compared; None omits realism.
        people: the person in each held-out volume; None: all are different.
        processes: that share the work; all of them have to call this, and all get the same answer.
        training: covariates of the training volumes, to find requests outside of them; None if not available.
        segmenter: of anatomy, which is compared if there is one.
        classifier: whether to train one to tell generated from reconstructed volumes.

    Returns:
        The evaluation without gaps between groups, for which `analyse_subgroups` is called when all scores are there.

    Raises:
        InputError: no held-out volume.
    """
    if not subjects:
        raise InputError("no held-out volume to evaluate on; raise data.splits.test, or give data that was not trained on")
    schema, rows = pipeline.schema, pipeline.parse(subjects)
    people = list(people or range(len(rows)))
    order = in_turn(people, sampling.seed)
    requests = [rows[order[i % len(order)]] for i in range(num_generated)]
    extractor = usable(extractor, pipeline)
    sampler = Sampler(pipeline, measure, extractor, order, SHOWN, processes, segmenter, classifier)

    real, reconstructed, qualities = sampler.reconstructed(load)
    result = Evaluation(*qualities, subjects=rows, people=people, order=order, requests=requests)
    generated = sampler.generated(requests, sampling)
    result.real, result.reconstructed = ([group[i].volume for i in order[:SHOWN]] for group in (real, reconstructed))
    result.generated = [sample.volume for sample in generated[:SHOWN]]
    result.outside, result.joint = outside_training(schema, requests, training), training is not None
    if extractor:
        _add_realism(result, pipeline, (real, reconstructed, generated), processes)
    if segmenter:
        sets = ([sample.anatomy for sample in group if sample.anatomy] for group in (real, reconstructed, generated))
        whose = people, result.requested_people, order
        result.anatomy = compare_anatomy(*sets, class_names(segmenter), *whose, processes)
    if classifier and processes.is_main:
        _add_discriminability(result, [reconstructed[i] for i in order], generated, pipeline.device)

    quantities = [c.name for c in schema if c.kind == "continuous" and c.name in real[0].measured]
    for name in quantities:
        values = [[sample.measured[name] for sample in group] for group in (real, reconstructed, generated)]
        result.measured[name] = dict(zip(("real", "reconstructed", "generated"), values))
        result.comparisons += compare_kinds(name, result, *values)
    result.scores = group_scores(result)
    for covariate in schema:
        if covariate.seen and quantities:
            result.sweeps.append(sweeps.sweep(pipeline, covariate.name, measure, sampling, quantities, processes))
    return result


def _add_realism(result: Evaluation, pipeline: Pipeline, samples: Sequence[Sequence[Sample]], processes: Processes) -> None:
    """Metrics of realism of (real, reconstructed, generated) samples, overall and by group."""
    own, requested = (result.subjects, result.people), (result.requests, result.requested_people)
    sets = [FeatureSet([one.features for one in group], *of) for group, of in zip(samples, (own, own, requested))]
    of_real, of_reconstructed, of_generated = sets
    names = "real", "reconstructed", "generated"
    result.features = {name: group.stack("features").numpy() for name, group in zip(names, sets)}
    bands = groupings(pipeline.schema, result.subjects)
    parts = {
        "realism": lambda: assess_realism(of_real, of_generated, pipeline.device),
        "realism_of_reconstructions": lambda: assess_realism(of_real, of_reconstructed, pipeline.device),
        "realism_gaps": lambda: realism_gaps(pipeline.schema, bands, of_real, of_generated, pipeline.device),
    }
    for name, part in tqdm(parts.items(), desc="realism", unit="comparison", disable=not processes.is_main):
        setattr(result, name, part())


def _add_discriminability(
    result: Evaluation, reconstructed: Sequence[Sample], generated: Sequence[Sample], device: str | torch.device
) -> None:
    """Of those volumes that were kept for it; `reconstructed` in the order of `Evaluation.order`."""
    one, other = ([sample.compared for sample in group if sample.compared is not None] for group in (reconstructed, generated))
    people, requested = [result.people[i] for i in result.order[: len(one)]], result.requested_people[: len(other)]
    try:
        result.discriminability = tell_apart(one, other, people, requested, device)
    except InputError as error:  # the other figures are still useful
        warnings.warn(f"no classifier is trained: {error}", stacklevel=3)


def plan(
    pipeline: Pipeline,
    trained: int,
    held_out: int,
    num: int,
    sampling: Sampling,
    regression: bool,
    likelihood: bool,
    segmenter: bool = False,
    classifier: bool = False,
) -> list[str]:
    """What `assess` will do, a line for each part that takes long; `trained` and `held_out` are numbers of volumes."""
    swept = sum(bool(c.seen) for c in pipeline.schema)
    lines = [f"reconstruct {held_out} held-out volumes", f"generate {num} volumes in {sampling.steps} steps each"]
    if regression and trained and len(pipeline.schema):
        lines.insert(0, f"reconstruct {min(trained, MAX_VOLUMES)} training volumes for regression")
    if segmenter:
        lines.append(f"segment {2 * held_out + num} volumes, and find the nearest anatomy of each among {REFERENCES} people")
    if classifier:
        each = min(held_out, num, PAIRED_VOLUMES)
        lines.append(f"train {FOLDS} classifiers of {each} generated and {each} reconstructed volumes, {STEPS} steps each")
    if swept:
        lines.append(f"generate {swept * sweeps.VALUES * sweeps.REPEATS} volumes that sweep {swept} covariates")
    if likelihood:
        lines.append(f"likelihood of {min(held_out, SCORED)} held-out volumes, {BOUND_TIMES} U-Net calls each")
    return lines


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
    processes: Processes = ALONE,
    segmenter: Segmenter | None = None,
    classifier: bool = False,
) -> Evaluation:
    """Evaluate a model on held-out scans.

    Args:
        config, trained, held_out: from `ldm3d.experiment.scans_by_use`; `trained` is empty if that data is not available.
        predict: whether to predict covariates that `measure` does not give, by regression on images.
        downstream: whether to assess downstream utility.
        likelihood: whether to compute likelihoods of held-out volumes.

    Other arguments, result and errors are those of `evaluate`.
    """
    schema = pipeline.schema
    subjects, people = held_out[schema.names].to_dict("records"), list(held_out["subject"])
    training = trained[schema.names].to_dict("records") if len(trained) else None

    def load(i: int) -> NDArray:
        return load_prepared(config, held_out["key"][i])

    given = apply_measure(measure, pipeline.cropped(load(0)), pipeline.grid.spacing_mm)
    missing = [c.name for c in schema if c.kind == "continuous" and c.name not in given]
    learnt, names = None, []
    if (missing or any(c.categories for c in schema)) and (predict or downstream):
        learnt = _training_features(pipeline, config, trained, extractor, processes)
    if learnt and predict:
        predictor = fit_predictor(learnt, missing, extractor, pipeline.device)
        names, measure = list(predictor.ridges), together(predictor, measure)
    others = {"extractor": extractor, "people": people, "processes": processes, "training": training}
    result = evaluate(
        pipeline, subjects, load, measure, sampling, num_generated, **others, segmenter=segmenter, classifier=classifier
    )
    if training is not None:
        result.training, result.training_people = schema.parse_all(training), list(trained["subject"])
    if names:
        result.predicted = names, len(learnt.rows)
    if learnt and predict and result.features:
        _add_categories(result, learnt, schema)
    if downstream and learnt and result.features:
        _add_utility(result, learnt, missing)
    if likelihood and processes.is_main:
        _add_likelihood(result, pipeline, subjects, load, sampling.seed)
    return result


def _training_features(
    pipeline: Pipeline, config: Config, trained: pd.DataFrame, extractor: Extractor, processes: Processes
) -> TrainingFeatures | None:
    """Features of training volumes; None, with a warning, if there are none."""
    try:
        if trained.empty:
            raise InputError("the regression is fitted to volumes that the model was trained on, and --data has none of them")
        keys, people = list(trained["key"]), list(trained["subject"])
        rows = trained[pipeline.schema.names].to_dict("records")
        return training_features(pipeline, rows, people, lambda i: load_prepared(config, keys[i]), extractor, processes)
    except InputError as error:  # the other figures are still useful
        warnings.warn(f"no covariate is predicted: {error}", stacklevel=2)
        return None


def _add_categories(result: Evaluation, learnt: TrainingFeatures, schema: CovariateSchema) -> None:
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


def _add_utility(result: Evaluation, learnt: TrainingFeatures, names: Sequence[str]) -> None:
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


def _add_likelihood(
    result: Evaluation, pipeline: Pipeline, subjects: list[dict], load: Callable[[int], NDArray], seed: int
) -> None:
    scored = result.order[:SCORED]
    table = score(pipeline, [subjects[i] for i in scored], lambda i: load(scored[i]), "bound", BOUND_TIMES, seed=seed)
    table.attrs["times"] = BOUND_TIMES
    result.likelihood = table
    rows, people = ([each[i] for i in scored] for each in (result.subjects, result.people))
    voxel_tolerance = MEAN_TOLERANCE * abs(float(table["bits_per_voxel"].mean()))
    for name, small in (("bound", NATS_TOLERANCE), ("bits_per_voxel", voxel_tolerance)):
        title = f"likelihood, {COLUMNS[name][1]}"
        result.scores.append(VolumeScores(title, table[name].to_numpy(), rows, people, "low", small, True))
