"""Do quantities of whole heads, off-axis and shifted, follow the truth as those of the brains as they lie?

    python benchmarks/moved_heads.py DATASET [--num 32] [--recipe brains-3mm] [--measure NAME] [--folder DIR] [--out FILE.tsv]

DATASET is BIDS with whole heads, label maps of the same voxels below derivatives/ (`*_dseg.nii.gz`) and participants.tsv
with ventricular_volume_ml and brain_volume_ml, counted on the labels. Each head is prepared twice by a config with the
recipe, which registers rigidly to MNI152:

    aligned   the brain alone, as it lies
    moved     the whole head, turned by up to 20 degrees about every axis, shifted by up to 25 mm and sampled anew along
              oblique axes; its brain is extracted by a mask, which is moved alike (`data.mask`)

No network is trained: both are measured on the prepared volumes, which is all that a training gets. The table that is printed
has, for each quantity, r and slope with the truth in both, r between both, and the median of their difference. Before it
stands how far apart both preparations of a head put its brain, in mm on average over it: the motion is known exactly, so
registration should bring both to the same place.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from whole_heads import DEGREES, NO_BRAIN, OBLIQUE_DEGREES, SHIFT_MM, labels_of, moved, sampled

from ldm3d.cli.options import VOLUMETRY
from ldm3d.config.read import load_config
from ldm3d.data.masks import apply_mask
from ldm3d.data.nifti import read_volume
from ldm3d.data.preparing import load_info, prepare, read_scan_table
from ldm3d.rulers.table import measure_scans

PREPARED = "aligned", "moved"
QUANTITIES = "ventricular_volume_ml", "brain_volume_ml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--recipe", default="brains-3mm")
    parser.add_argument("--measure", default=VOLUMETRY)
    parser.add_argument("--folder", type=Path, help="keep both datasets and what is prepared of them here")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    paths = sorted(arguments.dataset.glob("sub-*/**/*_T1w.nii.gz"))[: arguments.num]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for i, path in enumerate(paths):
            write_pair(folder, path, labels_of(path, arguments.dataset), np.random.default_rng([0, i]))
        found = {name: measured(folder, name, arguments) for name in PREPARED}
        apart = pd.Series({path.name.split("_")[0]: value for path, value in apart_mm(folder, paths, arguments.dataset)})
    truth = pd.read_csv(arguments.dataset / "participants.tsv", sep="\t").set_index("participant_id")
    table = pd.concat({"truth": truth[list(QUANTITIES)], **found}, axis=1, join="inner")
    table["apart", "mm"] = apart
    if arguments.out:
        table.to_csv(arguments.out, sep="\t")
    print(f"{len(table)} heads, {apart.median():.2f} mm apart (median), {apart.max():.2f} at most")
    print(compared(table).round(3).to_string())


def write_pair(folder: Path, path: Path, labels_path: Path, rng: np.random.Generator) -> None:
    """One head in both datasets, and the mask in the derivative of the second."""
    head, affine = read_volume(path)
    brain, labels_affine, points = brain_of(labels_path)
    motion, oblique = motions(rng, points)
    subject = path.name.split("_")[0]
    write(folder / "aligned", subject, "T1w", apply_mask(head, affine, brain, labels_affine)[0], affine)
    write(folder / "moved", subject, "T1w", *sampled(head, affine, motion, oblique))
    mask, place = sampled(brain, labels_affine, motion, oblique, "nearest")
    write(folder / "masks", subject, "desc-brain_mask", mask, place)


def brain_of(labels_path: Path) -> tuple[NDArray, NDArray, NDArray]:
    """Which voxels are brain, (1, X, Y, Z); their affine; and where they lie, in mm, (N, 3)."""
    labels, affine = read_volume(labels_path)
    brain = (~np.isin(np.rint(labels), NO_BRAIN)).astype(np.float32)
    return brain, affine, np.argwhere(brain[0]) @ affine[:3, :3].T + affine[:3, 3]


def motions(rng: np.random.Generator, points: NDArray) -> tuple[NDArray, NDArray]:
    """The motion of a head, and the turn of the axes along which it is sampled."""
    middle = points.mean(axis=0)
    return moved(rng, DEGREES, SHIFT_MM, middle), moved(rng, OBLIQUE_DEGREES, 0, middle)


def apart_mm(folder: Path, paths: Sequence[Path], dataset: Path) -> Iterator[tuple[Path, float]]:
    """Mean distance between where both preparations of a head put a point of its brain."""
    placed = {}
    for name in PREPARED:
        config = load_config(folder / f"{name}.yaml")
        scans = read_scan_table(config)
        placed[name] = {
            row.subject: np.array(load_info(config, row.key)["registration"]["matrix"]) for row in scans.itertuples()
        }
    for i, path in enumerate(paths):
        subject = path.name.split("_")[0].removeprefix("sub-")
        if all(subject in each for each in placed.values()):
            *_, points = brain_of(labels_of(path, dataset))
            motion, _ = motions(np.random.default_rng([0, i]), points)
            off = placed["moved"][subject] @ motion - placed["aligned"][subject]
            yield path, float(np.linalg.norm(points @ off[:3, :3].T + off[:3, 3], axis=1).mean())


def write(dataset: Path, subject: str, ending: str, volume: NDArray, affine: NDArray) -> None:
    path = dataset / subject / "anat" / f"{subject}_{ending}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume[0], affine), path)
    description = {"Name": dataset.name, "BIDSVersion": "1.10.0"}
    (dataset / "dataset_description.json").write_text(json.dumps(description))


def measured(folder: Path, name: str, arguments: argparse.Namespace) -> pd.DataFrame:
    """Quantities of the prepared scans, by subject."""
    data = {"bids": str(folder / name), "skull_stripped": True, "splits": {"validation": 0, "test": 0}}
    if name == "moved":
        data["mask"] = {"desc": "brain", "suffix": "mask", "root": str(folder / "masks")}
    path = folder / f"{name}.yaml"
    settings = {"name": name, "output": str(folder / f"run-{name}"), "recipe": arguments.recipe, "data": data}
    path.write_text(yaml.safe_dump(settings | {"covariates": []}))
    config = load_config(path)
    prepare(config, workers=1)
    table = measure_scans(config, arguments.measure)
    return table.set_index(config.data.subject_column)[list(QUANTITIES)]


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """A row a quantity."""
    rows = {}
    for quantity in QUANTITIES:
        truth, aligned, other = (table[each, quantity] for each in ("truth", "aligned", "moved"))
        rows[quantity] = {
            "r aligned": np.corrcoef(truth, aligned)[0, 1],
            "r moved": np.corrcoef(truth, other)[0, 1],
            "slope aligned": np.polyfit(truth, aligned, 1)[0],
            "slope moved": np.polyfit(truth, other, 1)[0],
            "r between": np.corrcoef(aligned, other)[0, 1],
            "difference, ml": (other - aligned).abs().median(),
        }
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    main()
