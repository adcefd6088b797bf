"""The mask of each scan of a BIDS dataset: found by the entities in its name, and applied before anything else is done.

fMRIPrep, for one, writes a T1w image and a mask of the brain, never the stripped brain.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm3d.config.data import ENTITIES, DataConfig
from ldm3d.data.inside import dataset_of
from ldm3d.data.selection import as_text, values_of
from ldm3d.errors import InputError, some
from ldm3d.geometry import resample

_KINDS = (".nii.gz", ".nii", ".mgz", ".mgh")
_OTHER_DATA = frozenset(("func", "dwi", "fmap", "perf", "pet", "eeg", "meg", "ieeg", "beh", "nirs", "micr", "figures"))
_SAME = ("ses", "space", "run")  # of a scan and its mask; other entities may be absent from either

Named = tuple[Mapping[str, str], Path]  # entities, sub among them; the file


def mask_root(data: DataConfig) -> Path:
    """The folder below which masks are sought: `root` in `data.mask`, or the dataset of the scans."""
    given = (data.mask or {}).get("root")
    return Path(os.path.abspath(given)) if given else dataset_of(data)


def find_masks(data: DataConfig, paths: Sequence[str]) -> list[Path | InputError]:
    """The mask of each scan; an InputError, not raised, in the place of one that is not there or not the only one.

    A mask belongs to a scan of its subject, session, space and run. Where its name has further entities that the scan's name
    has too, they are the same, unless `data.mask` names them. Of several, the one that shares most entities is taken,
    and of these the one with fewest others.

    Args:
        data: with `mask`.
        paths: of the scans.

    Raises:
        InputError: there is no mask at all.
    """
    root = mask_root(data)
    if not root.is_dir():
        raise InputError(f"no folder {root} (data.mask)")
    asked = {entity: values_of(value) for entity, value in data.mask.items() if entity in ENTITIES}
    suffix = data.mask.get("suffix", "mask")
    known: dict[str, list[Named]] = {}
    for above, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _OTHER_DATA)
        for name in sorted(names):
            entities, kind = _read_name(name)
            if kind == suffix and all(entities.get(entity, "") in values for entity, values in asked.items()):
                known.setdefault(entities.get("sub", ""), []).append((entities, Path(above, name)))
    if not known.keys() - {""}:
        wanted = ", ".join(f"{key}: {value}" for key, value in data.mask.items() if key != "root")
        raise InputError(
            f"no mask in {root}: looked for sub-*_{suffix}.nii.gz (data.mask: {{{wanted}}}); if masks lie in another folder, "
            "name it as `root` in data.mask"
        )
    return [_one(path, known, set(asked), root) for path in paths]


def _read_name(name: str) -> tuple[dict[str, str], str]:
    """Entities and suffix of a file's name; ({}, "") if it is no image."""
    stem = next((name.removesuffix(kind) for kind in _KINDS if name.endswith(kind)), "")
    *parts, suffix = stem.split("_")
    pairs = [part.partition("-") for part in parts]
    return {entity: value if entity == "sub" else as_text(value) for entity, dash, value in pairs if dash}, suffix


def _one(path: str, known: Mapping[str, Sequence[Named]], asked: set[str], root: Path) -> Path | InputError:
    scan, _ = _read_name(Path(path).name)
    found = []
    for mask, file in known.get(scan.get("sub", ""), ()):
        free = asked | {"desc", "res"}  # of the mask itself, not of its scan
        same = all(mask.get(entity, "") == scan.get(entity, "") for entity in _SAME if entity not in asked)
        if same and "task" not in mask and all(mask[e] == scan[e] for e in mask.keys() & scan.keys() - free):
            shared = sum(scan.get(entity) == value for entity, value in mask.items())
            found.append(((shared, -len(mask)), file))
    best = [file for fit, file in found if fit == max(found)[0]]
    if len(best) == 1:
        return best[0]
    if best:
        names = some(str(file.relative_to(root)) for file in best)
        return InputError(f"{path}: has {len(best)} masks ({names}); say which in data.mask, such as {{res: null}}")
    wanted = ", ".join(f"{entity}-{scan[entity]}" if entity in scan else f"no {entity}" for entity in _SAME)
    return InputError(f"{path}: has no mask in {root} (of its subject, with {wanted}; see data.mask)")


def apply_mask(volume: NDArray, affine: NDArray, mask: NDArray, mask_affine: NDArray) -> tuple[NDArray, NDArray]:
    """A scan that is 0 outside of its mask, and the mask on the scan's voxels.

    Args:
        volume, mask: (1, X, Y, Z), on any grids; the mask is more than 0.5 where the scan is kept.
        affine, mask_affine: of each, to RAS+ mm.

    Raises:
        InputError: the mask keeps nothing of the scan.
    """
    same = volume.shape == mask.shape and np.allclose(affine, mask_affine, rtol=0, atol=1e-4)
    placed = mask if same else resample(mask, mask_affine, affine, volume.shape[1:], "nearest")
    kept = placed > 0.5
    if not kept.any():
        raise InputError("keeps no voxel of its scan; is it empty, or of another space?")
    return np.where(kept, volume, np.float32(0)), kept
