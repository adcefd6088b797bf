"""What an autoencoder is of: the scans, with further contrasts beside them or without; or label maps in their place."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d.config.sections import Config
from ldm3d.data.conditions import Cached, find_files, fingerprint, load_condition
from ldm3d.data.preparing import load_prepared
from ldm3d.errors import InputError
from ldm3d.files import checked_name, write_atomic


@dataclass(frozen=True)
class CodedVolumes:
    """What the autoencoder of an experiment is of: the scans, and further contrasts of each; or label maps, if these are made.

    Small, and picklable.

    Attributes:
        config: whose prepared folder holds the scans.
        kept: what has files of its own: the further contrasts, or the label maps.
    """

    config: Config
    kept: tuple["KeptVolumes", ...] = ()

    @classmethod
    def of(cls, config: Config, scans: pd.DataFrame) -> "CodedVolumes":
        """Of the scans of a table.

        Raises:
            InputError: what `find_files` raises; no scan of the training split has all contrasts.
        """
        labels = config.made_labels
        parts = config.contrasts if labels is None else (labels,)
        coded = cls(config, tuple(KeptVolumes.of(config, part, scans) for part in parts))
        train = scans.loc[scans["split"] == "train", "key"]
        if config.contrasts and len(train) and not any(map(coded.complete, train)):
            names = ", ".join(config.data.channels)
            raise InputError(
                f"data.channels: none of {len(train)} scans of the training split has all of {names}; "
                "a model of several contrasts learns from such scans how they belong together"
            )
        return coded

    def complete(self, key: str) -> bool:
        """Whether a scan lacks nothing."""
        return all(key in each for each in self.kept)

    def __contains__(self, key: str) -> bool:
        """Whether there is something to code; a scan may lack further contrasts."""
        return self.config.made_labels is None or self.complete(key)

    def __call__(self, key: str) -> NDArray:
        """Of a scan, by its key: (C, X, Y, Z) float32 in [0, 1]; NaN where it has no label map, or lacks a contrast."""
        own = [] if self.config.made_labels else [load_prepared(self.config, key)]
        return np.concatenate([*own, *(each(key) for each in self.kept)])

    def filled(self, key: str) -> NDArray:
        """The same with the scan in the place of what it lacks: each contrast is coded by itself, so the scan weighs more."""
        volume = self(key)
        return np.where(np.isnan(volume[:, :1, :1, :1]), volume[:1], volume)


@dataclass(frozen=True)
class KeptVolumes:
    """A contrast of each scan, or its label map, kept as it lies on the Grid: to bring it there takes longer than a step.

    Attributes:
        config: whose prepared folder holds the scans.
        condition: how it is found and read.
        files: by the key of the scan.
        folder: where they are kept.
    """

    config: Config
    condition: Cached
    files: Mapping[str, Path | None]
    folder: Path

    @classmethod
    def of(cls, config: Config, condition: Cached, scans: pd.DataFrame) -> "KeptVolumes":
        """Of the scans of a table; InputError as `find_files` raises it."""
        files, keys = find_files(config, condition, scans), list(scans["key"])
        name = f"{condition.name}-{fingerprint(config, condition, files, keys)}"
        return cls(config, condition, dict(zip(keys, files)), config.prepared_folder / name)

    def __contains__(self, key: str) -> bool:
        return self.files.get(key) is not None

    def __call__(self, key: str) -> NDArray:
        """Of a scan, by its key: (C, X, Y, Z) float32 in [0, 1]; NaN where it has none."""
        path = self.folder / f"{checked_name(key, 'key')}.npy"
        if key in self and path.is_file():
            return np.load(path).astype(np.float32)
        volume = load_condition(self.config, self.condition, self.files, key)
        if key in self:
            buffer = io.BytesIO()
            np.save(buffer, volume.astype(np.float16))
            self.folder.mkdir(exist_ok=True)
            write_atomic(path, buffer.getvalue())
            volume = volume.astype(np.float16).astype(np.float32)
        return volume
