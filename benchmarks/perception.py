"""Do single samples of a model that is given images look like the truth, where a regression's answer is too smooth?

    python benchmarks/perception.py CONFIG [--set key=value] [--num 60] [--steps 12] [--regression MODEL] [--segmenter MODEL]
        [--classifier sample regression]

Of held-out scans of the config's test split: Fréchet distance of standardised features to the true volumes (random ones, and
those of a segmenter), and with --classifier the area under the ROC curve of one against reconstructions of the truth. In turn:
reconstructions, one sample of each scan, one step of the same network, and of a network for regression (see conditions.py).

Where the scan is given in a lower resolution: how far what is measured of each is from what is given, which has noise.

Where a label map is given: Dice of the labels that the segmenter finds, with those that were given; on the truth, too.
"""

import json
from pathlib import Path

import numpy as np
import torch
from held_out import HeldOut, options
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.config.conditions import LabelsCondition
from ldm3d.metrics.anatomy import dice
from ldm3d.metrics.discriminability import classifier_auc
from ldm3d.metrics.distances import frechet_distance
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.pipeline import Pipeline
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.shipped import segmenter_folder


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--num", type=int, default=60)
    parser.add_argument("--regression", type=Path)
    parser.add_argument("--segmenter")
    parser.add_argument("--classifier", nargs="*", default=[], metavar="KIND", help="such as sample: minutes for each")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    held = HeldOut.of(asked.config, asked.set)
    some = held.some(asked.num)
    makers = {
        "truth": held.truth,
        "reconstruction": held.reconstructed,
        "sample": lambda i: held.drawn(i, 1, asked.steps)[0],
        "one step": lambda i: held.regressed(held.pipeline, i),
    }
    if asked.regression:
        other = Pipeline.from_pretrained(asked.regression)
        makers["regression"] = lambda i: held.regressed(other, i)
    volumes = {kind: np.stack([make(i) for i in tqdm(some, desc=kind)]) for kind, make in makers.items()}
    distances(volumes, asked.segmenter)
    reconstructed = torch.from_numpy(volumes["reconstruction"])
    for kind in asked.classifier:
        print(f"AUC against reconstructions, {kind}: {classifier_auc(reconstructed, torch.from_numpy(volumes[kind])):.3f}")
    consistency(held, some, volumes)
    maps = [each for each in held.config.given_conditions if isinstance(each, LabelsCondition)]
    if asked.segmenter and maps:
        overlaps(held, maps[0], some, volumes, Segmenter.from_pretrained(asked.segmenter))


def distances(volumes: dict[str, NDArray], segmenter: str | None) -> None:
    for name in ("random", *([f"segmenter:{segmenter_folder(segmenter)}"] if segmenter else [])):
        features = {kind: extract(each, load_extractor(name)) for kind, each in volumes.items()}
        found = {
            k: round(frechet_distance(*standardise(features["truth"], f)), 1) for k, f in features.items() if k != "truth"
        }
        print(f"distance to the truth, {name.partition(':')[0]} features: {json.dumps(found)}", flush=True)


def consistency(held: HeldOut, some: list[int], volumes: dict[str, NDArray]) -> None:
    """How far an answer, measured as the scan was, is from what was given: root mean square error relative to it."""
    for kind, made in volumes.items():
        errors = []
        for i, volume in zip(some, made):
            for each in held.images.coarse(i).values():
                left = each.linear(torch.from_numpy(volume)) - each.values
                errors.append(float(left.norm() / each.values.norm()))
        if errors:
            print(f"error of what is measured of it, {kind}: {100 * np.mean(errors):.2f} %", flush=True)


def overlaps(held: HeldOut, maps: LabelsCondition, some: list[int], volumes: dict[str, NDArray], segmenter: Segmenter) -> None:
    """Dice with the labels that were given, of groups that share at least half of their labels."""
    groups, number = list(maps.groups), {}
    for k, labels in enumerate(segmenter.network.groups.values(), start=1):
        shared = [len({*labels} & {*own}) / len({*labels} | {*own}) for own in maps.groups.values()]
        number[k] = int(np.argmax(shared)) + 1 if max(shared) >= 0.5 else 0
    compared = [groups[n - 1] for n in sorted({*number.values()} - {0})]
    given = [_classes(held.pipeline.cropped(held.images.given(i)[0][maps.name].numpy())) for i in some]
    for kind, made in volumes.items():
        seen = [np.vectorize(lambda k: number.get(k, 0))(segmenter.classes(volume)).astype(np.uint8) for volume in made]
        each = [dice(a, b, groups) for a, b in zip(seen, given)]
        found = {name: round(float(np.nanmean([row[name] for row in each])), 3) for name in compared}
        print(f"Dice with the labels given, {kind}: {json.dumps(found)}", flush=True)


def _classes(shares: NDArray) -> NDArray:
    """Shares of the groups (G, X, Y, Z) -> the class that fills most of each voxel, the background included."""
    return np.concatenate([1 - shares.sum(axis=0, keepdims=True), shares]).argmax(axis=0).astype(np.uint8)


if __name__ == "__main__":
    main()
