"""What is known stays, and nothing shows where it ends: a made volume around or within which voxels are given."""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import cg

TOLERANCE, MOST_ITERATIONS = 1e-4, 500


def seamless(made: NDArray, known: NDArray, measured: NDArray) -> NDArray:
    """The known voxels as they are, and the made ones elsewhere, moved so that both meet without a step.

    The made voxels are shifted by the membrane that the differences at the border span: h with a Laplacian of 0, h = known -
    made on the measured neighbours (Perez et al. 2003, eq. 4: gradients of the one image within the frame of the other). Over
    the faces of the volume nothing is asked of it.

    Args:
        made, known: (C, X, Y, Z); `known` counts where it is measured.
        measured: (X, Y, Z), true where it is.

    Returns:
        (C, X, Y, Z) float32, with `known` exactly where it is measured.
    """
    number = np.full(measured.shape, -1)
    count = int((~measured).sum())
    number[~measured] = np.arange(count)
    degree, border = np.zeros(count), np.zeros((len(made), count))
    rows, columns = [], []
    for axis in range(3):
        for here, there in (_shifted(axis), _shifted(axis)[::-1]):
            a, b = number[here], number[there]
            both = (a >= 0) & (b >= 0)
            rows.append(a[both])
            columns.append(b[both])
            np.add.at(degree, a[both], 1)
            edge = (a >= 0) & (b < 0)  # an unknown voxel beside a measured one
            np.add.at(degree, a[edge], 1)
            for channel in range(len(made)):
                np.add.at(border[channel], a[edge], (known[channel][there] - made[channel][there])[edge])
    filled = np.where(measured, known, made).astype(np.float32)
    if not count or not border.any():
        return filled
    neighbours = sparse.coo_matrix((np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns))))
    neighbours.resize(count, count)
    laplacian = sparse.diags(np.maximum(degree, 1)) - neighbours.tocsr()
    for channel, right in enumerate(border):
        shift, _ = cg(laplacian, right, rtol=TOLERANCE, maxiter=MOST_ITERATIONS)
        filled[channel][~measured] += shift.astype(np.float32)
    return filled


def _shifted(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of (X, Y, Z): all voxels that have a next one along an axis, and these next ones."""
    here, there = [slice(None)] * 3, [slice(None)] * 3
    here[axis], there[axis] = slice(None, -1), slice(1, None)
    return tuple(here), tuple(there)
