"""Models by name: those that come with ldm3d, and those at a hub; the names stand wherever a model folder is taken."""

from pathlib import Path

from ldm3d.description import DESCRIPTION
from ldm3d.errors import InputError
from ldm3d.hub import fetch, is_name

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


def model_folder(name: Path | str, revision: str | None = None) -> Path:
    """The pipeline folder at a path, of a shipped model or of one at a hub, in this order.

    Args:
        name: a path, a shipped model's name, or "user/name" at a hub.
        revision: of a model at a hub; with it, no path and no shipped model is meant.

    Raises:
        InputError: none of these; the message lists the shipped models.
    """
    folder = _found(name)
    if revision is not None or (not folder.exists() and is_name(name)):
        folder = fetch(str(name), revision)
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
