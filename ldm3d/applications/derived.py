"""Where what is made from a scan goes: a BIDS derivative, OUT/sub-XX[/ses-YY]/anat, with its Sources.

The sidecar of a scan appears last: with it the scan is done, and the same command does not do it again.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Kind:
    """What a folder of results holds.

    Attributes:
        name: of the command, "restore".
        title: of the dataset.
        readme: of the folder.
        mains: descriptions (`desc-`) that the main result of a scan can have.
        beside: descriptions, and names of files, that BIDS does not know.
        suffixes: by description, of results that are no volumes as the model makes them.
    """

    name: str
    title: str
    readme: str
    mains: tuple[str, ...]
    beside: tuple[str, ...]
    suffixes: Mapping[str, str] = field(default_factory=dict)

    @property
    def ignored(self) -> str:
        """The content of .bidsignore."""
        files = [name if "." in name else f"*_desc-{name}_*" for name in self.beside]
        return "".join(f"{line}\n" for line in ("figures", "report.html", *files))

    def check(self, folder: Path) -> None:
        """Raise InputError where a folder holds something else."""
        described = folder / "dataset_description.json"
        known = described.read_text(encoding="utf-8", errors="replace") if described.is_file() else ""
        used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if used and f'"{self.name}, model ' not in known:
            raise InputError(f"{folder} is not empty, and what it holds is not of ldm3d {self.name}; choose another --out")

    def is_begun(self, folder: Path) -> bool:
        """Whether there are results in a folder."""
        return (folder / "dataset_description.json").is_file()

    def begin(self, folder: Path, model_hash: str) -> None:
        """Write what makes a folder a dataset, where it is not there yet."""
        made_by = {"Name": "ldm3d", "Version": ldm3d.__version__, "Description": f"{self.name}, model {model_hash}"}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in [*derivative_files(self.title, [made_by], self.readme).items(), (".bidsignore", self.ignored)]:
            if not (folder / name).exists():
                write_atomic(folder / name, content)


class Derived:
    """The files of one scan.

    Args:
        folder: empty, absent, or of the same kind.
        kind: of results.
        pipe: the model.
        scan: its file.
        asked: all that the result follows from beside the two.
        files: that the result follows from as well, by their content; missing ones are not counted.

    Raises:
        InputError: the folder holds something else, or there is no such scan.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        pipe: Pipeline,
        scan: Path,
        asked: Mapping[str, Any],
        files: Sequence[Path] = (),
    ):
        self.folder, self.kind, self.pipe, self.scan = folder, kind, pipe, scan
        if not scan.is_file():
            raise InputError(f"{scan}: no such file")
        content, *others = (hashlib.sha256(each.read_bytes()).hexdigest() for each in (scan, *files) if each.is_file())
        follows_from = json.dumps([content, pipe.model_hash, dict(asked), *others], default=str)
        self.identity = hashlib.sha256(follows_from.encode()).hexdigest()[:16]
        kind.check(folder)

    def path(self, desc: str, ending: str = ".nii.gz") -> Path:
        """Of a result; subject and session are those of the scan's name."""
        subject, session = label_of(self.scan)
        folder = self.folder / f"sub-{subject}" / (f"ses-{session}" if session else "") / "anat"
        suffix = self.kind.suffixes.get(desc, self.pipe.suffix)
        return folder / f"{stem_of(self.scan)}_desc-{desc}_{suffix}{ending}"

    def figure(self, desc: str) -> Path:
        """Of a picture; its folder is there."""
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        return self.folder / "figures" / f"{stem_of(self.scan)}_desc-{desc}.png"

    @property
    def is_done(self) -> bool:
        """Whether it is there already.

        Raises:
            InputError: it is, but otherwise than asked now.
        """
        for path in (self.path(main, ".json") for main in self.kind.mains):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))["Identity"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if found != self.identity:
                raise InputError(
                    f"{path} was asked for otherwise, or is of another scan, file or model; choose another --out, or delete it"
                )
            return True
        return False

    def write(self, images: Mapping[str, NDArray], affine: NDArray, mark: str, sidecar: Mapping[str, Any]) -> Path:
        """Write volumes (C, X, Y, Z) by their description, the main result first, then the sidecar; returns its path."""
        main = next(iter(images))
        if main not in self.kind.mains or not images.keys() <= {*self.kind.mains, *self.kind.beside}:
            raise ValueError(f"{list(images)} are not results of {self.kind}")
        self.kind.begin(self.folder, self.pipe.model_hash)
        for desc, image in images.items():
            write_volume(self.path(desc), np.asarray(image), affine, mark)
        common = {
            "Sources": [source_of(self.scan)],
            "SkullStripped": self.pipe.skull_stripped,
            "model_hash": self.pipe.model_hash,
        }
        write_atomic(self.path(main, ".json"), as_json({**sidecar, **common, "Identity": self.identity}))
        return self.path(main)


def label_of(scan: Path) -> tuple[str, str]:
    """(subject, session) by the file's name; "" for no session. Letters and digits of any other name."""
    entities = dict(re.findall(r"(sub|ses)-([A-Za-z0-9]+)", scan.name))
    other = re.sub("[^A-Za-z0-9]", "", scan.name.partition(".")[0]) or "scan"
    return entities.get("sub", other), entities.get("ses", "")


def stem_of(scan: Path) -> str:
    """ "sub-01_ses-2"."""
    subject, session = label_of(scan)
    return f"sub-{subject}" + (f"_ses-{session}" if session else "")


def check_labels(scans: Sequence[Path], where: str) -> None:
    """Raise InputError where results of several scans would have one name."""
    stems = [stem_of(scan) for scan in scans]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise InputError(
            f"{where} has several scans of one subject and session by their names ({', '.join(twice[:3])}); give them apart"
        )


def source_of(scan: Path) -> str:
    """The scan by its path in its own BIDS dataset, or else by its name: nothing that tells of folders outside of it."""
    for folder in scan.resolve().parents:
        if (folder / "dataset_description.json").is_file():
            return os.fspath(scan.resolve().relative_to(folder).as_posix())
    return scan.name
