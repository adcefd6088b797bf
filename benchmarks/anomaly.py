"""Finding lesions without having seen one: the healthy counterpart, against what a sceptic tries first.

    python benchmarks/anomaly.py MODEL HEALTHY LESIONS [--healthy-num 24] [--num 12] [--samples 2] [--levels 4]
        [--methods counterpart intensity mahalanobis autoencoder] [--disturb noise=0.03 bias=0.2 contrast=0.1]
        [--disturbed-num 5] [--name NAME]

HEALTHY has a path column and covariates of healthy people that the model has not seen; all thresholds come from them alone.
LESIONS has a mask column, too. Compared, each smoothed and turned into z and p alike (`ldm3d.applications.calibration`):

    counterpart   the scan minus its healthy counterpart (`ldm3d anomaly`)
    intensity     the scan, its mean over healthy people of that age and sex taken out by regression (Saase et al. 2020)
    mahalanobis   likewise, the distance of a voxel and its six neighbours from healthy people's, covariance and all; whatever
                  is nearer than most counts as 0
    autoencoder   the scan minus its reconstruction

After the scans as they are, each word of --disturb changes them on the Grid, and not the scans of the calibration:

    noise=S       white noise of this deviation, of the intensity range, in the brain
    bias=S        a smooth field of factors of this deviation
    contrast=C    lesions are brighter than what is around them by C of the intensity range; darker, if C is negative

AUPRC is over the brain voxels of all patients; dice_fixed that of p < 0.001, dice_best that of the best threshold, which only
the test set knows; sensitivity the share of lesions that touch a cluster, at the |z| that leaves one false cluster an
undisturbed healthy scan, of all and by thirds of their volume (ml: share found). The last quarter of the healthy takes no part
in calibrating, and is disturbed like the patients: right_at_005 is the share of its voxels with p <= 0.05, false_clusters how
many clusters a scan has at that |z|, healthy_with_p_005 the share of people with a cluster of corrected p <= 0.05.
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
from anomaly_judged import Mahalanobis, Person, Regression, judged, one_false_cluster
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
from ldm3d.geometry import resample, slices_through
from ldm3d.pipeline import Pipeline
from ldm3d.precision import NAMES, dtype

METHODS = ("counterpart", "intensity", "mahalanobis", "autoencoder")
DISTURBANCES = ("noise", "bias", "contrast")
AS_SCANNED = "as scanned"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(arguments.model, "cpu", dtype(arguments.precision, "cpu"))
    options = {"samples": arguments.samples, "levels": arguments.levels, "doubted": arguments.doubted}
    if "counterpart" not in arguments.methods:
        options = {}
    rows, ill = _rows(arguments.healthy, arguments.healthy_num), _rows(arguments.lesions, arguments.num)
    healthy = [_looked_at(pipe, row, options) for row in rows]
    used = len(healthy) * 3 // 4
    voxels = pipe.grid.voxel_ml
    regression = Regression(healthy[:used])
    mahalanobis = Mahalanobis([regression.residual(person) for person in healthy[:used]])

    def complete(people: list[Person]) -> list[Person]:
        for person in people:
            person["intensity"] = regression.residual(person)
            person["mahalanobis"] = mahalanobis.residual(person["intensity"])
        return people

    complete(healthy)
    volumes = np.stack([person["volume"] for person in healthy[:used]])
    calibrated = {}
    for method in arguments.methods:
        calibration = Calibration.fit(np.stack([person[method] for person in healthy[:used]]), volumes, {})
        calibrated[method] = calibration, one_false_cluster(calibration, [person[method] for person in healthy[used:]])
    results: dict[str, Any] = {}
    for word in (AS_SCANNED, *arguments.disturb):
        patients = complete([_looked_at(pipe, row, options, word) for row in ill])
        apart = healthy[used:]
        if word.startswith(("noise", "bias")):
            apart = complete([_looked_at(pipe, row, options, word) for row in rows[used:][: arguments.disturbed_num]])
        results[word] = {}
        for method, (calibration, cut) in calibrated.items():
            results[word][method] = judged(calibration, method, apart, patients, cut, voxels)
            print(word, method, json.dumps(results[word][method]), flush=True)
        if word == AS_SCANNED:
            contrasts = [_contrast(person["volume"], person["share"]) for person in patients]
            seconds = float(np.median([person["seconds"] for person in healthy + patients]))
            if arguments.picture:
                _show(patients[:3], pipe, arguments.picture)
    written = {"model": pipe.model_hash, "precision": str(pipe.dtype), "processor": processor(), "options": options}
    written |= {"healthy": used, "patients": len(ill), "contrast": round(float(np.median(contrasts)), 3)}
    written |= {"seconds_a_scan": round(seconds, 1), "disturbances": results}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(written, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", choices=NAMES, default="auto", help="of the networks, as the commands have it")
    parser.add_argument("healthy", type=Path)
    parser.add_argument("lesions", type=Path)
    parser.add_argument("--healthy-num", type=int, default=24)
    parser.add_argument("--num", type=int, default=12)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--doubted", type=float, default=0.1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--disturb", nargs="*", default=[], metavar="NAME=NUMBER", help=", ".join(DISTURBANCES))
    parser.add_argument("--disturbed-num", type=int, help="of the healthy apart who are disturbed, too; default: all")
    parser.add_argument("--name", default="anomaly-cpu")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


def _rows(table: Path, number: int) -> list[dict[str, Any]]:
    frame = pd.read_csv(table)
    return frame.iloc[np.linspace(0, len(frame) - 1, min(number, len(frame))).astype(int)].to_dict("records")


def _looked_at(pipe: Pipeline, row: dict[str, Any], options: dict[str, Any], word: str = AS_SCANNED) -> Person:
    """A person's volume and residuals on the Grid, (X, Y, Z), and the true lesions; no counterpart's without its options."""
    start, placed = time.process_time(), place(pipe, row["path"])
    share = _lesion(placed, row.get("mask"))
    if word != AS_SCANNED:
        placed = _disturbed(placed, share, word)
    given = {name: row[name] for name in ("age", "sex", "source") if name in pipe.schema.names and name in row}
    found = counterpart(pipe, placed, given, **options) if options else None
    print(row["participant_id"], word, round(time.process_time() - start, 1), flush=True)
    return {
        "age": float(row["age"]),
        "male": float(row["sex"] == "M"),
        "volume": placed.volume[0, 0].numpy(),
        "mean": found.mean[0, 0].numpy() if found else None,
        "counterpart": residual_of(found) if found else None,
        "autoencoder": (placed.volume - placed.reconstruction)[0, 0].numpy(),
        "share": share,
        "lesion": np.asarray(share >= (0.5 if (share >= 0.5).any() else 0.2)),
        "seconds": time.process_time() - start,
    }


def _disturbed(placed: PlacedScan, share: NDArray, word: str) -> PlacedScan:
    """The same scan as if it had been scanned otherwise, or had other lesions."""
    name, _, number = word.partition("=")
    random, volume, size = np.random.default_rng(0), placed.volume[0, 0].numpy(), float(number)
    if name == "noise":
        changed = volume + size * random.standard_normal(volume.shape) * (volume > 0.02)
    elif name == "bias":
        field = ndimage.gaussian_filter(random.standard_normal(volume.shape), 8)
        changed = volume * (1 + size * field / field.std())
    elif name == "contrast":
        changed = volume + share * (size - _contrast(volume, share))
    else:
        raise SystemExit(f"--disturb {word}: one of {', '.join(DISTURBANCES)}, with a number")
    on_grid = torch.from_numpy(changed.clip(0, 1).astype(np.float32))[None, None]
    autoencoder = placed.pipe.autoencoder
    with torch.no_grad():
        z = autoencoder.normalise(autoencoder.sample(autoencoder.encode(on_grid.to(placed.pipe.dtype)).float())).float()
    return replace(placed, volume=on_grid, z=z)


def _contrast(volume: NDArray, share: NDArray) -> float:
    """By how much lesions are brighter than what is around them: least squares of volume - around = contrast * share.

    What is around is the upper quartile of the voxels within two of each lesion: lesions lie in white matter, the brightest.
    """
    labels, count = ndimage.label(share > 0.05)
    above, squares = 0.0, 1e-9
    for k in range(1, count + 1):
        inside = labels == k
        around = ndimage.binary_dilation(inside, iterations=2) & (share <= 0.05)
        above += float((share[inside] * (volume[inside] - np.quantile(volume[around], 0.75))).sum())
        squares += float((share[inside] ** 2).sum())
    return above / squares


def _lesion(placed: PlacedScan, path: str | None) -> NDArray:
    """Share of each voxel of the Grid that is lesion."""
    shape = placed.pipe.grid.shape
    if not isinstance(path, str):
        return np.zeros(shape, np.float32)
    marked, affine = read_volume(Path(path))
    return resample((marked > 0).astype(np.float32), affine, np.array(placed.info["grid_affine"]), shape)[0]


def _show(patients: list[Person], pipe: Pipeline, path: Path) -> None:
    """Slices through the largest lesion of each."""
    shown, titles, where = [], [], []
    for person in patients:
        labels, _ = ndimage.label(person["lesion"])
        where += [slices_through(labels == np.bincount(labels.ravel())[1:].argmax() + 1)] * 4
        shown += [person["volume"][None], person["mean"][None], np.abs(person["score_counterpart"])[None] / 8]
        shown.append(person["lesion"][None].astype(np.float32))
        titles += ["scan", "healthy counterpart", "|z|, white: 8", "lesions"]
    heading = "scans with lesions, and healthy counterparts: derived, synthetic in part"
    figures.save(figures.mosaic(shown, titles, pipe.grid.spacing_mm, 4, heading, where), path)


if __name__ == "__main__":
    main()
