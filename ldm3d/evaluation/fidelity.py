"""Do generated volumes show what they were asked for?

Everything is measured on images, by a function that can be replaced: `measure(volume, spacing_mm) -> {name: value}`. A
covariate of the schema is judged if the function measures something of its name.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from tqdm import tqdm

from ldm3d.covariates import Value
from ldm3d.errors import InputError
from ldm3d.evaluation.features import Extractor
from ldm3d.evaluation.likeness import Seen, compare_all, look_at
from ldm3d.evaluation.measures import Finding
from ldm3d.evaluation.metrics import Agreement, agreement, psnr, ssim
from ldm3d.pipeline import Pipeline, Sampling, grouped
from ldm3d.processes import ALONE, Processes

Measure = Callable[[NDArray, Sequence[float]], Mapping[str, float]]


@dataclass
class Comparison:
    """Values of one covariate in two places, and how they agree.

    Attributes:
        covariate: its name.
        kind: what was compared, for example "generated".
        reference: what was asked, or the table's truth; (N,).
        measured: on the images; (N,).
        agreement: of the two.
    """

    covariate: str
    kind: str
    reference: NDArray
    measured: NDArray
    agreement: Agreement


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
        psnr_db, ssim: of the reconstruction of each held-out volume.
        comparisons: measured against table on originals and reconstructions, against requests on generated volumes.
        sweeps: over each continuous covariate.
        real, reconstructed, generated: a few volumes (X, Y, Z) of the same subjects, for pictures.
        requests: of the generated volumes.
        likeness: measures of the generated volumes' distribution beside the held-out ones'.
    """

    psnr_db: NDArray
    ssim: NDArray
    comparisons: list[Comparison] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    real: list[NDArray] = field(default_factory=list)
    reconstructed: list[NDArray] = field(default_factory=list)
    generated: list[NDArray] = field(default_factory=list)
    requests: list[dict[str, Value]] = field(default_factory=list)
    likeness: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        return {
            "reconstruction": {
                "volumes": len(self.psnr_db),
                "psnr_db": {"mean": float(self.psnr_db.mean()), "std": float(self.psnr_db.std())},
                "ssim": {"mean": float(self.ssim.mean()), "std": float(self.ssim.std())},
            },
            "fidelity": [{"covariate": c.covariate, "kind": c.kind, **c.agreement.to_dict()} for c in self.comparisons],
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
        }

    def find(self, covariate: str, kind: str) -> Comparison | None:
        return next((c for c in self.comparisons if (c.covariate, c.kind) == (covariate, kind)), None)


def evaluate(
    pipeline: Pipeline,
    subjects: Sequence[Mapping[str, Any]],
    load: Callable[[int], NDArray],
    measure: Measure,
    sampling: Sampling,
    num_generated: int = 64,
    sweep_values: int = 6,
    sweep_repeats: int = 4,
    shown: int = 3,
    extractor: Extractor | None = None,
    people: Sequence[Any] | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """Reconstruct held-out volumes, generate for their covariates, measure both, and sweep each continuous covariate.

    Args:
        pipeline: the model.
        subjects: covariates of each held-out volume; missing values are left open and not judged.
        load: number of a subject -> volume (X, Y, Z) on the pipeline's grid.
        measure: see the top of this file.
        sampling: how to generate.
        num_generated: volumes asked for held-out subjects' covariates; subjects are asked again in turn if they are fewer.
        sweep_values, sweep_repeats: values of a sweep and noises at each.
        shown: volumes kept for pictures.
        extractor: of features, by which distributions are compared; None leaves that out.
        people: who each held-out volume shows, for several of one person are more alike; None: all are different.
        processes: that share the work; all of them have to call this, and all get the same answer.

    Raises:
        InputError: no held-out volume.
    """
    if not subjects:
        raise InputError("no held-out volume to evaluate on; raise data.splits.test, or give data that was not trained on")
    spacing, rows = pipeline.grid.spacing_mm, pipeline.parse(subjects)

    def reconstruct(i: int) -> tuple:
        volume = torch.from_numpy(load(i))[None, None].to(pipeline.device)  # (1, 1, X, Y, Z)
        again = pipeline.reconstruct(volume)
        pair = [pipeline.cropped(v[0, 0].cpu().numpy()) for v in (volume, again)]  # as generated ones are
        quality = psnr(again, volume).item(), ssim(again, volume).item()
        return *quality, *(measure(v, spacing) for v in pair), pair if i < shown else None, look(pair[0], i)

    def generate(numbers: list[int]) -> list[tuple]:
        volumes = pipeline.volumes([requests[i] for i in numbers], sampling, numbers=numbers)
        return [(measure(v, spacing), v if i < shown else None, look(v, i)) for i, v in zip(numbers, volumes)]

    def look(volume: NDArray, number: int) -> Seen | None:
        return look_at(volume, number, extractor, pipeline.device) if extractor else None

    try:
        look(np.zeros(pipeline.output_grid.shape, np.float32), 0)
    except InputError as error:  # the other figures are worth having
        warnings.warn(f"how alike real and synthetic volumes are is not measured: {error}", stacklevel=2)
        extractor = None

    done = spread(reconstruct, range(len(rows)), processes, "reconstruct")
    qualities, similarities, on_real, on_reconstructed, pairs, real_seen = zip(*done)
    result = Evaluation(np.array(qualities), np.array(similarities))
    result.real, result.reconstructed = (list(volumes) for volumes in zip(*filter(None, pairs)))

    requests = result.requests = [rows[i % len(rows)] for i in range(num_generated)]
    groups = list(grouped(range(num_generated), pipeline.group_size))  # whole batches: a part of one costs as much
    made = [each for group in spread(generate, groups, processes, "generate") for each in group]
    on_generated, pictures, generated_seen = zip(*made)
    result.generated = list(pictures[:shown])
    if extractor:
        result.likeness = compare_all(real_seen, generated_seen, people or range(len(rows)), pipeline.device)

    judged = [c.name for c in pipeline.schema if c.kind == "continuous" and c.name in on_real[0]]
    places = (("real", rows, on_real), ("reconstructed", rows, on_reconstructed))
    for name in judged:
        for kind, references, measured in (*places, ("generated", result.requests, on_generated)):
            pairs = [(row[name], m[name]) for row, m in zip(references, measured) if row[name] is not None]
            reference, values = np.array(pairs, dtype=float).reshape(-1, 2).T
            try:
                result.comparisons.append(Comparison(name, kind, reference, values, agreement(reference, values)))
            except InputError as error:  # the other figures are worth having
                warnings.warn(f"{name} on {kind} volumes is not judged: {error}", stacklevel=2)
    for covariate in pipeline.schema:
        if covariate.seen and judged:
            name = covariate.name
            result.sweeps.append(sweep(pipeline, name, measure, sampling, judged, sweep_values, sweep_repeats, processes))
    return result


def spread(work: Callable[[Any], Any], items: Sequence, processes: Processes, title: str) -> list:
    """work(item) of all items, in their order, on every process; each does its share."""
    own = processes.share(items)
    return processes.merge([work(item) for item in tqdm(own, desc=title, unit="step", disable=not processes.is_main)])


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
    values = np.clip(np.linspace(low, high, num_values).round(1), *known.seen).tolist()

    def ask(value: float) -> tuple:
        requests = pipeline.parse([{**pipeline.schema.middle(), covariate: value}] * repeats)
        volumes = list(pipeline.volumes(requests, sampling))
        return [measure(volume, pipeline.grid.spacing_mm) for volume in volumes], volumes[0]

    answers, pictures = zip(*spread(ask, values, processes, f"sweep {covariate}"))
    measured = {name: np.array([[answer[name] for answer in row] for row in answers]) for name in quantities}  # (V, repeats)
    ranks = {name: float(stats.spearmanr(values, m.mean(axis=1)).statistic) for name, m in measured.items()}
    return Sweep(covariate, values, measured, ranks, list(pictures))
