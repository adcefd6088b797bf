"""The mean shape of volumes: a template that is sharp because every volume is deformed onto it before they are averaged.

A plain mean blurs what lies differently in everybody. Here each volume I_i is registered to the template T by diffeomorphic
demons (Vercauteren et al. 2009, in SimpleITK), I_i(x + u_i(x)) ~ T(x). The deformed volumes are averaged, and the average is
moved back by the mean displacement, so that it has the mean shape, whichever volume was first (Guimond et al. 2000).

Legend: volumes (X, Y, Z); displacements u (3, X, Y, Z) in voxels.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.data.itk import simple_itk

ITERATIONS = (30, 20)  # of demons, on half of the voxels along each axis, and on all
SMOOTH = 1.5  # voxels of the copy, standard deviation by which displacements are smoothed
INVERTING = 10  # fixed-point iterations


def mean_shape(
    volumes: Callable[[], Iterable[NDArray]], start: NDArray, rounds: int = 2, progress: Callable[[], None] | None = None
) -> NDArray:
    """The sharp template of volumes, (X, Y, Z).

    Args:
        volumes: gives them anew each time, (X, Y, Z).
        start: the first template: their mean.
        rounds: of registration and averaging.
        progress: called after each volume.

    Raises:
        InputError: SimpleITK is not installed.
    """
    itk, template = simple_itk("a sharp template (--rounds above 0)"), start
    for _ in range(rounds):
        total, moved, count = np.zeros(start.shape), np.zeros((3, *start.shape)), 0
        for volume in volumes():
            displacement = demons(itk, template, volume)
            total += warped(volume, displacement)
            moved += displacement
            count += 1
            if progress:
                progress()
        template = warped(total / count, inverse(moved / count)).astype(np.float32).clip(0, 1)
    return template


def demons(itk: Any, template: NDArray, volume: NDArray) -> NDArray:
    """u, so that volume(x + u(x)) is like the template, first on coarse copies."""
    field = None
    for shrink, iterations in zip((2, 1), ITERATIONS):
        fixed, moving = (_image(itk, each, shrink) for each in (template, volume))
        method = itk.DiffeomorphicDemonsRegistrationFilter()
        method.SetNumberOfIterations(iterations)
        method.SetStandardDeviations(SMOOTH)
        if field is None:
            field = method.Execute(fixed, moving)
        else:
            field = method.Execute(fixed, moving, itk.Resample(field, fixed, itk.Transform(), itk.sitkLinear, 0.0))
    # SimpleITK's arrays are (Z, Y, X, 3)
    return np.moveaxis(itk.GetArrayFromImage(field), -1, 0).transpose(0, 3, 2, 1)


def warped(volume: NDArray, displacement: NDArray) -> NDArray:
    """volume(x + u(x)), by cubic splines; beyond its edge as at it."""
    where = np.indices(volume.shape) + displacement
    found: NDArray = ndimage.map_coordinates(volume, where, order=3, mode="nearest")
    return found


def inverse(displacement: NDArray) -> NDArray:
    """v with x + v(x) the inverse of x + u(x): v(x) = -u(x + v(x))."""
    found = -displacement
    for _ in range(INVERTING):
        where = np.indices(displacement.shape[1:]) + found
        found = -np.stack([ndimage.map_coordinates(each, where, order=1, mode="nearest") for each in displacement])
    return found


def _image(itk: Any, volume: NDArray, shrink: int) -> Any:
    image = itk.GetImageFromArray(np.ascontiguousarray(volume.T.astype(np.float32)))
    return itk.BinShrink(image, [shrink] * 3) if shrink > 1 else image
