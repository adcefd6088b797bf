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
from ldm3d.evaluation.metrics import Agreement, agreement, psnr, ssim
from ldm3d.pipeline import Pipeline, Sampling

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
    """

    psnr_db: NDArray
    ssim: NDArray
    comparisons: list[Comparison] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    real: list[NDArray] = field(default_factory=list)
    reconstructed: list[NDArray] = field(default_factory=list)
    generated: list[NDArray] = field(default_factory=list)
    requests: list[dict[str, Value]] = field(default_factory=list)

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

    Raises:
        InputError: no held-out volume.
    """
    if not subjects:
        raise InputError("no held-out volume to evaluate on; raise data.splits.test, or give data that was not trained on")
    spacing, rows = pipeline.grid.spacing_mm, pipeline.parse(subjects)
    qualities, similarities, on_real, on_reconstructed = [], [], [], []
    result = Evaluation(np.array([]), np.array([]))
    for i in tqdm(range(len(rows)), desc="reconstruct", unit="volume"):
        volume = torch.from_numpy(load(i))[None, None].to(pipeline.device)  # (1, 1, X, Y, Z)
        again = pipeline.reconstruct(volume)
        qualities.append(psnr(again, volume).item())
        similarities.append(ssim(again, volume).item())
        real, reconstructed = (pipeline.cropped(v[0, 0].cpu().numpy()) for v in (volume, again))  # as generated ones are
        on_real.append(measure(real, spacing))
        on_reconstructed.append(measure(reconstructed, spacing))
        if i < shown:
            result.real.append(real)
            result.reconstructed.append(reconstructed)
    result.psnr_db, result.ssim = np.array(qualities), np.array(similarities)

    result.requests = [rows[i % len(rows)] for i in range(num_generated)]
    on_generated = []
    volumes = pipeline.volumes(result.requests, sampling)
    for volume in tqdm(volumes, desc="generate", unit="volume", total=num_generated):
        on_generated.append(measure(volume, spacing))
        if len(result.generated) < shown:
            result.generated.append(volume)

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
            result.sweeps.append(sweep(pipeline, covariate.name, measure, sampling, judged, sweep_values, sweep_repeats))
    return result


def sweep(
    pipeline: Pipeline,
    covariate: str,
    measure: Measure,
    sampling: Sampling,
    quantities: Sequence[str],
    num_values: int = 6,
    repeats: int = 4,
) -> Sweep:
    """Ask one covariate at evenly spaced values between the 5% and 95% point of a normal with its mean and deviation.

    Args:
        quantities: what to keep of `measure`'s answer.
        num_values, repeats: V, and noises at each value.
    """
    known = pipeline.schema[covariate]
    low, high = (max(known.seen[0], known.mean - 1.64 * known.std), min(known.seen[1], known.mean + 1.64 * known.std))
    values = np.clip(np.linspace(low, high, num_values).round(1), *known.seen).tolist()
    measured = {name: np.zeros((num_values, repeats)) for name in quantities}
    pictures = []
    for i, value in enumerate(tqdm(values, desc=f"sweep {covariate}", unit="value")):
        requests = pipeline.parse([{**pipeline.schema.middle(), covariate: value}] * repeats)
        for k, volume in enumerate(pipeline.volumes(requests, sampling)):
            answer = measure(volume, pipeline.grid.spacing_mm)
            for name in quantities:
                measured[name][i, k] = answer[name]
            if k == 0:
                pictures.append(volume)
    ranks = {name: float(stats.spearmanr(values, m.mean(axis=1)).statistic) for name, m in measured.items()}
    return Sweep(covariate, values, measured, ranks, pictures)
