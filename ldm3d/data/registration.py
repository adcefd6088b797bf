"""Bring a scan into the space of a template before it is placed: by its affine alone, so that it is interpolated once.

SimpleITK (Lowekamp et al. 2013) finds the transform that makes scan and template correlate best. With "rigid" a common scale
is found too, but left out of the result: brains keep their volumes, and a small brain is still turned right.

MNI152 is a brain without its skull. A whole head is compared with it within the brain alone: otherwise scalp and skull decide
(six defaced heads then lay 4 to 12 mm off, and 1 to 2 mm so, both against the extracted brains).
"""

import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.config.data import MNI152, RegistrationConfig
from ldm3d.data.itk import TO_LPS, as_image, at_working_size, simple_itk
from ldm3d.data.nifti import read_volume
from ldm3d.data.placing import to_grid
from ldm3d.errors import InputError
from ldm3d.geometry import Grid

VERSION = 1  # raise it when the transforms that this file finds change
POOR = 0.6  # correlation below which a scan is named: rendered and real brains on MNI152 have 0.92 to 0.97
_STARTS_DEGREES = (0.0, 30.0, -30.0)  # of pitch, by which heads differ most
_STARTS_UP_MM = (0.0, 40.0)  # of whole heads, whose middle lies below that of their brain
_EDGE = 0.02  # of the range, above which a voxel of the template belongs to its brain
_BEYOND_BRAIN = 2  # voxels of the working size around the template's brain that count, too: where it ends tells much


@dataclass(frozen=True)
class Registered:
    """How a scan lies in the template's space.

    Attributes:
        matrix: (4, 4), the scan's world (RAS+ mm) to the template's.
        correlation: with the template, in the overlap, -1 to 1.
    """

    matrix: NDArray
    correlation: float

    def in_scan_space(self, info: dict[str, Any]) -> dict[str, Any]:
        """The info of `to_grid` for a scan that was placed by `matrix @ affine`, in the scan's own world.

        What uses the info (the way back, label maps) then needs to know nothing of the registration.
        """
        back = np.linalg.inv(self.matrix)
        own = {name: (back @ np.array(info[name])).tolist() for name in ("source_affine", "grid_affine")}
        found = {"matrix": self.matrix.round(6).tolist(), "correlation": round(self.correlation, 3)}
        return {**info, **own, "registration": found}


def settings_of(config: RegistrationConfig, stripped: bool) -> dict[str, Any]:
    """What a registered volume depends on beside the scan."""
    voxels, affine = _template(config.to)
    digest = hashlib.sha256(voxels.tobytes() + affine.tobytes()).hexdigest()[:16]
    within = {"within": "brain"} if _is_head_on_brain(config, stripped) else {}
    return {"kind": config.kind, "template": digest, "version": VERSION, **within}


def _is_head_on_brain(config: RegistrationConfig, stripped: bool) -> bool:
    """Whether the scan has a skull and the template has none."""
    return config.to == MNI152 and not stripped


def register(volume: NDArray, affine: NDArray, config: RegistrationConfig, stripped: bool) -> Registered:
    """Find how a scan lies in the space of the template.

    Args:
        volume: (1, X, Y, Z), any orientation.
        affine: (4, 4) of `volume`.
        config: which template, and which kind of transform.
        stripped: whether the scan is skull-stripped; if not, MNI152, which is, is compared within its brain alone.

    Raises:
        InputError: SimpleITK is not installed, there is no such template, or no transform was found.
    """
    itk = simple_itk("data.registration")
    template, to = at_working_size(*_template(config.to))
    fixed, moving = as_image(itk, template, to), as_image(itk, *at_working_size(volume, affine))
    within, ups = None, _STARTS_UP_MM[:1]
    if _is_head_on_brain(config, stripped):
        within, ups = as_image(itk, ndimage.binary_dilation(template > _EDGE, iterations=_BEYOND_BRAIN), to), _STARTS_UP_MM
    images = itk, fixed, moving, within
    kind = itk.Similarity3DTransform() if config.kind == "rigid" else itk.AffineTransform(3)
    centred = itk.CenteredTransformInitializer(
        fixed, moving, itk.Similarity3DTransform(), itk.CenteredTransformInitializerFilter.MOMENTS
    )
    try:
        coarse = [
            _optimised(*images, start=_moved(itk, centred, degrees, up_mm), steps=40, shrink=(2,), smooth_mm=(8.0,))
            for degrees in _STARTS_DEGREES
            for up_mm in ups
        ]
        _, start = min(coarse, key=lambda found: found[0])
        if config.kind == "affine":
            kind.SetCenter(start.GetCenter())
            kind.SetMatrix(start.GetMatrix())
            kind.SetTranslation(start.GetTranslation())
            start = kind
        metric, found = _optimised(*images, start=start, steps=100, shrink=(2, 1), smooth_mm=(6.0, 2.0))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"it could not be registered to {config.to} ({reason}); look at the scan") from None
    return Registered(_as_matrix(found, config.kind), -float(metric))


def placed(
    scan: NDArray,
    affine: NDArray,
    grid: Grid,
    percentiles: tuple[float, float],
    wanted: RegistrationConfig | None,
    stripped: bool,
) -> tuple[NDArray, dict[str, Any]]:
    """See `ldm3d.data.placing.to_grid`; of a scan that is registered first, if `wanted` is not None.

    A warning names a scan that correlates with the template by less than POOR.
    """
    if wanted is None:
        return to_grid(scan, affine, grid, percentiles)
    found = register(scan, affine, wanted, stripped)
    if found.correlation < POOR:
        warnings.warn(
            f"correlates with the template by {found.correlation:.2f} only, so its registration is doubtful: look at it",
            stacklevel=1,
        )
    volume, info = to_grid(scan, found.matrix @ affine, grid, percentiles)
    return volume, found.in_scan_space(info)


def _optimised(
    *images: Any, start: Any, steps: int, shrink: tuple[int, ...], smooth_mm: tuple[float, ...]
) -> tuple[float, Any]:
    """(metric, transform) from a start: correlation by gradient descent in at most `steps` a level, coarse to fine.

    Args:
        images: SimpleITK itself, the template, the scan, and the mask of the template within which they are compared, or None.
    """
    itk, fixed, moving, within = images
    method = itk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    if within is not None:
        method.SetMetricFixedMask(within)
    method.SetInterpolator(itk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-4, numberOfIterations=steps, relaxationFactor=0.6, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel(smooth_mm)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(type(start)(start), inPlace=True)
    found = method.Execute(fixed, moving)
    found = type(start)(found.GetNthTransform(0) if isinstance(found, itk.CompositeTransform) else found)
    return method.GetMetricValue(), found


def _moved(itk: Any, centred: Any, degrees: float, up_mm: float) -> Any:
    start = itk.Similarity3DTransform(centred)
    start.SetRotation((1.0, 0.0, 0.0), float(np.deg2rad(degrees)))
    x, y, z = start.GetTranslation()
    start.SetTranslation((x, y, z + up_mm))
    return start


def _as_matrix(transform: Any, kind: str) -> NDArray:
    """Scan's world -> template's world in RAS, from ITK's transform, which maps the template's points to the scan's in LPS:
    y = A (x - c) + c + t."""
    matrix, centre, shift = (
        np.array(part) for part in (transform.GetMatrix(), transform.GetCenter(), transform.GetTranslation())
    )
    matrix = matrix.reshape(3, 3)
    if kind == "rigid":
        matrix = matrix / np.cbrt(np.linalg.det(matrix))
    forth = np.eye(4)
    forth[:3, :3], forth[:3, 3] = matrix, centre + shift - matrix @ centre
    return TO_LPS @ np.linalg.inv(forth) @ TO_LPS


@functools.lru_cache(maxsize=2)
def _template(name: str) -> tuple[NDArray, NDArray]:
    """The template (1, X, Y, Z) and its affine: MNI152's brain from nilearn (Fonov et al. 2011), or the user's file."""
    if name != MNI152:
        return read_volume(Path(name))
    try:
        from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
    except ImportError:
        raise InputError(
            f"data.registration.to: {MNI152} needs nilearn; install it with: pip install 'ldm3d[prepare]', or give a file"
        ) from None
    image = load_mni152_template(resolution=2)
    voxels = np.asarray(image.dataobj, np.float32) * (np.asarray(load_mni152_brain_mask(resolution=2).dataobj) > 0)
    return voxels[None], np.array(image.affine, np.float64)
