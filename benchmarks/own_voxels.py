"""What a model's autoencoder makes of scans that it has never seen, brought back to their own voxels.

    python benchmarks/own_voxels.py MODEL SCAN [SCAN ...] [--as-it-lies] [--out FOLDER]

SCAN is a file, without skull if the model's scans had none, or `mni152` for the template that nilearn packs. Each is brought
to the model's Grid as the scans of its training were, encoded, decoded and resampled onto its own voxels, without any of its
own detail (`PlacedScan.back(keep_residual=False)`). `--as-it-lies`: not registered, the scans are in the model's space.

    psnr_db    on the Grid, where the scan is not background
    r          of voxels of the scan's foreground, scan and what came back
    shift_mm   distance between the centres of mass of both, in the scan's world
    placed_mm  the same between the scan and the volume on the Grid, in the scan's world: placing alone

`--out` gets a picture of each, scan above, what came back below: of real people, so it stays with the data.
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d import Pipeline, figures
from ldm3d.applications.placed import place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scans", nargs="+")
    parser.add_argument("--as-it-lies", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pipe = Pipeline.from_pretrained(arguments.model, "cpu")
    print("scan\tpsnr_db\tr\tshift_mm\tplaced_mm", flush=True)
    for name in arguments.scans:
        placed = place(pipe, template() if name == "mni152" else name, False if arguments.as_it_lies else None, stripped=True)
        back = placed.back(placed.reconstruction, keep_residual=False)
        v, made = placed.volume.cpu().numpy()[0, 0], placed.reconstruction.float().cpu().numpy()[0, 0]
        inside, own = v > 0.05, placed.scan[0] > 0.05 * np.quantile(placed.scan, 0.998)
        psnr = -10 * np.log10(np.mean((v - made)[inside] ** 2))
        r = np.corrcoef(placed.scan[0][own], back[0][own])[0, 1]
        of_scan, grid = centre(placed.scan[0], placed.affine), np.array(placed.info["grid_affine"])
        shift, moved = (np.linalg.norm(each - of_scan) for each in (centre(back[0], placed.affine), centre(v, grid)))
        print(f"{Path(name).name}\t{psnr:.1f}\t{r:.3f}\t{shift:.2f}\t{moved:.2f}", flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            rows = [
                np.concatenate([each[0][:, :, k].T[::-1] for k in thirds(each.shape[3])], axis=1)
                for each in (placed.scan, back)
            ]
            picture = np.concatenate(rows)
            figures.save(picture_of(picture), arguments.out / f"{Path(name).name.split('.')[0]}.png")


def template() -> nib.Nifti1Image:
    """MNI152 without its skull, at 2 mm, as nilearn packs it."""
    from nilearn.datasets import load_mni152_template

    return load_mni152_template(resolution=2)


def centre(volume: NDArray, affine: NDArray) -> NDArray:
    """Centre of mass of what is not background, in mm."""
    return affine[:3, :3] @ ndimage.center_of_mass(np.maximum(volume, 0)) + affine[:3, 3]


def thirds(count: int) -> tuple[int, int, int]:
    """Three slices."""
    return count * 3 // 8, count // 2, count * 5 // 8


def picture_of(values: NDArray):
    """A grey picture of a plane."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="tight")
    axes = figure.subplots()
    axes.imshow(values, cmap="gray")
    axes.axis("off")
    return figure


if __name__ == "__main__":
    main()
