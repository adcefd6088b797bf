"""Do generated volumes show what they were asked for?

Everything is measured on images, by a function that can be replaced: `measure(volume, spacing_mm) -> {name: value}`. A
covariate of the schema is judged if the function measures something of its name. Every volume is generated once, and only
measures and features of it are kept.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ldm3d.covariates import CovariateSchema, Value
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation import subgroups as fairness
from ldm3d.evaluation.realism import IN_PAIRS, Seen, compare_all, look_at
from ldm3d.evaluation.realism_by_group import SeenVolumes, gaps_of_likeness
from ldm3d.evaluation.selection import in_turn
from ldm3d.evaluation.subgroups import Gap, Judged
from ldm3d.evaluation.support import Beyond, beyond_training
from ldm3d.generation.sampling import grouped
from ldm3d.metrics.features import Extractor
from ldm3d.metrics.reconstruction import foreground, psnr, ssim
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE, Processes, share_work
from ldm3d.rulers.volumetry import apply_measure
from ldm3d.statistics.agreement import Comparison, compare
from ldm3d.statistics.bootstrap import mean_interval
from ldm3d.statistics.equivalence import Finding

Measure = Callable[[NDArray, Sequence[float]], Mapping[str, float]]
QUALITIES = ("psnr_db", "ssim", "psnr_foreground_db", "ssim_foreground")


@dataclass
class Sweep:
    """One covariate asked at several values with the same noise, all others left open (or, where they must be given, at one).

    Attributes:
        covariate, values: what was asked, (V,).
        measured: quantity -> (V, repeats).
        rank_correlation: quantity -> Spearman's correlation of the asked value with the mean over repeats.
        volumes: of the first repeat, for pictures.
    """

    covariate: str
    values: list[float]
    measured: dict[str, NDArray]
    rank_correlation: dict[str, float]
    volumes: list[NDArray]


@dataclass
class Evaluation:
    """Everything that `evaluate` found.

    Attributes:
        psnr_db, ssim: of the reconstruction of each held-out volume, over the whole grid.
        psnr_foreground_db, ssim_foreground: the same where the original shows something; these are judged.
        comparisons: of kind "real" and "reconstructed", measured against the table; "kept", measured on reconstructions
            against the same on originals; "generated", measured against what was asked.
        sweeps: over each continuous covariate.
        real, reconstructed, generated: a few volumes (C, X, Y, Z) of the same subjects, the first of `order`, for pictures.
        order: numbers of all held-out volumes, in the order in which they are used where not all are.
        requests: of the generated volumes, the covariates of held-out volumes in this order, and again from its start.
        subjects, people: covariates of each held-out volume, and whom it shows.
        judged: what is judged by group; who finds out more adds to it and calls `judge_groups`.
        likeness_gaps: of the measures in `likeness`, not yet corrected for their number.
        gaps: between groups of people, all of them.
        beyond: requests that lie beyond what training saw; `joint` if values that never came together were looked for.
        features: "real" (held-out), "reconstructed" and "generated" -> (N, D), where features were taken.
        likeness: measures of the generated volumes' distribution beside the held-out ones'.
        likeness_of_reconstructions: the same of the held-out volumes after the autoencoder, but for pairs.
    """

    psnr_db: NDArray
    ssim: NDArray
    psnr_foreground_db: NDArray
    ssim_foreground: NDArray
    comparisons: list[Comparison] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    real: list[NDArray] = field(default_factory=list)
    reconstructed: list[NDArray] = field(default_factory=list)
    generated: list[NDArray] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    requests: list[dict[str, Value]] = field(default_factory=list)
    subjects: list[dict[str, Value]] = field(default_factory=list)
    people: list[Hashable] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    likeness_gaps: list[Gap] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    beyond: list[Beyond] = field(default_factory=list)
    joint: bool = False
    features: dict[str, NDArray] = field(default_factory=dict)
    likeness: list[Finding] = field(default_factory=list)
    likeness_of_reconstructions: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        return {
            "reconstruction": {
                "volumes": len(self.psnr_db),
                **{name: self.quality(name) for name in QUALITIES},
            },
            "held_out": {"order": self.order, "generated_for": self.sources},
            "fidelity": [c.to_dict() for c in self.comparisons],
            "fairness": [gap.to_dict() for gap in self.gaps],
            "beyond_training": [each.to_dict() for each in self.beyond],
            "sweeps": [
                {
                    "covariate": s.covariate,
                    "values": s.values,
                    "measured_mean": {name: values.mean(axis=1).tolist() for name, values in s.measured.items()},
                    "rank_correlation": s.rank_correlation,
                }
                for s in self.sweeps
            ],
            "likeness": [finding.to_dict() for finding in self.likeness],
            "likeness_of_reconstructions": [finding.to_dict() for finding in self.likeness_of_reconstructions],
        }

    def quality(self, name: str) -> dict[str, float]:
        """Mean of one of `QUALITIES` with its 95% interval, and its standard deviation."""
        values = getattr(self, name)
        low, high = mean_interval(values, self.people or None)
        return {"mean": float(values.mean()), "low": low, "high": high, "std": float(values.std())}

    @property
    def sources(self) -> list[int]:
        """The number of the held-out volume whose covariates were asked of each generated one."""
        return [self.order[i % len(self.order)] for i in range(len(self.requests))]

    @property
    def asked(self) -> list[Hashable]:
        """Whose covariates were asked of each generated volume."""
        return [self.people[i] for i in self.sources]

    def judge_groups(self, schema: CovariateSchema) -> None:
        """Find `gaps`."""
        self.gaps = fairness.gaps(schema, fairness.groupings(schema, self.subjects), self.judged, self.likeness_gaps)

    def find(self, covariate: str, kind: str) -> Comparison | None:
        return next((c for c in self.comparisons if (c.covariate, c.kind) == (covariate, kind)), None)


def evaluate(
    pipeline: Pipeline,
    subjects: Sequence[Mapping[str, Any]],
    load: Callable[[int], NDArray],
    measure: Measure,
    sampling: Sampling,
    num_generated: int = 200,
    sweep_values: int = 6,
    sweep_repeats: int = 4,
    shown: int = 3,
    extractor: Extractor | None = None,
    people: Sequence[Hashable] | None = None,
    processes: Processes = ALONE,
    training: Sequence[Mapping[str, Any]] | None = None,
) -> Evaluation:
    """Reconstruct held-out volumes, generate for their covariates, measure both, and sweep each continuous covariate.

    Args:
        pipeline: the model.
        subjects: covariates of each held-out volume; missing values are left open and not judged.
        load: number of a subject -> volume (C, X, Y, Z) on the pipeline's grid.
        measure: see the top of this file.
        sampling: how to generate.
        num_generated: volumes asked for held-out subjects' covariates, everybody's once before anybody's again, see
            `ldm3d.evaluation.selection`; if they are fewer, again from the start.
        sweep_values, sweep_repeats: values of a sweep and noises at each.
        shown: volumes kept for pictures.
        extractor: of features, by which distributions are compared; None leaves that out.
        people: who each held-out volume shows, for several of one person are more alike; None: all are different.
        processes: that share the work; all of them have to call this, and all get the same answer.
        training: covariates of the volumes that were trained on, to tell what lies beyond them; None if not at hand.

    Raises:
        InputError: no held-out volume.
    """
    if not subjects:
        raise InputError("no held-out volume to evaluate on; raise data.splits.test, or give data that was not trained on")
    spacing, rows = pipeline.grid.spacing_mm, pipeline.parse(subjects)
    whom = list(people or range(len(rows)))
    order = in_turn(whom, sampling.seed)
    requests = [rows[order[i % len(order)]] for i in range(num_generated)]
    paired = set(order[:IN_PAIRS])

    def reconstruct(i: int) -> tuple:
        volume = torch.from_numpy(load(i))[None].to(pipeline.device)  # (1, C, X, Y, Z)
        again = pipeline.reconstruct(volume)
        pair = [pipeline.cropped(v[0].cpu().numpy()) for v in (volume, again)]  # as generated ones are
        quality = [figure(again, volume, at).item() for at in (None, foreground(volume)) for figure in (psnr, ssim)]
        seen = look(pair[0], i in paired), look(pair[1], False)
        return quality, *(apply_measure(measure, v, spacing) for v in pair), pair if i in order[:shown] else None, *seen

    def generate(numbers: list[int]) -> list[tuple]:
        volumes = pipeline.volumes([requests[i] for i in numbers], sampling, numbers=numbers)
        return [
            (apply_measure(measure, v, spacing), v if i < shown else None, look(v, i < IN_PAIRS))
            for i, v in zip(numbers, volumes)
        ]

    def look(volume: NDArray, in_pairs: bool) -> Seen | None:
        return look_at(volume, in_pairs, extractor, pipeline.device) if extractor else None

    try:
        look(np.zeros((pipeline.autoencoder.in_channels, *pipeline.output_grid.shape), np.float32), False)
    except InputError as error:  # the other figures are worth having
        warnings.warn(f"how alike real and synthetic volumes are is not measured: {error}", stacklevel=2)
        extractor = None

    done = share_work(reconstruct, range(len(rows)), processes, "reconstruct")
    qualities, on_real, on_reconstructed, pairs, real_seen, again_seen = zip(*done)
    result = Evaluation(*np.array(qualities).T, subjects=rows, people=whom, order=order, requests=requests)
    result.real, result.reconstructed = (list(volumes) for volumes in zip(*(pairs[i] for i in order[:shown])))

    groups = list(grouped(range(num_generated), pipeline.group_size))  # whole batches: a part of one costs as much
    made = [each for group in share_work(generate, groups, processes, "generate") for each in group]
    on_generated, pictures, generated_seen = zip(*made)
    result.generated = list(pictures[:shown])
    result.beyond, result.joint = beyond_training(pipeline.schema, requests, training), training is not None
    if extractor:
        _compare_sets(result, pipeline, real_seen, again_seen, generated_seen)

    judged = [c.name for c in pipeline.schema if c.kind == "continuous" and c.name in on_real[0]]
    for name in judged:
        measured = ([m[name] for m in each] for each in (on_real, on_reconstructed, on_generated))
        result.comparisons += _compare_kinds(name, result, *measured)
    result.judged = judged_by_group(result)
    result.judge_groups(pipeline.schema)
    for covariate in pipeline.schema:
        if covariate.seen and judged:
            name = covariate.name
            result.sweeps.append(sweep(pipeline, name, measure, sampling, judged, sweep_values, sweep_repeats, processes))
    return result


def _compare_sets(
    result: Evaluation, pipeline: Pipeline, real: Sequence[Seen], reconstructed: Sequence[Seen], generated: Sequence[Seen]
) -> None:
    """How like real volumes the others are, in all and by group."""
    result.likeness = compare_all(real, generated, result.people, result.asked, pipeline.device)
    result.likeness_of_reconstructions = compare_all(real, reconstructed, result.people, result.people, pipeline.device)
    for name, seen in (("real", real), ("reconstructed", reconstructed), ("generated", generated)):
        result.features[name] = torch.cat([one.features for one in seen]).double().numpy()
    bands = fairness.groupings(pipeline.schema, result.subjects)
    volumes = SeenVolumes(real, result.subjects, result.people), SeenVolumes(generated, result.requests, result.asked)
    result.likeness_gaps = gaps_of_likeness(pipeline.schema, bands, *volumes, pipeline.device)


def _compare_kinds(
    name: str,
    result: Evaluation,
    on_real: Sequence[float],
    on_reconstructed: Sequence[float],
    on_generated: Sequence[float],
) -> list[Comparison]:
    """One covariate in every two places."""
    found, table = [], [row[name] for row in result.subjects]
    for kind, reference, measured, whom in (
        ("real", table, on_real, result.people),
        ("reconstructed", table, on_reconstructed, result.people),
        ("kept", on_real, on_reconstructed, result.people),
        ("generated", [row[name] for row in result.requests], on_generated, result.asked),
    ):
        try:
            found.append(compare(name, kind, reference, measured, whom))
        except InputError as error:  # the other figures are worth having
            warnings.warn(f"{name} on {kind} volumes is not judged: {error}", stacklevel=2)
    return found


def evenly(low: float, high: float, count: int) -> list[float]:
    """So many values from low to high, with three significant digits of the range between them, and none outside of it."""
    digits = 2 - math.floor(math.log10(high - low)) if high > low else 15
    return np.linspace(low, high, count).round(digits).clip(low, high).tolist()


def judged_by_group(result: Evaluation) -> list[Judged]:
    """What is judged by group: reconstruction, and every covariate's error; on generated volumes beyond that on real ones."""
    real = result.subjects, result.people
    psnr_db, similarity = result.psnr_foreground_db, result.ssim_foreground
    figures = [
        Judged("PSNR of the foreground (dB)", psnr_db, *real, "high", fairness.PSNR_DB, decides=True),
        Judged("SSIM of the foreground", similarity, *real, "high", fairness.SSIM, decides=True),
    ]
    for c in result.comparisons:
        if c.kind == "reconstructed":  # the measure's error and the autoencoder's are judged each by itself
            continue
        generated, ruler = c.kind == "generated", result.find(c.covariate, "real")
        own = c.kind == "real"
        tolerance = fairness.tolerance(c) if own or ruler is None else fairness.tolerance(ruler, fairness.OWN)
        rows, whom = (result.requests, result.asked) if generated else real
        error = _errors(c, len(rows))
        size, title = abs(error), f"{c.covariate}, {c.kind}"
        if generated:
            known = _errors(ruler, len(result.subjects))
            size, error = (fairness.beyond(*each, result.sources) for each in ((size, abs(known)), (error, known)))
            title += " beyond real"
        figures.append(Judged(f"{title}: MAE", size, rows, whom, "low", tolerance, own, not own))
        figures.append(Judged(f"{title}: bias", error, rows, whom, "neither", tolerance, own, not own))
    return figures


def _errors(comparison: Comparison | None, volumes: int) -> NDArray:
    """The error on each of so many volumes, NaN where there is none."""
    error = np.full(volumes, np.nan)
    if comparison:
        error[comparison.volumes] = comparison.error
    return error


def sweep(
    pipeline: Pipeline,
    covariate: str,
    measure: Measure,
    sampling: Sampling,
    quantities: Sequence[str],
    num_values: int = 6,
    repeats: int = 4,
    processes: Processes = ALONE,
) -> Sweep:
    """Ask one covariate at evenly spaced values between the 5% and 95% point of a normal with its mean and deviation.

    Args:
        quantities: what to keep of `measure`'s answer.
        num_values, repeats: V, and noises at each value.
        processes: see `evaluate`.
    """
    known = pipeline.schema[covariate]
    low, high = (max(known.seen[0], known.mean - 1.64 * known.std), min(known.seen[1], known.mean + 1.64 * known.std))
    values = evenly(low, high, num_values)

    def ask(value: float) -> tuple:
        requests = pipeline.parse([{**pipeline.schema.middle(), covariate: value}] * repeats)
        volumes = list(pipeline.volumes(requests, sampling))
        return [apply_measure(measure, volume, pipeline.grid.spacing_mm) for volume in volumes], volumes[0]

    answers, pictures = zip(*share_work(ask, values, processes, f"sweep {covariate}"))
    measured = {name: np.array([[answer[name] for answer in row] for row in answers]) for name in quantities}  # (V, repeats)
    ranks = {name: float(stats.spearmanr(values, m.mean(axis=1)).statistic) for name, m in measured.items()}
    return Sweep(covariate, values, measured, ranks, list(pictures))
