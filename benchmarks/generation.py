"""Generating datasets: volumes a second by group, threads and processes, memory over a long series, and what a resume costs.

    python benchmarks/generation.py [--quick] [--volumes 48] [--long 10000]

The networks are those of configs/toy.yaml with random weights, which changes neither time nor memory. Memory is the peak of a
process that writes one series after 100, 1,000, ... volumes, on a grid of 16x16x16 so that 10,000 take minutes.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from protocol import device, memory_of, summarise, time_in_turns, write
from torch import nn

from ldm3d.config.read import load_config
from ldm3d.description import Sampling
from ldm3d.diffusion.schedules import make_process
from ldm3d.generation.run import generate
from ldm3d.geometry import Grid
from ldm3d.models.pretrained import make_network
from ldm3d.pipeline import Pipeline
from ldm3d.processes import Processes

CONFIG = Path(__file__).parents[1] / "configs" / "toy.yaml"
GROUPS, THREADS, STEPS = (1, 2, 4, 8), (1, 2), 2
DATASETS = ((1, 1, 4), (1, 8, 4), (2, 8, 4), (1, 8, 1), (1, 8, 8))  # processes, batch size, group
LONG_SHAPE = (16, 16, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 volumes and 1,000")
    parser.add_argument("--volumes", type=int, default=48, help="of a dataset")
    parser.add_argument("--long", type=int, default=10_000, help="of the series whose memory is watched")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(share(**arguments.task)))
        return
    volumes, long = (16, 1000) if arguments.quick else (arguments.volumes, arguments.long)
    rows: list[dict] = []
    for row in itertools.chain(sampling(), datasets(volumes), memory(long)):
        rows.append(row)
        figures = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(", ".join(figures), flush=True)
        write("generation", rows)
    print(write("generation", rows))


def toy(shape: tuple[int, ...] | None = None) -> Pipeline:
    """The toy experiment's model with random weights."""
    torch.manual_seed(0)
    config = load_config(CONFIG)
    schema, stage = config.schema(), config.diffusion
    autoencoder = make_network("Autoencoder", in_channels=1, **config.autoencoder.network.model_dump())
    channels = {"in_channels": autoencoder.latent_channels, "out_channels": autoencoder.latent_channels}
    unet = make_network("UNet", **channels, num_categories=schema.num_categories, **stage.network.model_dump())
    for network in (autoencoder, unet):
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.05)
        network.to(device()).eval().requires_grad_(False)
    grid = Grid.centred(shape or config.data.grid.shape, config.data.grid.spacing_mm)
    process = make_process(**stage.process.model_dump(exclude_none=True))
    return Pipeline(autoencoder, unet, schema, grid, process, stage.target, Sampling(**config.generation.model_dump()))


def sampling() -> Iterator[dict]:
    """Seconds of `STEPS` steps for a volume, and of its decode, by volumes that the U-Net takes together and threads."""
    pipeline = toy()
    settings = pipeline.sampling.replace(steps=STEPS)
    requests = pipeline.parse([{"age": 30 + i} for i in range(max(GROUPS))])
    latent = pipeline.latents(requests[:1], pipeline.sampling, [0])

    def sampled(group: int, threads: int) -> None:
        torch.set_num_threads(threads)
        for start in range(0, len(requests), group):
            pipeline.latents(requests[start : start + group], settings, range(start, start + group))

    def decoded(threads: int) -> None:
        torch.set_num_threads(threads)
        pipeline.decode(latent)

    threads = THREADS if device().type == "cpu" else THREADS[:1]
    sides = {f"{g} {t}": lambda g=g, t=t: sampled(g, t) for g in GROUPS for t in threads}
    sides |= {f"decode {t}": lambda t=t: decoded(t) for t in threads}
    for name, seconds in time_in_turns(sides, 2).items():
        what, count = name.split()
        each = seconds if what == "decode" else [value / len(requests) for value in seconds]
        kind = {"what": "decode"} if what == "decode" else {"what": "sample", "group": int(what)}
        yield {**kind, "threads": int(count), **summarise(each)}


def datasets(volumes: int) -> Iterator[dict]:
    """Whole datasets on disk by several processes, and the same again where all is finished."""
    with tempfile.TemporaryDirectory() as name:
        toy().save_pretrained(Path(name) / "model")
        for processes, batch_size, group in DATASETS:
            out = str(Path(name) / f"{processes}-{batch_size}-{group}")
            kind = {"processes": processes, "batch_size": batch_size, "group": group, "volumes": volumes}
            task = {"model": f"{name}/model", "out": out, "volumes": volumes, "batch_size": batch_size, "group": group}
            task |= {"world": processes, "meeting": tempfile.mkdtemp(dir=name)}
            commands = [[sys.executable, __file__, "--task", json.dumps({**task, "rank": r})] for r in range(processes)]
            running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
            said = [json.loads(process.communicate()[0].strip().splitlines()[-1]) for process in running]
            for what in said[0]:
                seconds = max(found[what] for found in said)
                yield {"what": what, **kind, "seconds": seconds, "volumes_per_second": volumes / seconds}


def share(
    model: str, out: str, volumes: int, batch_size: int, group: int, rank: int, world: int, meeting: str
) -> dict[str, float]:
    """One process's share of a dataset, and of looking at it again; the clock runs from when all processes are ready."""
    pipeline = Pipeline.from_pretrained(model)
    pipeline.group = group
    rows = pipeline.parse([{"age": 20 + i % 60} for i in range(volumes)])
    list(pipeline.volumes(rows[:1], pipeline.sampling))
    Path(meeting, str(rank)).touch()
    while len(list(Path(meeting).iterdir())) < world:
        time.sleep(0.01)
    seconds = {}
    for what, read in (("generate", True), ("check", True), ("check sizes", False)):
        start = time.perf_counter()
        generate(pipeline, out, rows, pipeline.sampling, batch_size, Processes(rank, world), read)
        seconds[what] = time.perf_counter() - start
    return seconds


def memory(volumes: int) -> list[dict]:
    """Memory of this process while it writes a long series."""
    pipeline, rows = toy(LONG_SHAPE), []
    requests = pipeline.parse([{"age": 20 + i % 60} for i in range(volumes)])
    marks, start = [10**k for k in range(2, 9) if 10**k <= volumes], time.perf_counter()

    def look(finished: int, _volumes: int) -> None:
        if finished in marks:
            now = {"resident_gb": memory_of("self", "VmRSS"), "peak_gb": memory_of("self", "VmHWM")}
            rows.append({"what": "memory", "volumes": finished, **now, "seconds": time.perf_counter() - start})

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    with tempfile.TemporaryDirectory() as folder:
        generate(pipeline, Path(folder) / "out", requests, pipeline.sampling.replace(steps=1, guidance=1.0), progress=look)
    return rows


if __name__ == "__main__":
    main()
