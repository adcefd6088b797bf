"""Finding lesions without having seen one: the healthy counterpart, against what a sceptic tries first.

    python benchmarks/anomaly.py MODEL HEALTHY LESIONS [--healthy-num 24] [--num 12] [--samples 2] [--levels 4]
        [--methods counterpart intensity mahalanobis autoencoder] [--noise 0.03] [--bias 0.2] [--name NAME]

HEALTHY has a path column and covariates of healthy people that the model has not seen; all thresholds come from them alone.
LESIONS has a mask column, too. Compared, each smoothed and turned into z and p alike (`ldm3d.applications.calibration`):

    counterpart   the scan minus its healthy counterpart (`ldm3d anomaly`)
    intensity     the scan, its mean over healthy people of that age and sex taken out by regression (Saase et al. 2020)
    mahalanobis   likewise, the distance of a voxel and its six neighbours from healthy people's, covariance and all; whatever
                  is nearer than most counts as 0
    autoencoder   the scan minus its reconstruction

--noise and --bias disturb the patients' scans on the Grid, and not the healthy ones: white noise of this deviation, and a
smooth field of factors of this deviation.

AUPRC is over the brain voxels of all patients; dice_fixed that of p < 0.001, dice_best that of the best threshold, which only
the test set knows; sensitivity the share of lesions that touch a cluster, at the |z| that leaves one false cluster a healthy
scan, of all and by thirds of their volume (ml: share found). right_at_005 is the share of voxels with p <= 0.05 in the last
quarter of the healthy, who take no part in calibrating.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from protocol import RESULTS
from scipy import ndimage

from ldm3d import figures
from ldm3d.applications.anomaly import residual_of
from ldm3d.applications.calibration import Calibration
from ldm3d.applications.counterpart import counterpart
from ldm3d.applications.placed import PlacedScan, place
from ldm3d.data.nifti import read_volume
from ldm3d.environment import processor
from ldm3d.geometry import resample
from ldm3d.pipeline import Pipeline

METHODS = ("counterpart", "intensity", "mahalanobis", "autoencoder")
RIDGE = 0.1  # share of the mean variance that is added to each: 40 people tell little of a covariance of seven voxels
NEAR = [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("healthy", type=Path)
    parser.add_argument("lesions", type=Path)
    parser.add_argument("--healthy-num", type=int, default=24)
    parser.add_argument("--num", type=int, default=12)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--doubted", type=float, default=0.1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--bias", type=float, default=0.0)
    parser.add_argument("--name", default="anomaly-cpu")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(arguments.model, "cpu", torch.float32)
    options = {"samples": arguments.samples, "levels": arguments.levels, "doubted": arguments.doubted}
    whole = "counterpart" in arguments.methods
    healthy = [_looked_at(pipe, row, options, whole) for row in _rows(arguments.healthy, arguments.healthy_num)]
    disturbed = arguments.noise, arguments.bias
    patients = [_looked_at(pipe, row, options, whole, disturbed) for row in _rows(arguments.lesions, arguments.num)]
    used = len(healthy) * 3 // 4
    regression = _Regression(healthy[:used])
    for person in healthy + patients:
        person["intensity"] = regression.residual(person)
    mahalanobis = _Mahalanobis([person["intensity"] for person in healthy[:used]])
    results: dict[str, Any] = {}
    for method in arguments.methods:
        for person in healthy + patients:
            if method == "mahalanobis":
                person[method] = mahalanobis.residual(person["intensity"])
        volumes = np.stack([person["volume"] for person in healthy[:used]])
        calibration = Calibration.fit(np.stack([person[method] for person in healthy[:used]]), volumes, {})
        results[method] = _judged(calibration, method, healthy[used:], healthy, patients)
        print(method, json.dumps(results[method]), flush=True)
    seconds = float(np.median([person["seconds"] for person in healthy + patients]))
    written = {
        "model": pipe.model_hash,
        "processor": processor(),
        "options": options,
        "healthy": used,
        "patients": len(patients),
        "disturbed": {"noise": arguments.noise, "bias": arguments.bias},
    }
    written |= {"seconds_a_scan": round(seconds, 1), "methods": results}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(written, indent=2) + "\n")
    if arguments.picture:
        shown, titles = [], []
        for person in patients[:3]:
            shown += [person["volume"][None], person["mean"][None], np.abs(person["score_counterpart"])[None] / 8]
            shown.append(person["lesion"][None].astype(np.float32))
            titles += ["scan", "healthy counterpart", "|z| / 8", "lesions"]
        figures.save(figures.mosaic(shown, titles, pipe.grid.spacing_mm, columns=4), arguments.picture)


def _rows(table: Path, number: int) -> list[dict[str, Any]]:
    frame = pd.read_csv(table)
    return frame.iloc[np.linspace(0, len(frame) - 1, min(number, len(frame))).astype(int)].to_dict("records")


def _looked_at(
    pipe: Pipeline, row: dict[str, Any], options: dict[str, Any], whole: bool, disturbed: tuple[float, float] = (0, 0)
) -> dict[str, Any]:
    """A person's volume and residuals on the Grid, (X, Y, Z), and the true lesions; the counterpart's if it is `whole`."""
    start, placed = time.process_time(), place(pipe, row["path"])
    if any(disturbed):
        placed = _disturbed(placed, *disturbed)
    given = {name: row[name] for name in ("age", "sex", "source") if name in pipe.schema.names and name in row}
    found = counterpart(pipe, placed, given, **options) if whole else None
    print(row["participant_id"], round(time.process_time() - start, 1), flush=True)
    return {
        "age": float(row["age"]),
        "male": float(row["sex"] == "M"),
        "volume": placed.volume[0, 0].numpy(),
        "mean": found.mean[0, 0].numpy() if found else None,
        "counterpart": residual_of(found) if found else None,
        "autoencoder": (placed.volume - placed.reconstruction)[0, 0].numpy(),
        "lesion": _lesion(placed, row.get("mask")),
        "voxel_ml": pipe.grid.voxel_ml,
        "seconds": time.process_time() - start,
    }


def _disturbed(placed: PlacedScan, noise: float, bias: float) -> PlacedScan:
    """The same scan with noise, and multiplied by a smooth field, within the brain."""
    random, volume = np.random.default_rng(0), placed.volume[0, 0].numpy()
    field = ndimage.gaussian_filter(random.standard_normal(volume.shape), 8)
    changed = volume * (1 + bias * field / field.std()) + noise * random.standard_normal(volume.shape) * (volume > 0.02)
    on_grid = torch.from_numpy(changed.clip(0, 1).astype(np.float32))[None, None]
    autoencoder = placed.pipe.autoencoder
    with torch.no_grad():
        z = autoencoder.normalise(autoencoder.sample(autoencoder.encode(on_grid))).float()
    return replace(placed, volume=on_grid, z=z)


def _lesion(placed: PlacedScan, path: str | None) -> NDArray:
    shape = placed.pipe.grid.shape
    if not isinstance(path, str):
        return np.zeros(shape, bool)
    marked, affine = read_volume(Path(path))
    share = resample((marked > 0).astype(np.float32), affine, np.array(placed.info["grid_affine"]), shape)[0]
    return np.asarray(share >= 0.5) if (share >= 0.5).any() else np.asarray(share >= 0.2)


class _Regression:
    """Each voxel's expected intensity by age, its square and sex, by least squares."""

    def __init__(self, people: list[dict[str, Any]]):
        rows = np.stack([self._features(person) for person in people])
        volumes = np.stack([person["volume"].ravel() for person in people])
        self.weights = np.linalg.lstsq(rows, volumes, rcond=None)[0]

    def residual(self, person: dict[str, Any]) -> NDArray:
        expected: NDArray = (self._features(person) @ self.weights).reshape(person["volume"].shape)
        return np.asarray(person["volume"] - expected)

    @staticmethod
    def _features(person: dict[str, Any]) -> NDArray:
        age = (person["age"] - 50) / 20
        return np.array([1, age, age**2, person["male"]])


class _Mahalanobis:
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


def _judged(
    calibration: Calibration,
    method: str,
    apart: list[dict[str, Any]],
    healthy: list[dict[str, Any]],
    patients: list[dict[str, Any]],
) -> dict[str, Any]:
    brain = calibration.brain
    scores = [np.abs(calibration.score(person[method])) for person in patients]
    for person, score in zip(patients, scores):
        person[f"score_{method}"] = score
    values = np.concatenate([score[brain] for score in scores])
    truth = np.concatenate([person["lesion"][brain] for person in patients])
    order = np.argsort(-values)
    hits = np.cumsum(truth[order])
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / max(truth.sum(), 1)
    dice = 2 * hits / (np.arange(1, len(hits) + 1) + truth.sum())
    cut = float(np.interp(np.log(0.001), np.log(calibration.chances), calibration.sizes))
    fixed = values > cut
    p_apart = np.concatenate([calibration.p_values(calibration.score(person[method]))[brain] for person in apart])
    touched: list[tuple[float, bool]] = []  # volume in ml of each lesion, and whether it was found
    voxel_ml = patients[0]["voxel_ml"]
    one_false = _one_false_cluster(calibration, method, apart)
    for person, score in zip(patients, scores):
        labels, count = ndimage.label(person["lesion"] & brain)
        seen = set(np.unique(labels[score > one_false]))
        touched += [(float((labels == k).sum()) * voxel_ml, k in seen) for k in range(1, count + 1)]
    touched.sort()
    thirds = [part for part in np.array_split(np.array(touched), 3) if len(part)]
    return {
        "auprc": round(float((precision * np.diff(recall, prepend=0)).sum()), 4),
        "prevalence": round(float(truth.mean()), 5),
        "dice_fixed": round(float(2 * (fixed & truth).sum() / max(fixed.sum() + truth.sum(), 1)), 4),
        "dice_best": round(float(dice.max()), 4),
        "sensitivity": round(float(np.mean([found for _, found in touched])), 3),
        "by_size": {f"{part[0, 0]:.2f}-{part[-1, 0]:.2f}": round(float(part[:, 1].mean()), 2) for part in thirds},
        "lesions": len(touched),
        "right_at_005": round(float((p_apart <= 0.05).mean()), 4),
    }


def _one_false_cluster(calibration: Calibration, method: str, people: list[dict[str, Any]]) -> float:
    """The least |z| above which healthy people have one cluster on average."""
    scores = [np.abs(calibration.score(person[method])) for person in people]
    for cut in np.arange(2, 20, 0.1):
        if np.mean([ndimage.label(score > cut)[1] for score in scores]) <= 1:
            return float(cut)
    return 20.0


if __name__ == "__main__":
    main()
