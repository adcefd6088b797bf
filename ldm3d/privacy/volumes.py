"""The volumes of an audit: of training and held-out subjects, and synthetic ones, generated on demand or read from files."""

import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ldm3d.config.sections import Config
from ldm3d.covariates import Value
from ldm3d.data.conditions import ScanImages
from ldm3d.data.nifti import read_volume
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator

TRAINING, HELD_OUT = "training", "held-out"


@dataclass(frozen=True)
class Volumes:
    """Volumes that are read on demand.

    Attributes:
        names: the subject of each, who may have several; of synthetic volumes, their names.
        rows: covariates of each, from `Pipeline.parse`; None if they are not known.
        read: indices of volumes -> these, in order, (C, X, Y, Z) in [0, 1].
        asked: of synthetic volumes, the group of subjects whose covariates were requested: `TRAINING`, `HELD_OUT`; empty if
            not known.
    """

    names: Sequence[str]
    rows: Sequence[Mapping[str, Value]] | None
    read: Callable[[Sequence[int]], Iterable[NDArray]]
    asked: Sequence[str] = field(default=())

    def __len__(self) -> int:
        return len(self.names)

    def first_scans(self, most: int | None = None, seed: int = 0) -> list[int]:
        """The index of one volume of each subject, of at most `most` random subjects."""
        firsts = list({name: i for i, name in reversed([*enumerate(self.names)])}.values())
        order = torch.randperm(len(firsts), generator=generator("first scans", seed))[:most].tolist()
        return sorted(firsts[i] for i in order)


def of_subjects(
    subjects: Sequence[str], covariates: Sequence[Mapping[str, Any]], load: Callable[[int], NDArray], pipeline: Pipeline
) -> Volumes:
    """Scans of subjects; `load`: index of a scan -> its volume."""
    return Volumes(list(subjects), pipeline.parse(covariates), lambda numbers: map(load, numbers))


def of_scans(config: Config, scans: pd.DataFrame, pipeline: Pipeline) -> Volumes:
    """Prepared scans of a table from `ldm3d.experiment.scans_by_use`."""
    rows = scans[pipeline.schema.names].to_dict("records")
    return of_subjects(list(scans["subject"]), rows, ScanImages(config, scans).made, pipeline)


def generated_for(
    pipeline: Pipeline, training: Volumes, held_out: Volumes, count: int, sampling: Sampling, seed: int = 0
) -> Volumes:
    """Volumes to be generated, one half for training subjects' covariates, as copies are most likely there.

    Args:
        pipeline: the model.
        training, held_out: whose covariates are requested, in a random order, repeated if there are fewer.
        count: of volumes.
        sampling, seed: of the volumes, and of the order.
    """
    rows, asked = [], []
    for group, volumes, some in ((TRAINING, training, count - count // 2), (HELD_OUT, held_out, count // 2)):
        order = torch.randperm(len(volumes), generator=generator("asked", group, seed)).tolist()
        rows += [volumes.rows[i] for i in itertools.islice(itertools.cycle(order), some)]
        asked += [group if len(pipeline.schema) else ""] * some  # a model without covariates has no requests

    def read(numbers: Sequence[int]) -> Iterator[NDArray]:
        return pipeline.volumes([rows[i] for i in numbers], sampling, numbers=numbers)

    return Volumes([f"sample {i}" for i in range(count)], rows, read, asked)


def written_in(folder: Path, pipeline: Pipeline) -> Volumes:
    """Volumes that `ldm3d generate` wrote.

    Raises:
        InputError: no such volume in the folder, or, when it is read, one on another grid.
    """
    paths = sorted(folder.glob(f"sub-*/anat/*_desc-synthetic_{pipeline.suffix}.nii.gz"))
    if not paths:
        kind = f"synthetic {pipeline.suffix} volume"
        raise InputError(f"no {kind} in {folder}; give a folder that `ldm3d generate` wrote, or leave it out")
    others = {path.name for path in paths if _model_of(path) != pipeline.model_hash}
    if others:
        warnings.warn(
            f"{len(others)} of {len(paths)} volumes in {folder} are not by this model ({min(others)}); the "
            "figures are of these volumes, not of the model",
            stacklevel=2,
        )

    renamed = [(f"_{pipeline.suffix}.nii", f"_{suffix}.nii") for suffix in pipeline.suffixes]

    def load(i: int) -> NDArray:
        contrasts = [read_volume(paths[i].with_name(paths[i].name.replace(*names))) for names in renamed]
        volume, affine = np.concatenate([voxels for voxels, _ in contrasts]), contrasts[0][1]
        grid = pipeline.output_grid
        if volume.shape[1:] != grid.shape or not np.allclose(affine, grid.affine, atol=1e-3):
            raise InputError(
                f"{paths[i]} has {volume.shape[1:]} voxels or lies elsewhere than the model's own volumes, "
                f"{grid.shape}; give volumes that `ldm3d generate` wrote"
            )
        return volume.clip(0, 1)

    return Volumes([path.parents[1].name for path in paths], None, lambda numbers: map(load, numbers))


def _model_of(path: Path) -> str | None:
    """From the sidecar."""
    try:
        return json.loads(path.with_name(path.name.removesuffix(".nii.gz") + ".json").read_text(encoding="utf-8"))[
            "model_hash"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
