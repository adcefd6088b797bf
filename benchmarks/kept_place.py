"""Does a prepared volume lie where its scan does? In millimetres, for a dataset that is registered to one space already.

    python benchmarks/kept_place.py CONFIG [--set KEY=VALUE ...] [--num 8]

Prepares CONFIG's scans, without registration. Each prepared volume is put where the Grid says that it lies, as generated
volumes are, and registered rigidly (SimpleITK, correlation, all voxels, started where it lies) to the scan as nibabel reads
it.

    moved_mm     mean distance, over voxels of the foreground, between where both place them
    largest_mm   the largest of them
    found_mm     moved_mm where the volume was shifted by 0.3 mm on purpose: what this ruler makes of it
"""

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from ldm3d.config.read import load_config
from ldm3d.data.itk import as_image
from ldm3d.data.placing import grid_of
from ldm3d.data.preparing import load_prepared, prepare

PLANTED_MM = np.array([0.2, -0.2, 0.1])  # 0.3 mm long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--num", type=int, default=8)
    arguments = parser.parse_args()
    print("scan\tmoved_mm\tlargest_mm\tfound_mm", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [*arguments.set, f"output={folder}", "data.registration=null"])
        affine = grid_of(config.data.grid).affine
        for row in prepare(config).table.head(arguments.num).itertuples():
            volume = load_prepared(config, row.key)[0].astype(np.float32)
            scan = nib.load(row.path)
            apart = distances(volume, affine, scan)
            shifted = affine.copy()
            shifted[:3, 3] += PLANTED_MM
            found = distances(volume, shifted, scan).mean()
            print(f"{Path(row.path).name}\t{apart.mean():.3f}\t{apart.max():.3f}\t{found:.3f}", flush=True)


def distances(volume: NDArray, affine: NDArray, scan: nib.Nifti1Image) -> NDArray:
    """How far registration to the scan moves each voxel of the volume's foreground, in mm."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    fixed = as_image(sitk, volume, affine)
    moving = sitk.SmoothingRecursiveGaussian(
        as_image(sitk, scan.get_fdata(dtype=np.float32), scan.affine), float(max(spacing)) / 2
    )
    points = np.argwhere(volume > 0.1)[::7] @ affine[:3, :3].T + affine[:3, 3]
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(0.2, 1e-4, 300, gradientMagnitudeTolerance=1e-9)
    method.SetOptimizerScalesFromPhysicalShift()
    motion = sitk.Euler3DTransform()
    motion.SetCenter((points.mean(axis=0) * [-1, -1, 1]).tolist())  # SimpleITK's axes go to the left and back
    method.SetInitialTransform(motion, inPlace=True)
    method.Execute(fixed, moving)
    moved = np.array([motion.TransformPoint(point.tolist()) for point in points * [-1, -1, 1]]) * [-1, -1, 1]
    return np.linalg.norm(moved - points, axis=1)


if __name__ == "__main__":
    main()
