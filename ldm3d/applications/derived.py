"""Where what is made from a scan goes: a BIDS derivative, OUT/sub-XX[/ses-YY]/anat, with its Sources.

The sidecar of a scan appears last: with it the scan is done, and the same command does not do it again.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ldm3d
from ldm3d.data.derivative import as_json, derivative_files
from ldm3d.data.nifti import write_volume
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.pipeline import Pipeline


class Derived:
    """The files of one scan.

    Args:
        folder: empty, absent, or of the same kind.
        kind: of result, "restore" or "anomaly".
        readme: of the folder; its first sentence is the name of the dataset.
        main: description (`desc-`) of the main result.
        pipe: the model.
        scan: its file.
        asked: all that the result follows from beside the two, as plain JSON.

    Raises:
        InputError: the folder holds something else.
    """

    def __init__(self, folder: Path, kind: str, readme: str, main: str, pipe: Pipeline, scan: Path, asked: dict[str, Any]):
        self.folder, self.kind, self.readme, self.main, self.pipe, self.scan = folder, kind, readme, main, pipe, scan
        content = hashlib.sha256(scan.read_bytes()).hexdigest()
        self.identity = hashlib.sha256(json.dumps([content, pipe.model_hash, asked]).encode()).hexdigest()[:16]
        described = folder / "dataset_description.json"
        known = described.read_text(encoding="utf-8", errors="replace") if described.is_file() else ""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and self._made not in known:
            raise InputError(f"{folder} is not empty, and what it holds is not of ldm3d {kind}; choose another --out")

    @property
    def _made(self) -> str:
        return f'"{self.kind}, model '

    def path(self, desc: str, ending: str = ".nii.gz") -> Path:
        """Of a result; subject and session are those of the scan's name."""
        entities = dict(re.findall(r"(sub|ses)-([A-Za-z0-9]+)", self.scan.name))
        subject = entities.get("sub") or re.sub("[^A-Za-z0-9]", "", self.scan.name.partition(".")[0]) or "scan"
        session = f"ses-{entities['ses']}" if "ses" in entities else ""
        stem = f"sub-{subject}" + (f"_{session}" if session else "")
        return self.folder / f"sub-{subject}" / session / "anat" / f"{stem}_desc-{desc}_{self.pipe.suffix}{ending}"

    @property
    def figure(self) -> Path:
        """Of the picture; its folder is there."""
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        return self.folder / "figures" / self.path(self.main, ".png").name

    @property
    def is_done(self) -> bool:
        """Whether it is there already.

        Raises:
            InputError: it is, but otherwise than asked now.
        """
        path = self.path(self.main, ".json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["Identity"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if found != self.identity:
            raise InputError(
                f"{path} was asked for otherwise, or is of another scan or model; choose another --out, or delete it"
            )
        return True

    def write(self, images: dict[str, NDArray], affine: NDArray, mark: str, sidecar: dict[str, Any]) -> Path:
        """Write volumes (C, X, Y, Z) by their description, then the sidecar; returns the path of the main result."""
        made_by = {"Name": "ldm3d", "Version": ldm3d.__version__, "Description": f"{self.kind}, model {self.pipe.model_hash}"}
        files = derivative_files(self.readme.partition(":")[0].partition(".")[0] + " (DERIVED)", [made_by], self.readme)
        self.folder.mkdir(parents=True, exist_ok=True)
        ignored = "".join(f"{line}\n" for line in ("figures", *(f"*_desc-{desc}_*" for desc in images if desc != self.main)))
        for name, content in [*files.items(), (".bidsignore", ignored)]:
            write_atomic(self.folder / name, content)
        for desc, image in images.items():
            write_volume(self.path(desc), np.asarray(image), affine, mark)
        common = {
            "Sources": [source_of(self.scan)],
            "SkullStripped": self.pipe.skull_stripped,
            "model_hash": self.pipe.model_hash,
        }
        write_atomic(self.path(self.main, ".json"), as_json({**sidecar, **common, "Identity": self.identity}))
        return self.path(self.main)


def source_of(scan: Path) -> str:
    """The scan by its path in its own BIDS dataset, or else by its name: nothing that tells of folders outside of it."""
    for folder in scan.resolve().parents:
        if (folder / "dataset_description.json").is_file():
            return os.fspath(scan.resolve().relative_to(folder).as_posix())
    return scan.name
