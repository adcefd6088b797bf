"""Whether the judge of realism sees anatomy on brains: distances of features, and figures of a segmenter, for broken ones.

    python benchmarks/judge.py CONFIG SEGMENTER [--num 60] [--only source=rendered]

Prepared scans of an experiment are divided into two halves. One is left as it is; the other is left, blurred slightly, or
robbed of its anatomy (`tests/broken_brains.py`). Printed are the Fréchet distances of standardised features, random ones and
the segmenter's, and the share of the segmenter's figures (volumes, surfaces, thickness) within the middle 90 % of the first
half. A judge that sees anatomy finds the slight blur best.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from broken_brains import CHANGES

from ldm3d.config.read import load_config
from ldm3d.data.preparing import load_prepared, read_scan_table
from ldm3d.evaluation.anatomy import segment
from ldm3d.metrics.distances import frechet_distance
from ldm3d.metrics.features import extract, load_extractor, standardise
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.shipped import segmenter_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("segmenter", help="a folder of `ldm3d segmenter`, or a model that has one")
    parser.add_argument("--num", type=int, default=60, help="scans of each half")
    parser.add_argument("--only", metavar="NAME=VALUE", help="scans with this value in the table")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    scans = read_scan_table(config)
    if arguments.only:
        name, value = arguments.only.split("=", 1)
        scans = scans[scans[name].astype(str) == value]
    keys = list(scans.drop_duplicates("subject")["key"])[: 2 * arguments.num]
    volumes = [load_prepared(config, key)[0] for key in keys]
    first, second = volumes[::2], volumes[1::2]
    sets = {
        name: [change(volume, np.random.default_rng(i)).astype(np.float32) for i, volume in enumerate(second)]
        for name, change in CHANGES.items()
    }
    print(f"{len(first)} and {len(second)} people")
    for name in ("random", f"segmenter:{segmenter_folder(arguments.segmenter)}"):
        extractor = load_extractor(name)
        real = extract([volume[None] for volume in first], extractor)
        for kind, changed in sets.items():
            features = extract([volume[None] for volume in changed], extractor)
            print(
                f"{name.partition(':')[0]} features, {kind}: {frechet_distance(*standardise(real, features)):.0f}", flush=True
            )

    segmenter = Segmenter.from_pretrained(arguments.segmenter)
    spacing_mm = config.data.grid.spacing_mm
    figures = table([segment(volume, segmenter, spacing_mm).figures for volume in tqdm(first, desc="first half")])
    low, high = np.nanquantile(figures, [0.05, 0.95], axis=0)
    for kind, changed in sets.items():
        found = table([segment(volume, segmenter, spacing_mm).figures for volume in tqdm(changed, desc=kind)])
        within = ((found >= low) & (found <= high)).mean()
        print(f"figures within the middle 90 % of the first half, {kind}: {within:.2f}", flush=True)


def table(figures: list[dict[str, float]]) -> np.ndarray:
    """(volumes, figures)."""
    return np.array([list(each.values()) for each in figures])


if __name__ == "__main__":
    main()
