"""A restored scan as a BIDS derivative.

OUT/sub-XX[/ses-YY]/anat/   ..._desc-restored_T1w.nii.gz     the mean of all samples, on the scan's voxels or finer ones
                            ..._desc-samples_T1w.nii.gz      the samples, 4D
                            ..._desc-deviation_T1w.nii.gz    how far to trust each voxel, in the scan's intensities
                            ..._desc-restored_T1w.json       appears last: with it the scan is done
OUT/figures/                a picture
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

import ldm3d
from ldm3d import figures
from ldm3d.applications.restore import Restored
from ldm3d.data.derivative import as_json, derivative_files
from ldm3d.data.nifti import write_volume
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.pipeline import Pipeline

README = (
    "Scans restored by a latent diffusion model (ldm3d): what was there, given how the scan was degraded. They are derived "
    "from scans and partly synthetic: what was not measured is made up, in a likely way. Not for diagnosis."
)
MADE = "restore, model "


class RestoredFile:
    """Where a scan's restoration goes.

    Args:
        folder: empty, absent, or of restored scans.
        pipe: the model.
        scan: its file.
        asked: all that the result follows from beside the two, as plain JSON.

    Raises:
        InputError: the folder holds something else.
    """

    def __init__(self, folder: Path, pipe: Pipeline, scan: Path, asked: dict[str, Any]):
        self.folder, self.pipe, self.scan = folder, pipe, scan
        content = hashlib.sha256(scan.read_bytes()).hexdigest()
        self.identity = hashlib.sha256(json.dumps([content, pipe.model_hash, asked]).encode()).hexdigest()[:16]
        described = folder / "dataset_description.json"
        known = described.read_text(encoding="utf-8", errors="replace") if described.is_file() else ""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and MADE not in known:
            raise InputError(f"{folder} is not empty and holds no restored scans; choose another --out")

    def path(self, desc: str, ending: str = ".nii.gz") -> Path:
        """Of a result; subject and session are those of the scan's name."""
        entities = dict(re.findall(r"(sub|ses)-([A-Za-z0-9]+)", self.scan.name))
        subject = entities.get("sub") or re.sub("[^A-Za-z0-9]", "", self.scan.name.partition(".")[0]) or "scan"
        session = f"ses-{entities['ses']}" if "ses" in entities else ""
        stem = f"sub-{subject}" + (f"_{session}" if session else "")
        return self.folder / f"sub-{subject}" / session / "anat" / f"{stem}_desc-{desc}_{self.pipe.suffix}{ending}"

    @property
    def is_done(self) -> bool:
        """Whether it is there already.

        Raises:
            InputError: it is, but otherwise than asked now.
        """
        path = self.path("restored", ".json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["Restoration"]["Identity"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if found != self.identity:
            raise InputError(f"{path} is of another operator, scan or model; choose another --out, or delete it")
        return True

    def write(self, restored: Restored) -> Path:
        """Write all files; returns the folder's path of the mean."""
        made_by = {"Name": "ldm3d", "Version": ldm3d.__version__, "Description": f"{MADE}{self.pipe.model_hash}"}
        files = derivative_files("Restored brain scans (DERIVED, partly synthetic)", [made_by], README)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in [*files.items(), (".bidsignore", "figures/\n")]:
            write_atomic(self.folder / name, content)
        degraded, placed = restored.degraded, restored.placed
        samples = [degraded.back(placed, sample[None]) for sample in restored.samples]
        write_volume(self.path("restored"), degraded.back(placed, restored.mean), degraded.affine, placed.mark)
        write_volume(self.path("samples"), np.concatenate(samples), degraded.affine, placed.mark)
        if len(samples) > 1:
            deviation = degraded.deviation_back(placed, restored.deviation)
            write_volume(self.path("deviation"), deviation, degraded.affine, placed.mark)
        self._draw(restored)
        sidecar = {
            "Description": f"A {self.pipe.suffix} scan restored by ldm3d: derived, and synthetic in part",
            "Sources": [source_of(self.scan)],
            "SkullStripped": self.pipe.skull_stripped,
            "model_hash": self.pipe.model_hash,
            "Restoration": {
                **restored.settings,
                "Registration": placed.info.get("registration"),
                "Identity": self.identity,
            },
        }
        write_atomic(self.path("restored", ".json"), as_json(sidecar))
        return self.path("restored")

    def _draw(self, restored: Restored) -> None:
        """What the model was given, the mean, a sample, and the deviation, on the Grid."""
        (self.folder / "figures").mkdir(exist_ok=True)
        shown = [restored.placed.volume, restored.mean, restored.samples[:1]]
        titles = ["scan", f"mean of {len(restored.samples)}", "a sample"]
        if len(restored.samples) > 1:
            shown.append(restored.deviation / restored.deviation.max())
            titles.append(f"deviation, white: {100 * restored.deviation.max():.0f}% of the range")
        strip = figures.mosaic(
            [volume[0].cpu().numpy() for volume in shown],
            titles,
            self.pipe.grid.spacing_mm,
            columns=2,
            heading="derived, synthetic in part",
        )
        figures.save(strip, self.folder / "figures" / (self.path("restored", "").name + ".png"))


def source_of(scan: Path) -> str:
    """The scan by its path in its own BIDS dataset, or else by its name: nothing that tells of folders outside of it."""
    for folder in scan.resolve().parents:
        if (folder / "dataset_description.json").is_file():
            return os.fspath(scan.resolve().relative_to(folder).as_posix())
    return scan.name
