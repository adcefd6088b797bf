"""Rendered whole heads in IXI's layout, to try docs/tutorial-real-data.md on: scans, spreadsheet, FreeSurfer's table.

    python benchmarks/ixi_stand_in.py HEADS DIR [--num 12] [--seed 0]

HEADS is BIDS: whole heads at 1 mm with ages and sexes, and for each a label map (FreeSurfer's labels, the same voxels) below
derivatives/. In DIR are then

    ixi/T1/IXI002-Guys-0828-T1.nii.gz   turned by up to 20 degrees, shifted by up to 25 mm, sampled along oblique axes, in the
                                        intensities of one of three sites
    ixi/IXI.xlsx                        ages and sexes, of one person twice and of another none, as in IXI's own
    ixi/aseg.tsv                        volumes in mm3, counted on the label maps, as `asegstats2table` writes them
    ixi/brain/                          masks, moved as the heads are
    bin/mri_synthstrip                  a program that answers with them: put DIR/bin first on PATH
"""

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from whole_heads import DEGREES, NO_BRAIN, OBLIQUE_DEGREES, SHIFT_MM, labels_of, moved, sampled

from ldm3d.data.nifti import read_volume

SITES = ("Guys", "HH", "IOP")
# Of each site: power, largest value, and how much brighter the front is than the back
INTENSITIES = {"Guys": (1.0, 900.0, 0.1), "HH": (0.8, 2500.0, 0.0), "IOP": (1.2, 300.0, 0.4)}
STRUCTURES = {
    "Left-Lateral-Ventricle": (4,),
    "Left-Inf-Lat-Vent": (5,),
    "3rd-Ventricle": (14,),
    "4th-Ventricle": (15,),
    "Left-Hippocampus": (17,),
    "Right-Lateral-Ventricle": (43,),
    "Right-Inf-Lat-Vent": (44,),
    "Right-Hippocampus": (53,),
}
FLUID = (4, 5, 14, 15, 24, 43, 44)
PROGRAM = """#!{python}
import shutil, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
scan = Path(given["-i"])
shutil.copy(scan.parents[1] / "brain" / scan.name, given["-m"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    people = pd.read_csv(asked.heads / "participants.tsv", sep="\t").set_index("participant_id")
    folder = asked.out / "ixi"
    volumes, spreadsheet = [], []
    for i, path in enumerate(sorted(asked.heads.glob("sub-*/**/*_T1w.nii.gz"))[: asked.num]):
        number, site = 2 + 11 * i, SITES[i % len(SITES)]
        name = f"IXI{number:03d}-{site}-{828 + i:04d}-T1.nii.gz"
        person = people.loc[path.name.split("_")[0]]
        labels_path = labels_of(path, asked.heads)
        write_head(folder, name, path, labels_path, site, np.random.default_rng([asked.seed, i]))
        volumes.append({"Measure:volume": f"IXI{number:03d}", **volumes_of(labels_path)})
        spreadsheet.append({"IXI_ID": number, "SEX_ID (1=m, 2=f)": 1 + (person["sex"] == "F"), "AGE": person["age"]})
    pd.DataFrame(volumes).to_csv(folder / "aseg.tsv", sep="\t", index=False)
    spreadsheet[-1]["AGE"] = None
    pd.DataFrame([spreadsheet[0], *spreadsheet]).to_excel(folder / "IXI.xlsx", index=False)
    program = asked.out / "bin/mri_synthstrip"
    program.parent.mkdir(exist_ok=True)
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    print(f"{len(volumes)} heads written to {folder}; put {program.parent.resolve()} first on PATH")


def write_head(folder: Path, name: str, path: Path, labels_path: Path, site: str, rng: np.random.Generator) -> None:
    """The moved head and its mask."""
    (head, affine), (labels, labels_affine) = read_volume(path), read_volume(labels_path)
    brain = (~np.isin(np.rint(labels), NO_BRAIN)).astype(np.float32)
    middle = (np.argwhere(brain[0]) @ labels_affine[:3, :3].T + labels_affine[:3, 3]).mean(axis=0)
    motion, oblique = moved(rng, DEGREES, SHIFT_MM, middle), moved(rng, OBLIQUE_DEGREES, 0, middle)
    for kind, (volume, place) in {
        "T1": sampled(of_site(head, site), affine, motion, oblique),
        "brain": sampled(brain, labels_affine, motion, oblique, "nearest"),
    }.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume[0].astype(np.int16 if kind == "T1" else np.uint8), place), folder / kind / name)


def of_site(head: NDArray, site: str) -> NDArray:
    """A head (1, X, Y, Z) as this site's scanner would show it."""
    power, largest, slope = INTENSITIES[site]
    share = (head / np.quantile(head, 0.999)).clip(0, 1) ** power
    return largest * share * (1 + slope * np.linspace(-0.5, 0.5, head.shape[2])[:, None])


def volumes_of(labels_path: Path) -> dict[str, float]:
    """Volumes in mm3 under FreeSurfer's names."""
    labels, affine = read_volume(labels_path)
    values, counts = np.unique(np.rint(labels).astype(int), return_counts=True)
    mm3 = dict(zip(values.tolist(), (counts * abs(np.linalg.det(affine[:3, :3]))).tolist()))
    sums = {name: sum(mm3.get(label, 0.0) for label in members) for name, members in STRUCTURES.items()}
    brain = sum(size for label, size in mm3.items() if label not in (*NO_BRAIN, *FLUID))
    return {**sums, "BrainSegVolNotVent": brain}


if __name__ == "__main__":
    main()
