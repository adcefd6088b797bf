"""Assess a model: `evaluate` for fidelity, realism and subgroups, `assess` for these and the optional parts.

The optional parts are covariates and categories that are predicted by regression, downstream utility, and likelihood.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.config.sections import Config
from ldm3d.data.conditions import ScanImages
from ldm3d.data.marked import are_synthetic
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation import sweeps
from ldm3d.evaluation.anatomy import REFERENCES, class_names, compare_anatomy
from ldm3d.evaluation.discriminability import tell_apart
from ldm3d.evaluation.fidelity import compare_kinds, group_scores
from ldm3d.evaluation.learnt import add_categories, add_utility, features_of_training
from ldm3d.evaluation.likelihood import COLUMNS, score
from ldm3d.evaluation.realism import PAIRED_VOLUMES, FeatureSet, assess_realism
from ldm3d.evaluation.realism_by_group import realism_gaps
from ldm3d.evaluation.results import Evaluation
from ldm3d.evaluation.samples import Measure, Sample, Sampler, usable
from ldm3d.evaluation.selection import in_turn
from ldm3d.evaluation.simpler import Simpler
from ldm3d.evaluation.subgroups import MEAN_TOLERANCE, VolumeScores, groupings
from ldm3d.evaluation.support import outside_training
from ldm3d.evaluation.truth import SAMPLES, SUBJECTS, compare_with_truth
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import Given, told_of
from ldm3d.metrics.discriminability import FOLDS, STEPS
from ldm3d.metrics.features import Extractor, OfFirstChannel
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE, Processes
from ldm3d.rulers.regression import MAX_VOLUMES, fit_predictor, together
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.rulers.volumetry import apply_measure

SHOWN = 3  # volumes that are kept for pictures
BOUND_TIMES, SCORED = 32, 50  # U-Net calls of the bound for each volume, and volumes: minutes, not hours
NATS_TOLERANCE = 0.05  # a small gap, in nats per latent dimension


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
    given: Callable[[int], Given] | None = None,
    simpler: Simpler | None = None,
    cubic: Callable[[int], NDArray | None] | None = None,
    regression: Pipeline | None = None,
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
        given: index of a subject -> its images, of a model that takes some; volumes are then generated from them, too.
        simpler: answers without a model, fitted to training scans, that such volumes are compared with.
        cubic, regression: see `ldm3d.evaluation.truth.compare_with_truth`.

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
    alone = pipeline
    if given:
        pipeline = _with_images(alone, lambda number: given(order[number % len(order)]))
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
    one = _with_images(alone, lambda _: given(order[0])) if given else alone  # of one person in all of a sweep
    for covariate in schema:
        if covariate.seen and quantities:
            result.sweeps.append(sweeps.sweep(one, covariate.name, measure, sampling, quantities, processes))
    if given:
        beside = simpler, processes, cubic, regression
        result.truth = compare_with_truth(alone, rows, people, load, given, order, sampling, *beside)
    return result


def _with_images(pipeline: Pipeline, of_request: Callable[[int], Given]) -> Pipeline:
    """The pipeline, given the images of each request in a series."""
    return pipeline.given(Images(pipeline.conditions, of_request, {"images": "of held-out scans"}, None))


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
    if pipeline.conditions:
        lines.append(f"generate {SAMPLES} volumes from the images of each of {min(held_out, SUBJECTS)} held-out scans")
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
    regression: Pipeline | None = None,
) -> Evaluation:
    """Evaluate a model on held-out scans.

    Args:
        extractor: of models of several contrasts, it sees the first.
        config, trained, held_out: from `ldm3d.experiment.scans_by_use`; `trained` is empty if that data is not available.
        predict: whether to predict covariates that `measure` does not give, by regression on images.
        downstream: whether to assess downstream utility.
        likelihood: whether to compute likelihoods of held-out volumes.

    Other arguments, result and errors are those of `evaluate`.
    """
    schema, extractor = pipeline.schema, OfFirstChannel(extractor) if len(pipeline.suffixes) > 1 else extractor
    subjects, people = held_out[schema.names].to_dict("records"), list(held_out["subject"])
    training = trained[schema.names].to_dict("records") if len(trained) else None

    scans = ScanImages(config, held_out)
    load, given, simpler = scans.made, None, None
    if pipeline.conditions:
        given = lambda i: given_of(pipeline, scans, i)  # noqa: E731
        simpler = fit_simpler(config, trained)
    measured = apply_measure(measure, pipeline.cropped(load(0)), pipeline.grid.spacing_mm)
    missing = [c.name for c in schema if c.kind == "continuous" and c.name not in measured]
    learnt, names = None, []
    if (missing or any(c.categories for c in schema)) and (predict or downstream):
        learnt = features_of_training(pipeline, config, trained, extractor, processes)
    if learnt and predict:
        predictor = fit_predictor(learnt, missing, extractor, pipeline.device)
        names, measure = list(predictor.ridges), together(predictor, measure)
    others = {"extractor": extractor, "people": people, "processes": processes, "training": training}
    others |= {"given": given, "simpler": simpler, "cubic": scans.cubic, "regression": regression}
    result = evaluate(
        pipeline, subjects, load, measure, sampling, num_generated, **others, segmenter=segmenter, classifier=classifier
    )
    result.synthetic = are_synthetic(held_out, schema.covariates)
    if training is not None:
        result.training, result.training_people = schema.parse_all(training), list(trained["subject"])
    if names:
        result.predicted = names, len(learnt.rows)
    if learnt and predict and result.features:
        add_categories(result, learnt, schema)
    if downstream and learnt and result.features:
        add_utility(result, learnt, missing)
    if likelihood and processes.is_main:
        _add_likelihood(result, pipeline, subjects, load, sampling.seed)
    return result


def given_of(pipeline: Pipeline, scans: ScanImages, i: int) -> Given:
    """The images of a held-out scan."""
    told = {name: (None, covariates) for name, covariates in scans.told(i).items()}
    volumes, measured = scans.given(i)
    return Given(volumes, measured, {}, told_of(pipeline.conditions, told, pipeline.schema), scans.coarse(i))


def fit_simpler(config: Config, trained: pd.DataFrame) -> Simpler | None:
    """Fitted to training scans that lack nothing; None without such."""
    if trained.empty:
        return None
    scans = ScanImages(config, trained)
    return Simpler.fit(scans.made, scans.given, scans.complete) if scans.complete else None


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
