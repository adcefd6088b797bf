"""What preparing takes from a scan before it is placed, and how it is given back: what a mask hides, and the bias field."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d.data import bias
from ldm3d.data.bias import BiasField
from ldm3d.data.extraction import Tool, extract
from ldm3d.data.masks import apply_mask
from ldm3d.errors import InputError
from ldm3d.files import write_atomic


@dataclass(frozen=True)
class Removed:
    """Of one scan.

    Attributes:
        kept: bool (1, X, Y, Z), what a mask left of the scan; None without a mask.
        field: by which it was divided; None without correction.
    """

    kept: NDArray | None = None
    field: BiasField | None = None

    def put_back(self, volume: NDArray, affine: NDArray, scan: NDArray | None) -> NDArray:
        """The scan as it was, from what preparing made of it.

        Args:
            volume: (1, X, Y, Z) on the scan's own voxels, corrected and masked.
            affine: (4, 4) of both.
            scan: (1, X, Y, Z), from which comes what the mask hid; None: it stays background.
        """
        if self.field is not None:
            volume = volume * self.field.on(affine, volume.shape[1:])
        if self.kept is None:
            return volume
        return np.where(self.kept, volume, np.float32(0) if scan is None else scan).astype(np.float32)

    def write(self, path: Path) -> None:
        """As .npz; nothing where nothing was removed."""
        arrays: dict[str, NDArray] = {}
        if self.kept is not None:
            arrays |= {"kept": np.packbits(self.kept), "shape": np.array(self.kept.shape)}
        if self.field is not None:
            arrays |= {"log_field": self.field.log, "field_affine": self.field.affine}
        if arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
            write_atomic(path, buffer.getvalue())


def remove(
    scan: NDArray, affine: NDArray, path: Path, kept: NDArray | None, tool: Tool | None, correct: bool
) -> tuple[NDArray, Removed, dict[str, Any]]:
    """Take the skull and the bias field from a scan, in this order.

    Args:
        scan: (1, X, Y, Z), masked already where `kept` is given.
        affine: (4, 4) of `scan`.
        path: of its file, which the tool reads; one without the ending of NIfTI is not read, see `extract`.
        kept: bool (1, X, Y, Z), what a mask left of it.
        tool: that extracts brains; None: none is wanted.
        correct: whether the bias field is divided out.

    Returns:
        The scan without them, what was removed, and what a sidecar says of it.

    Raises:
        InputError: what `extract`, `apply_mask` and `ldm3d.data.bias.estimate_field` raise.
    """
    told: dict[str, Any] = {}
    field = None
    if tool:
        mask = extract(tool, path, scan, affine)
        scan, kept = masked(scan, affine, mask, f"the mask of {tool.words[0]}")
        told["brain_extraction"] = tool.told()
    if kept is not None:
        told["mask_keeps"] = round(float(kept.mean()), 4)
    if correct:
        field = bias.estimate_field(scan, affine)
        scan = scan / field.on(affine, scan.shape[1:])
        told["bias_correction"] = field.told()
    return scan, Removed(kept, field), told


def remove_beside(image: NDArray, affine: NDArray, scan: Removed, of_scan: NDArray, correct: bool) -> tuple[NDArray, Removed]:
    """Take from another contrast of a session what was taken from its scan: the same mask, and its own bias field.

    Args:
        image: (1, X, Y, Z), in the world of the scan.
        affine: (4, 4) of `image`.
        scan, of_scan: what the scan was relieved of, and the scan's affine.
        correct: whether bias fields are divided out.

    Raises:
        InputError: what `masked` and `remove` raise.
    """
    kept = None
    if scan.kept is not None:
        mask = scan.kept.astype(np.float32), of_scan
        image, kept = masked(image, affine, mask, "the mask of its session's scan")
    image, removed, _ = remove(image, affine, Path("image"), kept, None, correct)
    return image, removed


def masked(volume: NDArray, affine: NDArray, mask: tuple[NDArray, NDArray], name: Path | str) -> tuple[NDArray, NDArray]:
    """See `apply_mask`; an InputError names the mask."""
    try:
        return apply_mask(volume, affine, *mask)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def read_removed(path: Path) -> Removed:
    """Of a file of `Removed.write`; nothing where there is none.

    Raises:
        OSError, ValueError, KeyError, EOFError or zipfile.BadZipFile: the file is damaged.
    """
    if not path.is_file():
        return Removed()
    with np.load(path) as arrays:
        kept = field = None
        if "kept" in arrays:
            shape = tuple(arrays["shape"].tolist())
            kept = np.unpackbits(arrays["kept"], count=int(np.prod(shape))).astype(bool).reshape(shape)
        if "log_field" in arrays:
            field = BiasField(arrays["log_field"], arrays["field_affine"])
    return Removed(kept, field)
