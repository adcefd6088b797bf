"""The files around generated volumes that make a folder a BIDS derivative dataset."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ldm3d.data.tables import as_tsv

BIDS_VERSION = "1.10.0"


def derivative_files(
    name: str, generated_by: Sequence[Mapping[str, Any]], readme: str, links: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What makes a folder a BIDS derivative dataset: the content of dataset_description.json and README, by name.

    Args:
        name: of the dataset.
        generated_by: BIDS GeneratedBy, each {"Name": ..., "Version": ..., "Description": ...}.
        readme: text of the README.
        links: BIDS DatasetLinks, name -> URI, of the datasets that sidecars refer to.
    """
    description = {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [dict(entry) for entry in generated_by],
        **({"DatasetLinks": dict(links)} if links else {}),
    }
    return {"dataset_description.json": as_json(description), "README": readme.rstrip() + "\n"}


def synthetic_path(folder: Path | str, i: int, volumes: int = 1, suffix: str = "T1w") -> Path:
    """Where the volume of sample i (from 0) of a dataset of so many volumes goes; its subject is syn0001 for i = 0.

    Subjects of one dataset have numbers of one width, four digits or more, so that they sort by name.
    """
    subject = f"sub-syn{i + 1:0{max(4, len(str(volumes)))}d}"
    return Path(folder) / subject / "anat" / f"{subject}_desc-synthetic_{suffix}.nii.gz"


def participants_files(participants: pd.DataFrame, columns: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The content of participants.tsv and of the participants.json that explains it, by name.

    Args:
        participants: one row a subject; participant_id ("sub-syn0001") is its first column. Missing values become n/a.
        columns: {"Description": ..., "Units": ...} or {"Description": ..., "Levels": {...}} for each other column.
    """
    if participants.columns[0] != "participant_id":
        raise ValueError(f"the first column must be participant_id, got {list(participants.columns)}")
    described = {"participant_id": {"Description": "Identifier of the synthetic subject"}}
    described |= {key: dict(value) for key, value in columns.items()}
    return {"participants.json": as_json(described), "participants.tsv": as_tsv(participants)}


def as_json(values: Mapping[str, Any]) -> str:
    """The content of a JSON file."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
