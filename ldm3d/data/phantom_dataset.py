"""Phantoms as a BIDS dataset on disk, with their label maps as a derivative."""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import ldm3d
from ldm3d.data.derivative import BIDS_VERSION
from ldm3d.data.nifti import write_volume
from ldm3d.data.phantoms import LABELS, Change, checked_grid, make_phantom
from ldm3d.data.tables import write_table
from ldm3d.errors import InputError
from ldm3d.geometry import Grid


def write_dataset(
    root: Path | str,
    subjects: int,
    shape: Sequence[int],
    seed: int = 0,
    spacing_mm: float | None = None,
    workers: int | None = None,
    twins: Change | None = None,
) -> Path:
    """Write phantoms as a BIDS dataset, with their label maps as a derivative.

    Args:
        root: must be empty or absent.
        subjects: how many; subject i is `make_phantom(..., seed, i)`.
        shape, spacing_mm, seed: see `make_phantom`.
        workers: processes; None for one per available core, 1 for none beside this one.
        twins: two sessions of each subject, ses-1 the person and ses-2 the same with this change; covariates of both are in
            sub-XXXX_sessions.tsv.

    Returns:
        `root`, with participants.tsv, sub-XXXX/anat/sub-XXXX_T1w.nii.gz and derivatives/labels.

    Raises:
        InputError: `root` holds something already, or what `make_phantom` raises.
    """
    root, (shape, spacing_mm) = Path(root), checked_grid(shape, spacing_mm)
    readme = "Toy brains made by ldm3d: synthetic anatomy, not measured on anyone. Volumes are counted on the label maps."
    _start(root, {"Name": "Toy brains (SYNTHETIC)", "DatasetType": "raw", "License": "CC0"}, readme)
    labels = root / "derivatives" / "labels"
    origin = [{"Name": "ldm3d phantoms", "Version": ldm3d.__version__}]
    _start(labels, {"Name": "Labels", "DatasetType": "derivative", "GeneratedBy": origin}, readme)
    write_table(labels / "dseg.tsv", pd.DataFrame({"index": LABELS.keys(), "name": LABELS.values()}))

    jobs = [(root, i, shape, spacing_mm, seed, twins) for i in range(subjects)]
    bar = tqdm(total=subjects, desc="phantoms", unit="subject", disable=None)
    rows = []
    if workers == 1:
        for job in jobs:
            rows.append(_write_subject(job))
            bar.update()
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for row in pool.map(_write_subject, jobs, chunksize=8):
                rows.append(row)
                bar.update()
    bar.close()
    write_table(root / "participants.tsv", pd.DataFrame(rows))
    columns = {
        "age": {"Description": "age", "Units": "years"},
        "sex": {"Description": "sex", "Levels": {"F": "female", "M": "male"}},
        "ventricular_volume_ml": {"Description": "volume of both lateral ventricles", "Units": "mL"},
        "brain_volume_ml": {"Description": "volume of grey and white matter", "Units": "mL"},
    }
    (root / "participants.json").write_text(json.dumps(columns, indent=2) + "\n")
    return root


def _start(folder: Path, description: dict, readme: str) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another folder, or delete what is in it")
    folder.mkdir(parents=True, exist_ok=True)
    description = {"BIDSVersion": BIDS_VERSION, **description}
    (folder / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "README").write_text(readme + "\n")


def _write_subject(job: tuple) -> dict:
    """Write one subject's image and label map, or those of two sessions; its row of participants.tsv."""
    root, index, shape, spacing_mm, seed, twins = job
    name = f"sub-{index + 1:04d}"
    if twins is None:
        return {
            "participant_id": name,
            **_write_scan(root, name, "", make_phantom(shape, spacing_mm, seed, index), spacing_mm),
        }
    rows = []
    for session, change in (("ses-1", None), ("ses-2", twins)):
        made = make_phantom(shape, spacing_mm, seed, index, change)
        rows.append({"session_id": session, **_write_scan(root, name, session, made, spacing_mm)})
    write_table(root / name / f"{name}_sessions.tsv", pd.DataFrame(rows))
    return {"participant_id": name, **{key: value for key, value in rows[0].items() if key != "session_id"}}


def _write_scan(root: Path, subject: str, session: str, made: tuple, spacing_mm: float) -> dict:
    """Write what `make_phantom` made; its covariates."""
    image, labels, covariates = made
    affine, stem = Grid.centred(image.shape[1:], [spacing_mm] * 3).affine, "_".join(filter(None, (subject, session)))
    image, anat = np.round(image).astype(np.int16), Path(subject, session, "anat")
    write_volume(root / anat / f"{stem}_T1w.nii.gz", image, affine, "SYNTHETIC phantom")
    write_volume(root / "derivatives/labels" / anat / f"{stem}_dseg.nii.gz", labels, affine, "SYNTHETIC phantom")
    return covariates
