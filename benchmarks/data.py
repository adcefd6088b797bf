"""The volumes that quality is measured on: phantoms, or a BIDS dataset such as rendered brains."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.data.phantoms import make_phantom
from ldm3d.data.preparing import load_prepared, prepare, read_scan_table

CONFIGS = Path(__file__).parents[1] / "configs"
PHANTOMS, HELD_OUT = 320, 40


@dataclass
class Data:
    """Volumes in memory, float16, with their covariates.

    Attributes:
        name: "phantoms" or "brains".
        config: the experiment whose grid they are on.
        train, test: (N, 1, X, Y, Z) in [0, 1].
        train_rows, test_rows: covariates of each.
    """

    name: str
    config: Config
    train: Tensor
    test: Tensor
    train_rows: list[dict]
    test_rows: list[dict]


def load(bids: Path | None, whole_anatomies: bool = True, overrides: Sequence[str] = ()) -> Data:
    """Phantoms on configs/toy.yaml's grid, or the dataset in `bids` on configs/brains-3mm.yaml's.

    With `whole_anatomies`, and where participants.tsv has a column `anatomy` (rendered brains), the last three anatomies are
    held out; else the config's test split is. `overrides` are the config's, as of --set.
    """
    if bids is None:
        config = load_config(CONFIGS / "toy.yaml", overrides)
        made = [make_phantom(config.data.grid.shape, seed=1, index=i) for i in range(PHANTOMS + HELD_OUT)]
        images = np.stack([image for image, _, _ in made])
        images = (images / np.percentile(images, 99.8, axis=(1, 2, 3, 4), keepdims=True)).clip(0, 1)
        rows, held_out = [row for _, _, row in made], np.arange(len(made)) >= PHANTOMS
    else:
        config = load_config(CONFIGS / "brains-3mm.yaml", [f"data.bids={bids}", *overrides])
        with tempfile.TemporaryDirectory() as folder:
            config = config.model_copy(update={"output": Path(folder)})
            prepare(config)
            scans = read_scan_table(config)
            images = np.stack([load_prepared(config, key) for key in scans["key"]])
        rows, held_out = scans[[c.name for c in config.covariates]].to_dict("records"), scans["split"] == "test"
        people = pd.read_csv(bids / "participants.tsv", sep="\t", dtype=str)
        if whole_anatomies and "anatomy" in people:
            anatomy = people.set_index(people["participant_id"].str.removeprefix("sub-"))["anatomy"]
            held_out = scans["subject"].map(anatomy).isin(sorted(set(anatomy))[-3:])
        held_out = held_out.to_numpy()
    volumes, test = torch.from_numpy(images.astype(np.float16)), np.flatnonzero(held_out)[:HELD_OUT]
    train = np.flatnonzero(~held_out)
    name = "brains" if bids else "phantoms"
    return Data(name, config, volumes[train], volumes[test], [rows[i] for i in train], [rows[i] for i in test])
