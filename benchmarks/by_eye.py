"""Held-out and generated brains in random order, for the eye: which are which? The key is printed last.

    python benchmarks/by_eye.py MODEL --data TABLE [--root DIR] [--work DIR] [--num 12] [--seed 0] [--only source=rendered]
        [--out by-eye.png]

TABLE or BIDS folder is as `ldm3d evaluate` takes it; scans that the model has seen are left out. Each generated brain is asked
for with the covariates of one of other held-out people. Scans are shown as the model's Grid holds them.
"""

import argparse
from pathlib import Path

import numpy as np

from ldm3d import figures
from ldm3d.data.preparing import load_prepared
from ldm3d.experiment import scans_by_use
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE
from ldm3d.shipped import model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--work", type=Path, default=Path("by-eye"), help="where scans are prepared")
    parser.add_argument("--num", type=int, default=12, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the order, of who is shown, and of the noise")
    parser.add_argument("--only", metavar="NAME=VALUE", help="people with this value in the table")
    parser.add_argument("--out", type=Path, default=Path("by-eye.png"))
    asked = parser.parse_args()
    model = model_folder(asked.model)
    pipeline = Pipeline.from_pretrained(model)
    config, _, held_out = scans_by_use(model, asked.data, asked.work, asked.root, ALONE, None, [])
    if asked.only:
        name, value = asked.only.split("=", 1)
        held_out = held_out[held_out[name].astype(str) == value]
    rng = np.random.default_rng(asked.seed)
    chosen = held_out.iloc[rng.permutation(len(held_out))[: 2 * asked.num]].reset_index(drop=True)
    shown, others = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    real = [pipeline.cropped(load_prepared(config, key)) for key in shown["key"]]
    rows = pipeline.parse(others[pipeline.schema.names].to_dict("records"))
    generated = [volume.copy() for volume in pipeline.volumes(rows, pipeline.sampling.replace(seed=asked.seed))]
    order, volumes = rng.permutation(len(real) + len(generated)), [*real, *generated]
    titles = [str(n) for n in range(1, len(order) + 1)]
    figures.save(figures.mosaic([volumes[k] for k in order], titles, pipeline.output_grid.spacing_mm, columns=6), asked.out)
    print(f"written to {asked.out}; look at it before you read on" + "\n" * 20)
    print("generated:", *(n for n, k in enumerate(order, 1) if k >= len(real)))


if __name__ == "__main__":
    main()
