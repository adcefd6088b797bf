"""How near volumes come to each subject's own truth, where a model is given images of the subject; beside simpler answers.

Distortion: PSNR, SSIM and mean absolute error of single samples, of their mean, and of simpler answers, in the foreground, or
where voxels were missing in what is given. Calibration: whether the spread of samples tells how far off they are.
Perception (realism, a classifier) is in the other parts of an evaluation.
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ldm3d.config.conditions import DegradedCondition, ImageCondition
from ldm3d.covariates import Value
from ldm3d.description import Sampling
from ldm3d.evaluation.label_maps import SCORES, label_scores
from ldm3d.evaluation.simpler import Simpler, non_local_means
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import Given
from ldm3d.metrics.reconstruction import foreground, psnr, ssim
from ldm3d.models.unet import cut_to
from ldm3d.pipeline import Pipeline
from ldm3d.processes import Processes, share_work
from ldm3d.randomness import generator
from ldm3d.statistics.bootstrap import mean_interval

SUBJECTS, SAMPLES, SHOWN = 16, 8, 3
VARIES = 0.01  # standard deviation of samples from which on a voxel counts as one that varies
FIGURES = ("psnr_db", "ssim", "mae")
SAMPLE, MEAN, ONE_STEP, TRAINED, REGRESSION, AVERAGE, OWN, CUBIC, NON_LOCAL, LIMIT = (
    *("a sample", "mean of the samples", "one step", "a network for regression", "regression on voxels"),
    *("mean of the training", "what is given", "cubic interpolation", "non-local means", "reconstruction of the truth"),
)
ANSWERS = {
    SAMPLE: "one volume of the model",
    MEAN: f"of {SAMPLES} volumes of the model",
    ONE_STEP: "what the network expects of pure noise and the images: regression by the same network",
    TRAINED: "one step of a network that was trained for regression alone",
    REGRESSION: "ridge regression from the voxel and its surroundings in what is given, fitted to training scans",
    AVERAGE: "of training scans, whatever is given",
    OWN: "the image itself, where it shows the same contrast",
    CUBIC: "of what is given in a lower resolution",
    NON_LOCAL: "of scikit-image, on what is given with noise",
    LIMIT: "the truth through the autoencoder: no sample can be expected to come nearer",
}
SIMPLER = (ONE_STEP, TRAINED, REGRESSION, AVERAGE, OWN, CUBIC, NON_LOCAL)


@dataclass(frozen=True)
class Truth:
    """What was found of some held-out scans.

    Attributes:
        scans: their indices; `people`: the person of each.
        answers: name of `ANSWERS` -> (scans, 3), the `FIGURES`.
        crps: continuous ranked probability score of the samples, (scans,), in units of the mean absolute error.
        deviation: standard deviation of the samples, (scans,).
        inside: share of the voxels that vary whose truth lies within the 90% interval of the samples, (scans,).
        labels: of a model that makes label maps, (scans, 4), `ldm3d.evaluation.label_maps.SCORES`; else (scans, 0).
        shown: of the first scans (given, a sample, mean of the samples, one step, truth), (C, X, Y, Z) each.
    """

    scans: list[int]
    people: list[Hashable]
    answers: dict[str, NDArray]
    crps: NDArray
    deviation: NDArray
    inside: NDArray
    labels: NDArray
    shown: list[tuple[NDArray, ...]]

    def mean(self, answer: str, figure: str) -> tuple[float, tuple[float, float]]:
        """Of a figure over scans, with its 95% interval."""
        values = self.answers[answer][:, FIGURES.index(figure)]
        return float(values.mean()), mean_interval(values, self.people)

    def beyond(self, answer: str) -> tuple[float, tuple[float, float]]:
        """By how many dB the mean of the samples is better than another answer, with its 95% interval."""
        values = self.answers[MEAN][:, 0] - self.answers[answer][:, 0]
        return float(values.mean()), mean_interval(values, self.people)

    def held(self) -> tuple[float, tuple[float, float]]:
        """Mean of `inside`, with its 95% interval."""
        known = np.flatnonzero(np.isfinite(self.inside))
        values, people = self.inside[known], [self.people[i] for i in known]
        return (float(values.mean()), mean_interval(values, people)) if len(known) else (float("nan"), (float("nan"),) * 2)

    def of_labels(self) -> dict[str, dict[str, Any]]:
        """By the name of a score its mean over scans, with its 95% interval; {} for a model that makes images."""
        pairs = ((float(values.mean()), mean_interval(values, self.people)) for values in self.labels.T)
        return {name: dict(zip(("mean", "interval"), pair)) for name, pair in zip(SCORES, pairs)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "scans": len(self.scans),
            "samples": SAMPLES,
            "answers": {
                name: {figure: dict(zip(("mean", "interval"), self.mean(name, figure))) for figure in FIGURES}
                for name in self.answers
            },
            "crps": float(self.crps.mean()),
            "deviation": float(self.deviation.mean()),
            "within_90_percent": dict(zip(("mean", "interval"), self.held())),
            **({"labels": self.of_labels()} if self.labels.size else {}),
        }


def compare_with_truth(
    pipeline: Pipeline,
    rows: Sequence[Mapping[str, Value]],
    people: Sequence[Hashable],
    made: Callable[[int], NDArray],
    given: Callable[[int], Given],
    scans: Sequence[int],
    sampling: Sampling,
    simpler: Simpler | None,
    processes: Processes,
    cubic: Callable[[int], NDArray | None] | None = None,
    regression: Pipeline | None = None,
) -> Truth:
    """Generate `SAMPLES` volumes for each of the first `SUBJECTS` of some scans, and compare them with the truth.

    Args:
        pipeline: of a model with conditions.
        rows, people: covariates of each held-out scan, and its person.
        made: index of a scan -> what should be made of it, (C, X, Y, Z).
        given: index of a scan -> its images.
        scans: indices of held-out scans.
        sampling: how.
        simpler: fitted to training scans; None without them.
        processes: that share the work; all of them have to call this.
        cubic: index of a scan -> its image in a lower resolution by cubic interpolation; see `ScanImages.cubic`.
        regression: a model of the same images that was trained for regression: its one step is compared, too.
    """
    scans, given = list(scans[:SUBJECTS]), lru_cache(1)(given)
    images = Images(pipeline.conditions, lambda number: given(scans[number // SAMPLES]), {"evaluation": "held-out"}, None)
    conditioned, trained = pipeline.given(images), regression.given(images) if regression else None

    def work(n: int) -> tuple:
        i, numbers = scans[n], range(n * SAMPLES, (n + 1) * SAMPLES)
        truth, known = made(i), images.of(n * SAMPLES)
        drawn = np.stack([*conditioned.volumes([rows[i]] * SAMPLES, sampling, numbers=numbers)])
        answers = {SAMPLE: drawn[0], MEAN: drawn.mean(axis=0), ONE_STEP: one_step(conditioned, rows[i], numbers[0])}
        others = {REGRESSION: simpler.regression(known.volumes), AVERAGE: simpler.mean} if simpler else {}
        if (own := _own(pipeline, known)) is not None:
            others[OWN] = own
        if cubic and (interpolated := cubic(i)) is not None:
            others[CUBIC] = interpolated
        if own is not None and _is_noisy(pipeline):
            with contextlib.suppress(ImportError):  # scikit-image is not needed for anything else
                others[NON_LOCAL] = non_local_means(own)
        if trained:
            answers[TRAINED] = one_step(trained, rows[i], numbers[0])
        others[LIMIT] = pipeline.reconstruct(torch.from_numpy(truth)[None])[0].cpu().numpy()
        answers |= {name: pipeline.cropped(volume) for name, volume in others.items()}
        truth, where = pipeline.cropped(truth), pipeline.cropped(_where(truth, known))
        found = {name: _figures(volume, truth, where) for name, volume in answers.items()}
        first = next(iter(known.volumes.values())).numpy()
        picture = in_greys(first) if len(first) != len(truth) else first
        shown = (pipeline.cropped(picture), *(answers[name] for name in (SAMPLE, MEAN, ONE_STEP)), truth)
        scores = label_scores(drawn, truth, where.any(axis=0)) if pipeline.labels else np.zeros(0)
        return found, *spread(drawn, truth, where), scores, shown if n < SHOWN else None

    title = f"{SAMPLES} volumes for each of {len(scans)} scans, beside the truth"
    found, crps, deviation, inside, labels, shown = zip(*share_work(work, range(len(scans)), processes, title, "scan"))
    answers = {name: np.array([each[name] for each in found]) for name in found[0]}
    pictures = [each for each in shown if each is not None]
    return Truth(scans, [people[i] for i in scans], answers, *map(np.array, (crps, deviation, inside, labels)), pictures)


@torch.no_grad()
def one_step(pipeline: Pipeline, row: Mapping[str, Value], number: int) -> NDArray:
    """What the network expects of pure noise and of the images of a request, (C, X, Y, Z): E[x | images] if it is exact."""
    channels, *shape = pipeline.autoencoder.latent_shape(pipeline.grid.shape)
    noise = torch.randn(1, channels, *pipeline.unet.padded_shape(shape), generator=generator("one step", number))
    expected = pipeline.denoiser([row], numbers=[number])(noise.to(pipeline.device), 1.0)
    return pipeline.images.finished(number, pipeline.decode(cut_to(expected, shape))[0].cpu().numpy(), pipeline.cropped)


def spread(samples: NDArray, truth: NDArray, where: NDArray) -> tuple[float, float, float]:
    """CRPS and standard deviation of samples, and the share of the truth in their 90% intervals.

    Args:
        samples: (S, C, X, Y, Z).
        truth, where: (C, X, Y, Z); the voxels that count.

    CRPS in the form that is fair to few samples (Ferro 2014, eq. 2). The interval is that of Student's t around the mean, of
    voxels whose samples vary; NaN where none does.
    """
    x, y, count = samples[:, where].astype(np.float64), truth[where].astype(np.float64), len(samples)
    between = np.abs(x[:, None] - x[None]).sum(axis=(0, 1)) / (2 * count * (count - 1))
    crps = float((np.abs(x - y).mean(axis=0) - between).mean())
    mean, deviation = x.mean(axis=0), x.std(axis=0, ddof=1)
    half = stats.t.ppf(0.95, count - 1) * np.sqrt(1 + 1 / count) * deviation
    varies = deviation > VARIES
    inside = float((np.abs(mean - y) <= half)[varies].mean()) if varies.any() else float("nan")
    return crps, float(deviation.mean()), inside


def _where(truth: NDArray, known: Given) -> NDArray:
    """The voxels that count, (C, X, Y, Z): the foreground of the truth; of it, where voxels may be missing, those that are."""
    where = foreground(torch.from_numpy(truth)[None])[0]
    for measured in known.measured.values():
        where = where & (measured == 0)
    return where.numpy()


def in_greys(shares: NDArray) -> NDArray:
    """Shares of groups of labels, (G, X, Y, Z), as one picture (1, X, Y, Z): a grey for each group."""
    return np.tensordot(np.linspace(0.25, 1, len(shares), dtype=shares.dtype), shares, 1)[None]


def _own(pipeline: Pipeline, known: Given) -> NDArray | None:
    """The image that shows the same contrast as the truth, if one is given as a whole."""
    for each in pipeline.conditions:
        same = isinstance(each, DegradedCondition) or (isinstance(each, ImageCondition) and each.visit)
        if same and each.name in known.volumes and each.name not in known.measured:
            return known.volumes[each.name].numpy()
    return None


def _is_noisy(pipeline: Pipeline) -> bool:
    """Whether what is given is the volume with noise, and nothing else is wrong with it."""
    of = [each.degradations for each in pipeline.conditions if isinstance(each, DegradedCondition)]
    return any({step.operator for step in each} == {"noise"} for each in of)


def _figures(volume: NDArray, truth: NDArray, where: NDArray) -> list[float]:
    """`FIGURES` of a volume."""
    pair: tuple[Tensor, ...] = tuple(torch.from_numpy(each)[None] for each in (volume, truth, where))
    error = float(np.abs(volume - truth)[where].mean())
    return [psnr(*pair).item(), ssim(*pair).item(), error]
