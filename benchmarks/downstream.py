"""Do volumes drawn from label maps help to train a segmenter, where 10, 20 or 50 people have one?

    python benchmarks/downstream.py CONFIG [--set key=value] [--steps 12] [--sizes 10 20 50] [--seeds 5] [--tested 20]
        [--network voxels] [--training-steps 300] [--painted] [--name downstream-segmentation-cpu]

CONFIG is of a model that makes scans of label maps (configs/conditions/masks-to-brain.yaml), and was trained. Each network is
a perceptron of each voxel's surroundings (`voxel_classifier.py`), which is trained within seconds, or the U-Net of `ldm3d
segmenter` (--network unet), in so many steps. It learns from real scans and their label maps, with every second volume
(`ldm3d.evaluation.segmentation_utility`)

    real                        real, too
    real, mirrored and shifted
    drawn by the model          of a label map, and mirrored and shifted with it
    painted (--painted)         of a label map in random contrasts (as SynthSeg, Billot et al. 2023), turned and scaled

all with random contrast, bias field, blur and noise (`ldm3d.data.augment.vary`); "all real" is trained on everybody whom the
model was trained on. Printed and written: mean Dice over groups of labels, and differences, on people of the test split.
"""

import functools
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from held_out import HeldOut, options
from protocol import RESULTS
from tqdm import tqdm
from voxel_classifier import train_voxel_classifier

from ldm3d.data.conditions import ScanImages
from ldm3d.data.labels import paint_labels
from ldm3d.environment import processor
from ldm3d.evaluation.segmentation_utility import (
    SEEDS,
    SIZES,
    TESTED,
    Second,
    SegmentationUtility,
    labels_of,
    utility_of_model,
)
from ldm3d.training.segmenter import STEPS, train_segmenter


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--tested", type=int, default=TESTED)
    parser.add_argument("--network", choices=("voxels", "unet"), default="voxels")
    parser.add_argument("--training-steps", type=int, default=STEPS, help="of the U-Net")
    parser.add_argument("--painted", action="store_true")
    parser.add_argument("--name", default="downstream-segmentation-cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held = HeldOut.of(asked.config, asked.set)
    condition = labels_of(held.pipeline)
    if condition is None:
        raise SystemExit(f"{asked.config}: its model makes no scans of label maps alone")

    def more(keys: Sequence[str]) -> Mapping[str, Second]:
        files = ScanImages(held.config, held.trained).files[condition.name]
        return {"painted": lambda i, random: paint_labels(held.config, keys[i], files[keys[i]], condition.groups, random)}

    unet = functools.partial(train_segmenter, steps=asked.training_steps)
    train = train_voxel_classifier if asked.network == "voxels" else unet
    sampling = held.pipeline.sampling.replace(steps=asked.steps)
    scans = held.pipeline, held.config, held.trained, held.images.scans
    written = {"model": held.pipeline.model_hash, "processor": processor(), "network": asked.network}
    parts: list[SegmentationUtility] = []
    for seed in tqdm(range(asked.seeds), desc="seeds"):
        further = more if asked.painted else None
        parts.append(utility_of_model(*scans, train, sampling, asked.tested, further, sizes=asked.sizes, seeds=[seed]))
        scores = {key: np.concatenate([part.scores[key] for part in parts]) for key in parts[0].scores}
        found = SegmentationUtility(parts[0].groups, parts[0].people, scores)
        written |= {"sampling_steps": asked.steps, "tested": len(found.people), "seeds": len(parts), "rows": found.to_dict()}
        # After each, for a run that is stopped
        (RESULTS / f"{asked.name}.json").write_text(json.dumps(written, indent=2) + "\n")
    for row in written["rows"]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
