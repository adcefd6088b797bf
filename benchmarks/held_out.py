"""The held-out scans of an experiment whose model is given images: what each is given, what it should become, what is made."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.data.batches import evenly
from ldm3d.data.conditions import ScanImages
from ldm3d.data.preparing import read_scan_table
from ldm3d.evaluation.assess import given_of
from ldm3d.evaluation.truth import one_step
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import Given
from ldm3d.pipeline import Pipeline


def options(description: str | None) -> argparse.ArgumentParser:
    """What scripts on held-out scans take alike: a config with its changes, and steps of sampling."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--steps", type=int, default=12)
    return parser


@dataclass(frozen=True)
class HeldOut:
    """The test split of a config.

    Attributes:
        config: of the experiment; `pipeline`: its model.
        rows: covariates of each held-out scan; `people`: the person of each.
        images: of each scan; `trained`: table of the training's scans.
    """

    config: Config
    pipeline: Pipeline
    rows: list[dict]
    people: list[str]
    images: ScanImages
    trained: pd.DataFrame

    @classmethod
    def of(cls, config: Path | str, changes: Sequence[str] = ()) -> "HeldOut":
        """Of a config that was prepared and trained."""
        loaded = load_config(config, list(changes))
        pipeline, table = Pipeline.from_pretrained(loaded.model_folder), read_scan_table(loaded)
        scans, trained = (table[table["split"] == split].reset_index(drop=True) for split in ("test", "train"))
        rows = pipeline.parse(scans[pipeline.schema.names].to_dict("records"))
        return cls(loaded, pipeline, rows, list(scans["subject"]), ScanImages(loaded, scans), trained)

    def some(self, count: int) -> list[int]:
        """Scans that lack nothing, evenly chosen."""
        return evenly(self.images.complete, count)

    def given(self, i: int) -> Given:
        """The images of a scan."""
        return given_of(self.pipeline, self.images, i)

    def truth(self, i: int) -> NDArray:
        """What should be made of a scan, (C, X, Y, Z)."""
        return self.pipeline.cropped(self.images.made(i))

    def reconstructed(self, i: int) -> NDArray:
        """The truth through the autoencoder."""
        volume = torch.from_numpy(self.images.made(i))[None]
        return self.pipeline.cropped(self.pipeline.reconstruct(volume)[0].cpu().numpy())

    def drawn(self, i: int, samples: int, steps: int, asked: Sequence[str] | None = None) -> NDArray:
        """Samples of a scan, (S, C, X, Y, Z); of its covariates only those that are named, by default all."""
        given, first = self._given(self.pipeline, i), i * samples
        sampling, row = self.pipeline.sampling.replace(steps=steps), self.rows[i]
        row = row if asked is None else {name: value if name in asked else None for name, value in row.items()}
        return np.stack([*given.volumes([row] * samples, sampling, numbers=range(first, first + samples))])

    def regressed(self, pipeline: Pipeline, i: int) -> NDArray:
        """One step of a network from noise, (C, X, Y, Z)."""
        return one_step(self._given(pipeline, i), self.rows[i], i)

    def _given(self, pipeline: Pipeline, i: int) -> Pipeline:
        known = self.given(i)
        return pipeline.given(Images(pipeline.conditions, lambda number: known, {"evaluation": "held-out"}, None))
