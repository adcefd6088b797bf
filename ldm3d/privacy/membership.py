"""Membership inference: does the diffusion loss reveal whether a person was in the training data?

An attacker who has a person's volume and the model computes how well the network denoises that volume: a low loss indicates
that the model was trained on it (Matsumoto et al. 2023; Carlini et al. 2023). The figure of merit is not the accuracy, but the
share of training subjects that are identified with hardly any false positive: the true positive rate at a false positive rate
of 1% (Carlini et al. 2022). That rate depends on one or two held-out subjects, so the area under the ROC curve is computed
too: it shows a loss that is slightly lower for most training subjects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from ldm3d.covariates import Value
from ldm3d.diffusion.preconditioning import Preconditioning
from ldm3d.errors import InputError
from ldm3d.models.unet import pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator
from ldm3d.statistics.conformal import Rate

TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # nearer to 1 hardly anything is left of the volume
REPEATS = 2  # noises at each time
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Membership:
    """How well an attacker distinguishes training subjects from held-out ones.

    Attributes:
        training, held_out: number of subjects of each.
        each_named: of each training subject, whether it is identified: its loss is lower than the k-th lowest loss of held-out
            subjects.
        accused: k; k / (held_out + 1) is the false positive rate, 1% with 99 held-out subjects or more.
        auc, auc_low, auc_high: probability that a training subject has a lower loss than a held-out one, with its 95%
            interval (DeLong et al. 1988); 0.5 is chance.
        auc_chance: p-value of the AUC (Mann and Whitney 1947), exact for few subjects.
        losses: time -> (mean over training subjects, mean over held-out ones).
    """

    training: int
    held_out: int
    each_named: NDArray
    accused: int
    auc: float
    auc_low: float
    auc_high: float
    auc_chance: float
    losses: dict[float, tuple[float, float]]

    @property
    def named(self) -> int:
        """Number of training subjects that are identified."""
        return int(self.each_named.sum())

    @property
    def true_positives(self) -> Rate:
        return Rate(self.named, self.training)

    @property
    def false_positive_rate(self) -> float:
        return self.accused / (self.held_out + 1)

    @property
    def chance(self) -> float:
        """Probability of identifying at least as many by chance: beta-binomial, as the threshold is a held-out subject's."""
        return float(stats.betabinom.sf(self.named - 1, self.training, self.accused, self.held_out + 1 - self.accused))

    def to_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "each_named"}
        derived = {"tpr": self.true_positives.to_dict(), "fpr": self.false_positive_rate, "chance": self.chance}
        losses = {str(t): list(pair) for t, pair in self.losses.items()}
        return own | {"named": self.named} | derived | {"losses": losses}


@torch.no_grad()
def losses_of(pipeline: Pipeline, volume: NDArray, row: Mapping[str, Value], seed: int = 0) -> NDArray:
    """The diffusion loss of a volume, given its covariates, at every time of `TIMES`: (8,).

    Mean squared error of the predicted target over `REPEATS` noises, the same for all volumes, as differences between noises
    would mask those between volumes.

    Args:
        volume: (C, X, Y, Z) in [0, 1] on the pipeline's grid.
        row: from `Pipeline.parse`.
    """
    x = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None].to(pipeline.device, pipeline.dtype)
    x = pipeline.autoencoder.encode_stage_2_inputs(x).float()
    x = pad_to(x, pipeline.unet.padded_shape(x.shape[2:]))  # (1, c, x, y, z)
    denoise, process = pipeline.denoiser([row]), pipeline.process
    target = Preconditioning(process, pipeline.target, pipeline.scales)
    losses = []
    for i, t in enumerate(TIMES):
        errors = []
        for repeat in range(REPEATS):
            noise = torch.randn(x.shape, generator=generator("membership", seed, i, repeat)).to(x)
            z = process.add_noise(x, noise, t)
            found = denoise(z, t)
            predicted = target.target_of(found, (z - process.alpha(t) * found) / process.sigma(t), t)
            errors.append((predicted - target.target_of(x, noise, t)).square().mean().item())
        losses.append(sum(errors) / REPEATS)
    return np.array(losses)


def infer_members(training: NDArray, held_out: NDArray, level: float = FALSE_POSITIVE_RATE) -> Membership:
    """Membership inference from the losses of both groups, one row a subject: (n, times) and (m, times).

    Losses at each time are standardised over all subjects; the attack uses their mean over times.

    Raises:
        InputError: fewer than two subjects in a group.
    """
    if min(len(training), len(held_out)) < 2:
        raise InputError(
            f"{len(training)} training and {len(held_out)} held-out subjects; membership inference needs two of each"
        )
    losses = np.concatenate([training, held_out])
    scores = ((losses - losses.mean(axis=0)) / losses.std(axis=0).clip(1e-12)).mean(axis=1)
    members, others = scores[: len(training)], np.sort(scores[len(training) :])
    accused = min(max(1, int(level * (len(others) + 1) + 1e-9)), len(others))
    auc = _auc(-members, -others)
    by_chance = float(stats.mannwhitneyu(members, others).pvalue)
    means = {t: (float(a), float(b)) for t, a, b in zip(TIMES, training.mean(axis=0), held_out.mean(axis=0))}
    return Membership(len(members), len(others), members < others[accused - 1], accused, *auc, by_chance, means)


def _auc(positive: NDArray, negative: NDArray) -> tuple[float, float, float]:
    """Area under the ROC curve and its 95% interval by DeLong et al. 1988, eq. 5."""
    wins = (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)
    auc = float(wins.mean())
    variance = wins.mean(axis=1).var(ddof=1) / len(positive) + wins.mean(axis=0).var(ddof=1) / len(negative)
    reach = 1.96 * float(variance) ** 0.5
    return auc, max(auc - reach, 0.0), min(auc + reach, 1.0)
