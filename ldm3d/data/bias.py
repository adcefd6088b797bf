"""Correct the bias field of a scan by N4 (Tustison et al. 2010), as SimpleITK computes it. No files.

The field is estimated on a coarse copy of the scan, and kept there: as it is smooth, the scan is divided by its interpolation,
and multiplied by the same one on the way back.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.data.itk import as_image, at_working_size, simple_itk
from ldm3d.errors import InputError
from ldm3d.geometry import resample

VERSION = 1  # raise it when the fields that this file finds change
_FOREGROUND = 0.1  # of the robust range of intensities, as where scans are placed
_ITERATIONS = (50, 50, 50, 50)  # at each resolution of the B-spline, the default of N4
_STANDARDISED = 0.1  # share of the range below zero from which intensities cannot be those that a scanner measured


@dataclass(frozen=True)
class BiasField:
    """The logarithm of a field by which a scan's intensities were multiplied.

    Attributes:
        log: float16 (X, Y, Z), 0 on average in the foreground.
        affine: (4, 4) of `log`, to the world of the scan (RAS+ mm).
    """

    log: NDArray
    affine: NDArray

    def on(self, affine: NDArray, shape: tuple[int, ...]) -> NDArray:
        """The field as factors (1, X, Y, Z) on the voxels of a scan."""
        return np.exp(resample(self.log[None].astype(np.float32), self.affine, affine, shape))

    def told(self) -> dict[str, Any]:
        """What the sidecar of a prepared scan says of it."""
        low, high = np.exp(np.percentile(self.log.astype(np.float32), (1, 99)))
        version = simple_itk("data.bias_correction").Version_VersionString()
        return {"method": "N4", "simpleitk": version, "field": [round(float(low), 3), round(float(high), 3)]}


def settings_of() -> dict[str, Any]:
    """What a corrected volume depends on beside the scan."""
    simple_itk("data.bias_correction")
    return {"method": "N4", "version": VERSION}


def estimate_field(volume: NDArray, affine: NDArray) -> BiasField:
    """The bias field of a scan.

    Args:
        volume: (1, X, Y, Z), any orientation; a whole head or a brain around which all is 0.
        affine: (4, 4) of `volume`.

    Raises:
        InputError: SimpleITK is not installed, intensities are not a scanner's, or no field was found.
    """
    itk = simple_itk("data.bias_correction")
    low, high = np.percentile(volume[:, ::2, ::2, ::2], (0.5, 98))
    if low < -_STANDARDISED * abs(high):
        raise InputError(
            f"its intensities reach from {low:.3g} to {high:.3g}, so they were standardised, and a bias field, which "
            "multiplies, cannot be found in them; give raw scans, or drop data.bias_correction"
        )
    coarse, to = at_working_size(volume, affine)
    inside = coarse > _FOREGROUND
    n4 = itk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(_ITERATIONS)
    image = as_image(itk, coarse, to)
    try:
        n4.Execute(image, as_image(itk, inside, to))
        log = itk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image)).T
    except RuntimeError as error:
        raise InputError(f"N4 found no bias field in it ({str(error).strip().splitlines()[-1]}); look at the scan") from None
    if not np.isfinite(log).all():
        raise InputError("N4 found no finite bias field in it; look at the scan")
    return BiasField((log - log[inside].mean()).astype(np.float16), to)
