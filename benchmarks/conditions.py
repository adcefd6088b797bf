"""How near to the truth is what a model makes of an image, on the test split of its config, beside simpler answers?

    python benchmarks/conditions.py CONFIG [--set key=value] [--scans 8] [--steps 12] [--picture FILE.png] [--regression MODEL]

MODEL is one of the same config that was trained for regression alone, for as many steps: all times near pure noise, with
--set output=runs/regression --set diffusion.time_sampling.location=12 --set diffusion.time_sampling.scale=0.01.

The part of `ldm3d evaluate` that is called "beside each person's own truth" (docs/evaluation.md), alone.
"""

import json
from pathlib import Path

import torch
from held_out import HeldOut, options

from ldm3d import figures
from ldm3d.evaluation.assess import fit_simpler
from ldm3d.evaluation.truth import compare_with_truth
from ldm3d.pipeline import Pipeline
from ldm3d.processes import ALONE
from ldm3d.report.sections import truth


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--regression", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held = HeldOut.of(asked.config, asked.set)
    some, sampling = held.some(asked.scans), held.pipeline.sampling.replace(steps=asked.steps)
    simpler = fit_simpler(held.config, held.trained)
    regression = Pipeline.from_pretrained(asked.regression) if asked.regression else None
    of_scans = held.rows, held.people, held.images.made, held.given, some
    found = compare_with_truth(held.pipeline, *of_scans, sampling, simpler, ALONE, held.images.cubic, regression)
    print(json.dumps(found.to_dict(), indent=1))
    print(*truth.summary(found), sep="\n")
    if asked.picture:
        figures.save(truth.draw(held.pipeline, found)["truth"], asked.picture)


if __name__ == "__main__":
    main()
