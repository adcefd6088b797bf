"""What a sceptic tries before a healthy counterpart, and how well a score finds lesions; for benchmarks/anomaly.py.

A person is a dictionary: age, male (0 or 1), volume and the residual of each method (X, Y, Z), lesion (X, Y, Z) bool.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.applications.calibration import FORMING, Calibration

RIDGE = 0.1  # share of the mean variance that is added to each: 40 people tell little of a covariance of seven voxels
NEAR = [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
Person = dict[str, Any]


class Regression:
    """Each voxel's expected intensity by age, its square and sex, by least squares."""

    def __init__(self, people: list[Person]):
        rows = np.stack([self._features(person) for person in people])
        volumes = np.stack([person["volume"].ravel() for person in people])
        self.weights = np.linalg.lstsq(rows, volumes, rcond=None)[0]

    def residual(self, person: Person) -> NDArray:
        expected: NDArray = (self._features(person) @ self.weights).reshape(person["volume"].shape)
        return np.asarray(person["volume"] - expected)

    @staticmethod
    def _features(person: Person) -> NDArray:
        age = (person["age"] - 50) / 20
        return np.array([1, age, age**2, person["male"]])


class Mahalanobis:
    """Distance of each voxel with its neighbours from healthy people's (Mahalanobis 1936)."""

    def __init__(self, residuals: list[NDArray]):
        features = np.stack([self._features(each) for each in residuals])  # (N, V, 7)
        self.mean = features.mean(axis=0)
        away = features - self.mean
        covariance = np.einsum("nvi,nvj->vij", away, away) / (len(away) - 1)
        variance = np.einsum("vii->v", covariance) / len(NEAR)
        ridge = RIDGE * variance + 1e-5
        self.inverse = np.linalg.inv(covariance + ridge[:, None, None] * np.eye(len(NEAR)))

    def residual(self, residual: NDArray) -> NDArray:
        away = self._features(residual) - self.mean
        distance = np.sqrt(np.einsum("vi,vij,vj->v", away, self.inverse, away))
        found: NDArray = (distance - len(NEAR) ** 0.5).clip(0).reshape(residual.shape)
        return found

    @staticmethod
    def _features(residual: NDArray) -> NDArray:
        return np.stack([np.roll(residual, shift, axis=(0, 1, 2)).ravel() for shift in NEAR], axis=-1).astype(np.float32)


def judged(
    calibration: Calibration, method: str, apart: list[Person], patients: list[Person], one_false: float, voxel_ml: float
) -> dict[str, Any]:
    """How well a method finds lesions, and what it finds in healthy people who took no part in calibrating.

    Args:
        calibration: by `method`'s residuals of other healthy people.
        method: whose residuals are judged.
        apart: healthy people, scanned (or disturbed) as the patients are.
        patients: gain score_METHOD.
        one_false: |z| of clusters, see `one_false_cluster`.
        voxel_ml: of the Grid.
    """
    brain = calibration.brain
    scores = [np.abs(calibration.score(person[method])) for person in patients]
    values = np.concatenate([score[brain] for score in scores])
    truth = np.concatenate([person["lesion"][brain] for person in patients])
    order = np.argsort(-values)
    hits = np.cumsum(truth[order])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / max(truth.sum(), 1)
    dice = 2 * hits / (np.arange(1, len(hits) + 1) + truth.sum())
    fixed = values > np.interp(np.log(FORMING), np.log(calibration.chances), calibration.sizes)
    touched: list[tuple[float, bool]] = []  # volume in ml of each lesion, and whether it was found
    for person, score in zip(patients, scores):
        person[f"score_{method}"] = score
        labels, count = ndimage.label(person["lesion"] & brain)
        seen = set(np.unique(labels[score > one_false]))
        touched += [(float((labels == k).sum()) * voxel_ml, k in seen) for k in range(1, count + 1)]
    touched.sort()
    thirds = [part for part in np.array_split(np.array(touched), 3) if len(part)]
    healthy = [calibration.score(person[method]) for person in apart]
    p_apart = np.concatenate([calibration.p_values(score)[brain] for score in healthy])
    return {
        "auprc": round(float((precision * np.diff(recall, prepend=0)).sum()), 4),
        "prevalence": round(float(truth.mean()), 5),
        "dice_fixed": round(float(2 * (fixed & truth).sum() / max(fixed.sum() + truth.sum(), 1)), 4),
        "dice_best": round(float(dice.max()), 4),
        "sensitivity": round(float(np.mean([found for _, found in touched])), 3),
        "by_size": {f"{part[0, 0]:.2f}-{part[-1, 0]:.2f}": round(float(part[:, 1].mean()), 2) for part in thirds},
        "lesions": len(touched),
        "right_at_005": round(float((p_apart <= 0.05).mean()), 4),
        "false_clusters": round(float(np.mean([ndimage.label(np.abs(score) > one_false)[1] for score in healthy])), 2),
        "healthy_with_p_005": round(float(np.mean([_any_unusual(calibration, score) for score in healthy])), 3),
    }


def one_false_cluster(calibration: Calibration, residuals: list[NDArray]) -> float:
    """The least |z| down to which healthy people have one cluster on average at most.

    From above: far below it, everything grows together to a single cluster again.
    """
    scores = [np.abs(calibration.score(each)) for each in residuals]
    least = max(float(score.max()) for score in scores)
    for cut in np.arange(least, 0, -0.1):
        if np.mean([ndimage.label(score > cut)[1] for score in scores]) > 1:
            break
        least = float(cut)
    return least


def _any_unusual(calibration: Calibration, score: NDArray) -> bool:
    return any(row["p"] <= 0.05 for row in calibration.clusters(score)[1])
