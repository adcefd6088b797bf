"""Models that come with ldm3d: their names stand wherever a command or function takes a model folder."""

from pathlib import Path

from ldm3d.description import DESCRIPTION
from ldm3d.errors import InputError

PACKAGE = Path(__file__).parent
FOLDERS = PACKAGE / "weights", PACKAGE.parent / "models"  # of an installed package; of a clone
SEGMENTER = "segmenter"  # beside a model's networks


def shipped() -> dict[str, Path]:
    """Name -> folder of each shipped model, in alphabetical order."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), PACKAGE)
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{DESCRIPTION}"))}


def _found(name: Path | str) -> Path:
    """What lies at this path; if nothing does, the shipped model of this name."""
    path = Path(name)
    return path if path.exists() else shipped().get(str(path), path)


def model_folder(name: Path | str) -> Path:
    """The pipeline folder at a path, or of a shipped model; the path comes first.

    Raises:
        InputError: neither; the message lists the shipped models.
    """
    folder = _found(name)
    if not (folder / DESCRIPTION).is_file():
        reason = f"{DESCRIPTION} is missing" if folder.exists() else "there is no such folder"
        raise InputError(
            f"{name} holds no model: {reason}; training writes one to OUTPUT/model, and shipped are: "
            f"{', '.join(shipped()) or 'none'}"
        )
    return folder


def segmenter_folder(name: Path | str) -> Path:
    """The folder of a segmenter at a path; of a model, which may be a shipped one, the segmenter beside its networks."""
    folder = _found(name)
    return folder / SEGMENTER if (folder / DESCRIPTION).is_file() else folder
