"""Files that a page offers for download, each marked as synthetic."""

import importlib.util
import io
import tempfile
import zipfile
from pathlib import Path

from ldm3d.data.nifti import unpack_volume
from ldm3d.pipeline import Pipeline
from ldm3d.serve.asked import Asked

ZIP = "application/zip"


def formats() -> list[str]:
    """What can be had here, by name."""
    return ["nifti", "bids", *(["dicom"] if importlib.util.find_spec("pydicom") else [])]


def packed(kind: str, content: bytes, pipeline: Pipeline, asked: Asked) -> tuple[str, str, bytes]:
    """A volume as a file: (name, media type, bytes).

    Args:
        kind: one of `formats`.
        content: the volume as .nii.gz.
        pipeline, asked: what it comes from.
    """
    name = f"synthetic_seed-{asked.sampling.seed}_{pipeline.suffix}"
    if kind == "nifti":
        return f"{name}.nii.gz", "application/gzip", content
    with tempfile.TemporaryDirectory(prefix="ldm3d-serve-") as folder:
        root = Path(folder) / name
        pipeline.write(root, [unpack_volume(content)], [asked.row], asked.sampling)
        if kind == "dicom":
            from ldm3d.dicom.convert import convert  # its library may be missing

            convert(root, Path(folder) / "dicom")
            (path,) = (Path(folder) / "dicom").iterdir()
            return f"{name}.dcm", "application/dicom", path.read_bytes()
        return f"{name}_{kind}.zip", ZIP, _zipped(root)


def _zipped(folder: Path) -> bytes:
    """A folder as .zip; the same files are the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder.parent).as_posix())  # 1980-01-01
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
