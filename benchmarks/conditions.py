"""How near to the truth is what a model makes of an image, on the test split of its config, beside simpler answers?

    python benchmarks/conditions.py CONFIG [--set key=value] [--scans 8] [--steps 12] [--picture FILE.png] [--regression MODEL]

MODEL is one of the same config that was trained for regression alone, for as many steps: all times near pure noise, with
--set output=runs/regression --set diffusion.time_sampling.location=12 --set diffusion.time_sampling.scale=0.01.

The part of `ldm3d evaluate` that is called "beside each person's own truth" (docs/evaluation.md), alone.
"""

import argparse
import json
from pathlib import Path

import torch

from ldm3d import figures
from ldm3d.config.read import load_config
from ldm3d.data.batches import evenly
from ldm3d.data.conditions import ScanImages
from ldm3d.data.preparing import read_scan_table
from ldm3d.evaluation.assess import fit_simpler, given_of
from ldm3d.evaluation.truth import compare_with_truth
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE
from ldm3d.report.sections import truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--regression", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(asked.config, asked.set)
    pipeline, table = Pipeline.from_pretrained(config.model_folder), read_scan_table(config)
    held_out, trained = (table[table["split"] == split].reset_index(drop=True) for split in ("test", "train"))
    images = ScanImages(config, held_out)
    rows, people = pipeline.parse(held_out[pipeline.schema.names].to_dict("records")), list(held_out["subject"])
    some, sampling = evenly(images.complete, asked.scans), pipeline.sampling.replace(steps=asked.steps)
    given = lambda i: given_of(pipeline, images, i)  # noqa: E731
    simpler = fit_simpler(config, trained)
    beside = images.cubic, Pipeline.from_pretrained(asked.regression) if asked.regression else None
    found = compare_with_truth(pipeline, rows, people, images.made, given, some, sampling, simpler, ALONE, *beside)
    print(json.dumps(found.to_dict(), indent=1))
    print(*truth.summary(found), sep="\n")
    if asked.picture:
        figures.save(truth.draw(pipeline, found)["truth"], asked.picture)


if __name__ == "__main__":
    main()
