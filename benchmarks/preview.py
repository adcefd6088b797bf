"""What the page of `ldm3d serve` shows while a slider moves: how soon, and how near to the full volume after it.

    python benchmarks/preview.py [MODEL ...] [--repeats 10] [--steps 4 8 12]

Through the page's own `Studio`, as its requests go: sampling in a batch of one (the full volume: in the whole batch, as a call
in Python), decoding, and the packed file, with one thread. Another seed each time, so that nothing is kept from before.

    seconds    median and range
    cpu        computing time, which other work on the machine does not lengthen
    off        distance to the full volume of the same seed, as a share of that between full volumes of different seeds; root
               mean square over voxels that are not background, mean over seeds
    itself     share of previews to which the full volume of their own seed is the nearest of all
"""

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from protocol import device, summarise, write

from ldm3d.data.nifti import unpack_volume
from ldm3d.pipeline import Pipeline
from ldm3d.precision import dtype
from ldm3d.serve.asked import Asked
from ldm3d.serve.studio import Job, Studio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["brains-4.5mm", "brains-3mm"])
    parser.add_argument("--repeats", type=int, default=10, help="seeds")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12], help="of previews")
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        studio = Studio(Pipeline.from_pretrained(model, device(), dtype("auto", str(device()))), model)
        rows += measured(studio, arguments.repeats, arguments.steps)
        studio.close()
    print(f"{'model':14} {'volume':8} {'steps':>5} {'seconds':>8} {'(range)':>14} {'cpu':>6} {'off':>6} {'itself':>7}")
    for row in rows:
        seconds = row["seconds"]
        around = f"({seconds['min']:.2f} to {seconds['max']:.2f})"
        print(
            f"{Path(row['model']).name:14} {row['volume']:8} {row['steps']:5} {seconds['median']:8.2f} {around:>14} "
            f"{row['cpu_seconds']['median']:6.2f} {row['off']:6.2f} {row['itself']:7.0%}"
        )
    write("preview", rows)


def measured(studio: Studio, repeats: int, previews: list[int]) -> list[dict]:
    """A row for each number of steps, in turns; the last is the full volume."""
    sampling = studio.pipeline.sampling
    middle = studio.pipeline.schema.parse(studio.pipeline.schema.middle())
    kinds = [*((steps, True) for steps in previews), (sampling.steps, False)]
    taken: dict = {kind: [] for kind in kinds}
    made: dict = {kind: [] for kind in kinds}
    for seed in range(repeats + 1):
        for steps, coarse in kinds:
            asked = Asked(tuple(middle.items()), sampling.replace(steps=steps, seed=seed), coarse)
            wall, computing = time.perf_counter(), time.process_time()
            content = studio.submit(asked, Job(600)).result()
            if seed:  # the first warms up
                taken[steps, coarse].append((time.perf_counter() - wall, time.process_time() - computing))
                made[steps, coarse].append(unpack_volume(content))
    full = np.stack(made[kinds[-1]])
    inside = full.mean(axis=0) > 0.1
    own = ~np.eye(repeats, dtype=bool)
    between = distances(full[:, inside], full[:, inside])[own].mean()
    rows = []
    for kind in kinds:
        off = distances(np.stack(made[kind])[:, inside], full[:, inside])
        about = {"model": studio.name, "volume": "preview" if kind[1] else "full", "steps": kind[0]}
        times = {"seconds": summarise([s for s, _ in taken[kind]]), "cpu_seconds": summarise([s for _, s in taken[kind]])}
        nearest = float((off.argmin(axis=1) == np.arange(repeats)).mean())
        rows.append({**about, **times, "off": float(off.diagonal().mean() / between), "itself": nearest})
    return rows


def distances(one: NDArray, other: NDArray) -> NDArray:
    """Root mean square difference of each of (n, voxels) to each of (m, voxels): (n, m)."""
    return np.sqrt(((one[:, None] - other[None]) ** 2).mean(axis=2))


if __name__ == "__main__":
    main()
