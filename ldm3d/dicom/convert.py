"""A folder of `ldm3d generate` as DICOM: an Enhanced MR object for each volume, or a series of classic MR images."""

import json
from pathlib import Path
from typing import Any

from ldm3d.data.nifti import read_volume
from ldm3d.dicom.classic import to_classic
from ldm3d.dicom.enhanced import to_dicom
from ldm3d.errors import InputError
from ldm3d.files import replacing


def convert(folder: Path | str, out: Path | str, classic: bool = False) -> int:
    """Write every volume of a folder of `ldm3d generate` as DICOM; returns how many.

    Args:
        folder: with the volumes and their sidecars.
        out: OUT/sub-syn0001.dcm and so on, of a classic series OUT/sub-syn0001/0001.dcm; files of these names are replaced.
            Where there are several contrasts, sub-syn0001_T1w and so on.
        classic: a file for each plane, for programs that do not read Enhanced MR.

    Raises:
        InputError: no generated volume in the folder, or one whose sidecar does not say that it is synthetic.
    """
    volumes = sorted(Path(folder).glob("sub-*/anat/*_desc-synthetic_*.nii.gz"))
    if not volumes:
        raise InputError(f"{folder} holds no volume of `ldm3d generate` (sub-*/anat/*_desc-synthetic_*.nii.gz)")
    out, contrasts = Path(out), {_suffix(path) for path in volumes}
    for path in volumes:
        sidecar = _sidecar(path)
        volume, affine = read_volume(path)
        subject = path.name.split("_")[0]
        about = sidecar, subject.removeprefix("sub-"), _suffix(path)
        subject += f"_{_suffix(path)}" if len(contrasts) > 1 else ""
        if classic:
            images = to_classic(volume, affine, *about)
            names = [f"{subject}/{number:04d}" for number in range(1, len(images) + 1)]
        else:
            images, names = [to_dicom(volume, affine, *about)], [subject]
        for name, image in zip(names, images):
            (out / f"{name}.dcm").parent.mkdir(parents=True, exist_ok=True)
            with replacing(out / f"{name}.dcm") as unfinished:
                image.save_as(unfinished, enforce_file_format=True)
    return len(volumes)


def _suffix(path: Path) -> str:
    return path.name.split("_")[-1].split(".")[0]


def _sidecar(path: Path) -> dict[str, Any]:
    """What stands beside a generated volume; other volumes are never marked as synthetic by mistake."""
    beside = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
    try:
        said = json.loads(beside.read_bytes())
        if said["synthetic"] is True and {"model_hash", "seed", "sample", "covariates"} <= said.keys():
            return said
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(
        f"{path}: {beside.name} does not say that this volume is synthetic; only those of `ldm3d generate` are written"
    )
