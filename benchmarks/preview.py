"""How long the page of `ldm3d serve` takes for a brain: the coarse preview that follows a slider, and the full volume.

    python benchmarks/preview.py [MODEL ...] [--repeats 10] [--preview-steps 4]

Through the page's own `Studio`, as its requests go: sampling in a batch of one (the full volume: in the whole batch, as a call
in Python), decoding, and the packed file. Another seed each time, so that nothing is kept from before. In turns with
one thread, which gives the volumes of `ldm3d generate`, and with all cores. Median and range; `cpu` is the computing time of
all threads, which other work on the machine does not lengthen.
"""

import argparse
import time
from pathlib import Path

from protocol import device, summarise, write

from ldm3d.pipeline import Pipeline
from ldm3d.precision import dtype
from ldm3d.processes import cores
from ldm3d.serve.asked import Asked
from ldm3d.serve.studio import Job, Studio

KINDS = ("coarse", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["brains-4.5mm", "brains-3mm"])
    parser.add_argument("--repeats", type=int, default=10, help="of the preview; the full volume is made three times")
    parser.add_argument("--preview-steps", type=int, default=4)
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        pipeline = Pipeline.from_pretrained(model, device(), dtype("auto", str(device())))
        studio = Studio(pipeline, model, preview_steps=arguments.preview_steps)
        rows += measured(studio, arguments.repeats)
        studio.close()
    print(f"{'model':14} {'volume':7} {'threads':>7} {'steps':>6} {'seconds':>8} {'(range)':>14} {'cpu':>6}")
    for row in rows:
        seconds, cpu = row["seconds"], row["cpu_seconds"]
        around = f"({seconds['min']:.2f} to {seconds['max']:.2f})"
        about = f"{Path(row['model']).name:14} {row['volume']:7} {row['threads']:7} {row['steps']:6}"
        print(f"{about} {seconds['median']:8.2f} {around:>14} {cpu['median']:6.2f}")
    write("preview", rows)


def measured(studio: Studio, repeats: int) -> list[dict]:
    """A row for each kind of volume and number of threads."""
    sampling, found = studio.pipeline.sampling, {}
    counts = sorted({1, cores()})
    for turn in range(repeats + 1):
        for kind in KINDS:
            if kind == "full" and turn > 3:
                continue
            for threads in counts:
                studio.pipeline.threads = threads
                steps = studio.preview_steps if kind == "coarse" else sampling.steps
                middle = studio.pipeline.schema.parse(studio.pipeline.schema.middle())
                how = sampling.replace(steps=steps, seed=len(counts) * turn + threads)
                asked = Asked(tuple(middle.items()), how, kind == "coarse")
                wall, computing = time.perf_counter(), time.process_time()
                studio.submit(asked, Job(600)).result()
                if turn:  # the first warms up
                    seconds = time.perf_counter() - wall, time.process_time() - computing
                    found.setdefault((kind, threads, steps), []).append(seconds)
    return [
        {
            "model": studio.name,
            "volume": kind,
            "threads": threads,
            "steps": steps,
            "seconds": summarise([wall for wall, _ in values]),
            "cpu_seconds": summarise([computing for _, computing in values]),
        }
        for (kind, threads, steps), values in found.items()
    ]


if __name__ == "__main__":
    main()
