"""Scans that are synthetic themselves: phantoms, rendered brains, and what a model generated."""

import contextlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from ldm3d.covariates import Covariate
from ldm3d.data.headers import read_header
from ldm3d.data.nifti import MAX_VOXELS
from ldm3d.data.source import DESCRIPTION, source_of
from ldm3d.errors import InputError

_WORDS = re.compile(r"\b(synthetic|simulated|rendered|phantoms?)\b", re.IGNORECASE)
_LEVELS = 6  # folders above a scan in which a dataset's description is looked for: DATASET/sub-01/ses-1/anat/scan, and some


def are_synthetic(scans: pd.DataFrame, schema: Sequence[Covariate]) -> list[bool]:
    """Whether each scan is known to be synthetic: by its header, sidecar or dataset, or by a category such as "rendered".

    Args:
        scans: with path and covariates.
        schema: of the covariates.
    """
    names = [each.name for each in schema if each.kind == "categorical"]
    return [
        any(_says(str(row[name])) for name in names) or is_marked(Path(row["path"]))
        for row in scans[["path", *names]].to_dict("records")
    ]


def is_marked(scan: Path) -> bool:
    """Whether the header of a scan, the sidecar beside it or the description of its dataset says that it is synthetic."""
    with contextlib.suppress(InputError, OSError, KeyError):
        if _says(bytes(read_header(scan, MAX_VOXELS)[0]["descrip"]).decode("utf-8", "replace")):
            return True
    with contextlib.suppress(OSError, ValueError):
        sidecar = json.loads(scan.with_name(scan.name.split(".")[0] + ".json").read_text(encoding="utf-8"))
        if isinstance(sidecar, dict) and sidecar.get("synthetic") is True:
            return True
    return _of_dataset(scan.parent)


@lru_cache(maxsize=4096)
def _of_dataset(folder: Path) -> bool:
    """By the name in the nearest description of a dataset."""
    near = next((each for each in [folder, *folder.parents][:_LEVELS] if (each / DESCRIPTION).is_file()), None)
    return near is not None and _says(str(source_of(near).get("name", "")))


def _says(text: str) -> bool:
    return _WORDS.search(text) is not None
