"""Templates of generated brains against means of real ones of the same age, and how sharp they are.

    python benchmarks/atlas.py MODEL TABLE [--ages 30 55 80] [--volumes 24] [--within 6] [--ask source=rendered]
        [--rounds 2] [--spread 1] [--name NAME] [--picture FILE]

TABLE has path, age and covariates of people. Those within so many years of an age, as many as volumes at most, are placed on
the model's Grid. Reported for each age:

- ssim: of the mean of generated volumes with the mean of these people, beside that of two halves of the people, and that with
  the people of the next age in the list: what chance and ageing make of it. In the brain. "sharp": of both mean shapes.
- volumes: measured on generated volumes, their mean, and the 95% interval of the people's (bootstrap of both).
- sharpness: power of the gradient relative to the average one of single volumes, of the plain mean and of the mean shape.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import protocol
import torch
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.applications.atlas import Template, template_of
from ldm3d.applications.placed import place
from ldm3d.metrics.reconstruction import ssim
from ldm3d.pipeline import Pipeline
from ldm3d.precision import NAMES, dtype
from ldm3d.rulers.volumetry import apply_measure, load_measure

BRAIN = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", choices=NAMES, default="float32", help="of the networks")
    parser.add_argument("table", type=Path)
    parser.add_argument("--ages", nargs="+", type=float, default=[30.0, 55.0, 80.0])
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--within", type=float, default=6.0)
    parser.add_argument("--ask", nargs="*", default=[], metavar="NAME=VALUE", help="of all generated volumes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--spread", type=float, help="of sampling; by default the model's")
    parser.add_argument("--name", help="writes results/atlas-NAME-DEVICE.json")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(arguments.model, "cpu", dtype(arguments.precision, "cpu"))
    sampling = pipe.sampling.replace(spread=arguments.spread)
    measure = load_measure("ldm3d.rulers.volumetry:measure_volumes")
    spacing, fixed = pipe.grid.spacing_mm, dict(pair.split("=", 1) for pair in arguments.ask)
    frame = pd.read_csv(arguments.table)
    if "source" in frame and "source" in fixed:
        frame = frame[frame["source"] == fixed["source"]]
    sets: dict[str, list[tuple[list[NDArray], Template, float]]] = {"real": [], "generated": []}
    for age in arguments.ages:
        near = frame[(frame["age"] - age).abs() <= arguments.within].head(arguments.volumes)
        real = [place(pipe, path).volume[0, 0].numpy() for path in near["path"]]
        # The ages of the people, so that both sets have the same; the same noise at all ages, as atlases have it
        rows = pipe.parse([{**fixed, "age": float(near["age"].iloc[i % len(near)])} for i in range(arguments.volumes)])
        start = time.process_time()
        made = [volume[0] for volume in pipe.volumes(rows, sampling)]
        drawn = time.process_time() - start
        for name, volumes in (("real", real), ("generated", made)):
            start = time.process_time()
            found = template_of(lambda volumes=volumes: volumes, arguments.rounds)
            sets[name].append((volumes, found, time.process_time() - start))
        print(f"age {age:g}: {len(real)} people, {len(made)} generated in {drawn:.0f} s of CPU", flush=True)
    rows_out = []
    for k, age in enumerate(arguments.ages):
        (real, of_real, _), (made, of_made, seconds) = sets["real"][k], sets["generated"][k]
        other = sets["real"][k + 1 if k + 1 < len(arguments.ages) else k - 1][1]
        halves = [np.mean(real[start::2], axis=0) for start in (0, 1)]
        row = {
            "age": age,
            "people": len(real),
            "generated": len(made),
            "ssim": _ssim(of_made.mean, of_real.mean),
            "ssim_halves": _ssim(*halves),
            "ssim_next_age": _ssim(of_made.mean, other.mean),
            "ssim_sharp": _ssim(of_made.best, of_real.best),
            "ssim_sharp_next_age": _ssim(of_made.best, other.best),
            "sharpness": {
                name: [round(_rough(each) / np.mean([_rough(v) for v in volumes]), 3) for each in (found.mean, found.best)]
                for name, (volumes, found, _) in (("real", sets["real"][k]), ("generated", sets["generated"][k]))
            },
            "template_seconds": round(seconds, 1),
            "volumes": _volumes(real, made, of_made, measure, spacing),
        }
        rows_out.append(row)
        print(json.dumps(row), flush=True)
    if arguments.name:
        about = {"model": pipe.model_hash, "precision": str(pipe.dtype), "rounds": arguments.rounds, "spread": sampling.spread}
        protocol.write(
            f"atlas-{arguments.name}",
            [{**about, **row} for row in rows_out],
        )
    if arguments.picture:
        shown, titles = [], []
        for k, age in enumerate(arguments.ages):
            for name, words in (("generated", "generated"), ("real", "held out")):
                volumes, found, _ = sets[name][k]
                shown += [volumes[0][None], found.mean[None], found.best[None]]
                titles += [f"{age:g} years, {words}: one", f"mean of {len(volumes)}", "mean shape"]
        figures.save(figures.mosaic(shown, titles, spacing, columns=3), arguments.picture)


def _ssim(one: NDArray, other: NDArray) -> float:
    pair = [torch.from_numpy(np.ascontiguousarray(each))[None, None].float() for each in (one, other)]
    return round(float(ssim(*pair, where=(pair[0] > BRAIN) | (pair[1] > BRAIN))), 4)


def _rough(volume: NDArray) -> float:
    return float(sum(np.square(np.diff(volume, axis=axis)).sum() for axis in range(3)))


def _volumes(real: list[NDArray], made: list[NDArray], template: Template, measure, spacing) -> dict[str, dict]:
    """Means, and the interval of the difference of two sets of people: is the generated mean within it?"""
    of_real, of_made = (pd.DataFrame([apply_measure(measure, v[None], spacing) for v in each]) for each in (real, made))
    random, found = np.random.default_rng(0), {}
    of_template = apply_measure(measure, template.best[None], spacing)
    for name in of_real:
        draws = [random.choice(of[name], (2000, len(of))).mean(axis=1) for of in (of_real, of_made)]
        low, high = np.quantile(draws[1] - draws[0], [0.025, 0.975])
        found[name] = {
            "real": round(float(of_real[name].mean()), 1),
            "generated": round(float(of_made[name].mean()), 1),
            "difference_interval": [round(float(low), 1), round(float(high), 1)],
            "within": bool(low <= 0 <= high),
            "template": round(float(of_template[name]), 1),
        }
    return found


if __name__ == "__main__":
    main()
