"""How far from the truth registration puts whole heads that lie off-axis and shifted, in millimetres.

    python benchmarks/whole_heads.py DATASET [--heads 6] [--repeats 2] [--kind rigid] [--seed 0] [--out TABLE.tsv]

DATASET is BIDS: whole heads, and for each a label map of the same voxels below derivatives/ (`*_dseg.nii.gz`, 0 outside of
the head). Labels of FreeSurfer say which voxels are brain. Each head is turned by up to 20 degrees about every axis and
shifted by up to 25 mm; its voxels are sampled anew, along axes that are turned by up to 10 degrees more, as an oblique scan's
are; the brain is cut out by the label map, which is moved alike. It is then registered twice:

    own   to the same head as it lay: the truth is known exactly
    mni   to MNI152: the truth is not known, but two poses of one head must end at the same place

Errors are distances between where a voxel of the brain comes to lie and where it should, over all of them.
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from ldm3d.config.data import RegistrationConfig
from ldm3d.data.masks import apply_mask
from ldm3d.data.nifti import read_volume
from ldm3d.data.registration import _template, register
from ldm3d.geometry import resample

DEGREES, SHIFT_MM, OBLIQUE_DEGREES = 20.0, 25.0, 10.0
# FreeSurfer's labels that are no brain: outside of it, and the head around the brain. Its fluid (24) stays, as what extracts
# brains leaves it in the sulci, and as the rendered brains of the shipped models have it
NO_BRAIN = (0, *range(165, 200), *range(258, 264), *range(500, 540))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2, help="poses of each head")
    parser.add_argument("--kind", choices=["rigid", "affine"], default="rigid")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for i, path in enumerate(sorted(arguments.dataset.glob("sub-*/**/*_T1w.nii.gz"))[: arguments.heads]):
        rng = np.random.default_rng([arguments.seed, i])
        rows += of_one(path, labels_of(path, arguments.dataset), arguments, rng)
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    if arguments.out:
        table.to_csv(arguments.out, sep="\t", index=False)
    print(table.groupby("to")[["mean_mm", "p95_mm", "degrees", "seconds"]].agg(["median", "max"]).round(2).to_string())


def labels_of(path: Path, dataset: Path) -> Path:
    subject = re.search(r"sub-[A-Za-z0-9]+", path.name)[0]
    found = sorted((dataset / "derivatives").rglob(f"{subject}_*dseg.nii.gz"))
    if not found:
        raise SystemExit(f"no label map *_dseg.nii.gz of {subject} below {dataset / 'derivatives'}")
    return found[0]


def of_one(path: Path, labels_path: Path, arguments: argparse.Namespace, rng: np.random.Generator) -> list[dict]:
    """A row for each registration of one head."""
    (head, affine), (labels, labels_affine) = read_volume(path), read_volume(labels_path)
    brain = ~np.isin(np.rint(labels), NO_BRAIN)
    inside = np.argwhere(brain[0])[::97] @ labels_affine[:3, :3].T + labels_affine[:3, 3]  # mm, (N, 3)
    own, _ = apply_mask(head, affine, brain.astype(np.float32), labels_affine)
    rows, to_mni = [], []
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/own.nii.gz"
        nib.save(nib.Nifti1Image(own[0], affine), target)
        for to in ("own", "mni"):
            config = RegistrationConfig(to=target if to == "own" else "mni152", kind=arguments.kind)
            for _ in range(arguments.repeats):
                motion = moved(rng, DEGREES, SHIFT_MM, inside.mean(axis=0))
                oblique = moved(rng, OBLIQUE_DEGREES, 0, inside.mean(axis=0))
                scan, place = sampled(head, affine, motion, oblique)
                mask, mask_place = sampled(brain.astype(np.float32), labels_affine, motion, oblique, "nearest")
                stripped, _ = apply_mask(scan, place, mask, mask_place)
                start = time.perf_counter()
                found = register(stripped, place, config, stripped=True)
                seconds = time.perf_counter() - start
                whole = found.matrix @ motion  # where the head's own millimetres come to lie
                if to == "own":
                    rows.append(row(path, to, np.eye(4), whole, inside, found.correlation, seconds))
                else:
                    to_mni.append((whole, found.correlation, seconds))
        _template.cache_clear()
    first = to_mni[0][0]
    return rows + [row(path, "mni", first, whole, inside, *rest) for whole, *rest in to_mni[1:]]


def moved(rng: np.random.Generator, degrees: float, shift_mm: float, centre: NDArray) -> NDArray:
    """A random rigid motion about a centre, (4, 4), in mm."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-degrees, degrees, 3), degrees=True).as_matrix()
    motion[:3, 3] = centre - motion[:3, :3] @ centre + rng.uniform(-shift_mm, shift_mm, 3)
    return motion


def sampled(
    volume: NDArray, affine: NDArray, motion: NDArray, oblique: NDArray, order: str = "linear"
) -> tuple[NDArray, NDArray]:
    """The moved volume on voxels along oblique axes, and their affine."""
    place = motion @ oblique @ affine
    return resample(volume, motion @ affine, place, volume.shape[1:], order), place


def row(
    path: Path, to: str, truth: NDArray, whole: NDArray, inside: NDArray, correlation: float, seconds: float
) -> dict[str, object]:
    """Distances between where points come to lie and where they should; the angle between both."""
    apart = np.linalg.norm(inside @ (whole - truth)[:3, :3].T + (whole - truth)[:3, 3], axis=1)
    turn = np.linalg.inv(truth[:3, :3]) @ whole[:3, :3]
    turn /= np.cbrt(np.linalg.det(turn))
    return {
        "head": path.name,
        "to": to,
        "mean_mm": round(float(apart.mean()), 3),
        "p95_mm": round(float(np.percentile(apart, 95)), 3),
        "degrees": round(float(np.degrees(Rotation.from_matrix(turn).magnitude())), 3),
        "correlation": round(correlation, 3),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
