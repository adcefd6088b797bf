"""The root of a dataset, outside of which no file is read."""

import os
from pathlib import Path

from ldm3d.config.data import DataConfig
from ldm3d.data.headers import files_of
from ldm3d.errors import InputError


def dataset_of(data: DataConfig) -> Path:
    """The folder in which scans are sought: the derivatives where they are given, else the dataset, or the table's folder."""
    return Path(os.path.abspath(data.derivatives or data.bids or data.table.parent))


def root_of(data: DataConfig) -> Path:
    """The folder that every scan lies below."""
    return Path(os.path.abspath(data.root)) if data.root else dataset_of(data)


def tables_root_of(data: DataConfig) -> Path:
    """The folder that the tables of a BIDS dataset lie below."""
    return Path(os.path.abspath(data.root or data.bids))


def check_inside(path: Path | str, root: Path) -> None:
    """Raise InputError unless a file lies below the dataset's root, links followed; both files of a pair .hdr and .img."""
    for file in files_of(Path(path)):
        real = Path(os.path.realpath(file))
        if not real.is_relative_to(os.path.realpath(root)):
            raise InputError(f"{path}: leads to {real}, outside of {root}; copy it there, or set data.root (evaluate: --root)")
