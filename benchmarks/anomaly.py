"""Finding lesions without having seen one: the healthy counterpart, against what a sceptic tries first.

    python benchmarks/anomaly.py MODEL HEALTHY LESIONS [--healthy-num 24] [--num 12] [--samples 2] [--levels 4] [--name NAME]

HEALTHY has a path column and covariates of healthy people that the model has not seen; all thresholds come from them alone.
LESIONS has a mask column, too. Compared, each smoothed and turned into z and p alike (`ldm3d.applications.calibration`):

    counterpart   the scan minus its healthy counterpart (`ldm3d anomaly`)
    intensity     the scan, its mean over healthy people of that age and sex taken out by regression (Saase et al. 2020)
    autoencoder   the scan minus its reconstruction

AUPRC is over the brain voxels of all patients; dice_fixed that of p < 0.001, dice_best that of the best threshold, which only
the test set knows; sensitivity the share of lesions that touch a cluster, at the |z| that leaves one false cluster a healthy
scan. right_at_005 is the share of voxels with p <= 0.05 in the last quarter of the healthy, who take no part in calibrating.
"""

import argparse
import json
import time
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

METHODS = ("counterpart", "intensity", "autoencoder")


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
    parser.add_argument("--name", default="anomaly-cpu")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(arguments.model, "cpu", torch.float32)
    options = {"samples": arguments.samples, "levels": arguments.levels, "doubted": arguments.doubted}
    healthy = [_looked_at(pipe, row, options) for row in _rows(arguments.healthy, arguments.healthy_num)]
    patients = [_looked_at(pipe, row, options) for row in _rows(arguments.lesions, arguments.num)]
    used = len(healthy) * 3 // 4
    regression = _Regression(healthy[:used])
    results: dict[str, Any] = {}
    for method in METHODS:
        for person in healthy + patients:
            if method == "intensity":
                person["intensity"] = regression.residual(person)
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


def _looked_at(pipe: Pipeline, row: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A person's volume and residuals on the Grid, (X, Y, Z), and the true lesions."""
    start, placed = time.process_time(), place(pipe, row["path"])
    given = {name: row[name] for name in ("age", "sex", "source") if name in pipe.schema.names and name in row}
    found = counterpart(pipe, placed, given, **options)
    print(row["participant_id"], round(time.process_time() - start, 1), flush=True)
    return {
        "age": float(row["age"]),
        "male": float(row["sex"] == "M"),
        "volume": placed.volume[0, 0].numpy(),
        "mean": found.mean[0, 0].numpy(),
        "counterpart": residual_of(found),
        "autoencoder": (placed.volume - placed.reconstruction)[0, 0].numpy(),
        "lesion": _lesion(placed, row.get("mask")),
        "seconds": time.process_time() - start,
    }


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


def _judged(
    calibration: Calibration,
    method: str,
    apart: list[dict[str, Any]],
    healthy: list[dict[str, Any]],
    patients: list[dict[str, Any]],
) -> dict[str, float]:
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
    touched, lesions = 0, 0
    one_false = _one_false_cluster(calibration, method, apart)
    for person, score in zip(patients, scores):
        labels, count = ndimage.label(person["lesion"] & brain)
        lesions += count
        touched += len(set(np.unique(labels[score > one_false])) - {0})
    return {
        "auprc": round(float((precision * np.diff(recall, prepend=0)).sum()), 4),
        "prevalence": round(float(truth.mean()), 5),
        "dice_fixed": round(float(2 * (fixed & truth).sum() / max(fixed.sum() + truth.sum(), 1)), 4),
        "dice_best": round(float(dice.max()), 4),
        "sensitivity": round(touched / max(lesions, 1), 3),
        "lesions": lesions,
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
