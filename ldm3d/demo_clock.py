"""How long a demo takes on this machine: expected, from a few steps of each part, and measured."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ldm3d.config.sections import Config
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.phantoms import make_phantom
from ldm3d.data.placing import grid_of
from ldm3d.data.preparing import prepare
from ldm3d.description import Sampling
from ldm3d.diffusion.schedules import make_process
from ldm3d.metrics.features import RandomFeatures, extract
from ldm3d.models.pretrained import make_network
from ldm3d.pipeline import Pipeline
from ldm3d.precision import bf16_is_fast, dtype
from ldm3d.processes import cores, own_device
from ldm3d.rulers.volumetry import apply_measure, measure_volumes
from ldm3d.training.linear_path import BATCH
from ldm3d.training.losses import kl_divergence
from ldm3d.training.optimizer import make_optimizer
from ldm3d.training.volumes import MAX_VALIDATION

# In units of the time to start Python with PyTorch: a command; one that a launcher starts; splits, bootstraps and plots
START, LAUNCH, STATISTICS = 0.9, 2.0, 4.5


class Clock:
    """Expected and measured seconds of parts.

    Args:
        expected: part -> seconds.
        now: the clock.
    """

    def __init__(self, expected: Mapping[str, float], now: Callable[[], float] = time.monotonic):
        self.expected, self.now, self.took = dict(expected), now, {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what is done within as this part."""
        start = self.now()
        yield
        self.took[name] = self.now() - start

    def announce(self) -> str:
        """The expected time of all parts."""
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.expected.items())
        return f"this will take about {minutes(sum(self.expected.values()))} here: {parts}"

    def summary(self) -> str:
        """Measured times of the parts that ran, beside the expected ones where there are any."""
        took = {**self.took, "together": sum(self.took.values())}
        expected = {**self.expected, "together": sum(self.expected.get(name, 0.0) for name in self.took)}
        rows = [f"  {name:32} {seconds:6.0f} s" for name, seconds in took.items()]
        if self.expected:
            rows = [f"{row}   expected {expected[name]:6.0f} s" for name, row in zip(took, rows)]
        return "\n".join(rows)


def minutes(seconds: float) -> str:
    """In words, to the half minute; long times to the minute."""
    halves = max(1, round(seconds / 30)) if seconds < 1200 else 2 * round(seconds / 60)
    return f"{halves / 2:g} minute{'' if halves == 2 else 's'}"


def expected_seconds(config: Config, subjects: int, held_out: int, generated: int, swept: int, drawn: int) -> dict[str, float]:
    """Seconds of each part of a demo, from a few steps of each on this machine.

    Args:
        config: its experiment.
        subjects, held_out: of the toy dataset, in all and for the evaluation.
        generated, swept: volumes of the evaluation; drawn: of the mosaic.
    """
    unit = seconds_of(lambda: subprocess.run([sys.executable, "-c", "import ldm3d.training.diffusion"], check=True))
    start, launch = START * unit, LAUNCH * unit
    phantom, scan = _data_seconds(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    units = training_seconds(config)
    volume, again, measured = _evaluation_seconds(config)
    torch.set_num_threads(threads)
    share = config.data.splits
    validated, trained = round(subjects * share.validation), round(subjects * (1 - share.validation - share.test))
    stages = stage_seconds(config, subjects, trained, validated, units, again)
    return {
        "toy brains": start + subjects * phantom,
        "prepare": start + subjects * scan,
        "train the autoencoder": launch + stages["train the autoencoder"],
        "encode": start + stages["encode"],
        "train the diffusion model": launch + stages["train the diffusion model"],
        "generate a sweep": start + drawn * volume[1],
        "evaluate": STATISTICS * unit + held_out * (again + 2 * measured) + (generated + swept) * (volume[0] + measured),
    }


def stage_seconds(
    config: Config, scans: int, trained: int, validated: int, units: tuple[float, float, float, float], again: float
) -> dict[str, float]:
    """Seconds of both trainings and of encoding, without the start of their processes.

    Args:
        config: of the experiment.
        scans, trained, validated: how many there are in all, and in which split.
        units: of `training_seconds`.
        again: seconds to reconstruct a volume.
    """
    linear, step_1, step_2, encode = units
    one, two = config.autoencoder, config.diffusion
    scored = min(MAX_VALIDATION, validated) * -(-one.training.steps // one.training.validate_every)
    return {
        "train the autoencoder": one.linear_path_steps * linear
        + one.training.steps * step_1
        + 2 * scored * again
        + trained * encode,
        "encode": scans * encode,
        "train the diffusion model": two.training.steps * step_2,
    }


def drawing_seconds(model: str, count: int) -> float:
    """Seconds to load a model and to generate `count` volumes with it, from one sampling step and three."""
    start = time.perf_counter()
    pipeline = Pipeline.from_pretrained(model)
    load = time.perf_counter() - start
    requests = pipeline.parse([{}] * count)

    def seconds(steps: int) -> float:
        sampling = pipeline.sampling.replace(steps=steps)
        return shortest_seconds_of(lambda: list(pipeline.volumes(requests, sampling)), 2)

    one = seconds(1)
    return load + one + (seconds(3) - one) / 2 * (pipeline.sampling.steps - 1)


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():  # which returns before the GPU has finished
        torch.cuda.synchronize()
    return time.perf_counter() - start


def shortest_seconds_of(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest call after a warm-up: other programs on the same cores slow single calls."""
    work()
    return min(seconds_of(work) for _ in range(repeats))


def _data_seconds(config: Config) -> tuple[float, float]:
    """Seconds to make a phantom and to prepare one, with all cores at work."""
    count = 6
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        phantom = seconds_of(lambda: write_dataset(data, count, config.data.grid.shape, workers=1)) / count
        source = config.data.model_copy(update={"bids": data})
        experiment = config.model_copy(update={"data": source, "output": Path(folder) / "run"})
        scan = seconds_of(lambda: prepare(experiment, workers=1)) / count
    return phantom / cores(), scan / cores()


def training_seconds(config: Config, repeats: int = 5) -> tuple[float, float, float, float]:
    """Seconds of a step of the linear path (0 without one), of stage 1 and of stage 2, and of encoding one scan."""
    device = own_device()
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16_is_fast(device))
    network, training = config.autoencoder.network, config.autoencoder.training
    model = make_network("Autoencoder", **network.model_dump()).to(device)
    optimizer = make_optimizer(model, training)
    volumes = torch.rand(training.batch_size, model.in_channels, *config.data.grid.shape, device=device)
    latent = model.latent_shape(config.data.grid.shape)
    noise = torch.randn(training.batch_size, *latent, device=device)

    def linear_step() -> None:
        with autocast:
            again = model.through_linear_path(volumes[:BATCH])
        (again.float() - volumes[:BATCH]).square().mean().backward()
        model.zero_grad()

    def step_1() -> None:
        with autocast:
            made, moments = model(volumes, noise)
        ((made.float() - volumes).square().mean() + kl_divergence(moments)).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def encode() -> None:
        model.to(dtype=dtype("auto", device)).encode(volumes.to(dtype("auto", device)))

    unet = make_unet(config, latent[0]).to(device)
    unet_optimizer = make_optimizer(unet, config.diffusion.training)
    size = config.diffusion.training.batch_size
    padded = config.diffusion.channels(latent[0])["in_channels"], *unet.padded_shape(latent[1:])
    z, times = torch.randn(size, *padded, device=device), torch.full((size,), 500.0, device=device)

    def step_2() -> None:
        with autocast:
            output = unet(z, times)
        (output.float() - z[:, : latent[0]]).square().mean().backward()
        unet_optimizer.step()
        unet_optimizer.zero_grad()

    linear = shortest_seconds_of(linear_step, repeats) if network.linear_path else 0.0
    found = [shortest_seconds_of(work, repeats) for work in (step_1, step_2, encode)]
    return linear, found[0], found[1], found[2] / training.batch_size


def _evaluation_seconds(config: Config) -> tuple[tuple[float, float], float, float]:
    """Seconds to generate a volume with all threads and with one, to reconstruct one, and to measure one."""
    device, grid = own_device(), grid_of(config.data.grid)
    autoencoder = make_network("Autoencoder", **config.autoencoder_arguments).eval()
    unet, process = make_unet(config, autoencoder.latent_channels).eval(), make_process("flow")
    sampling = Sampling(**config.generation.model_dump())
    pipeline = Pipeline(autoencoder, unet, config.schema(), grid, process, config.diffusion.target, sampling)
    pipeline.to(device, dtype("auto", device))
    volume = torch.from_numpy(make_phantom(grid.shape, grid.spacing_mm[0])[0] / 1000)
    seconds = []
    requests = pipeline.parse([{}] * pipeline.group_size)
    for threads in (None, 1):
        pipeline.threads = threads
        seconds.append(shortest_seconds_of(lambda: list(pipeline.volumes(requests, sampling)), 2) / pipeline.group_size)
    again = shortest_seconds_of(lambda: pipeline.reconstruct(volume[None].to(device)))
    features, array = RandomFeatures(), volume.numpy()
    measured = shortest_seconds_of(
        lambda: (apply_measure(measure_volumes, array, grid.spacing_mm), extract([array], features, device)), 2
    )
    return (seconds[0], seconds[1]), again, measured


def make_unet(config: Config, channels: int) -> torch.nn.Module:
    """The U-Net of stage 2."""
    of_data = {**config.diffusion.channels(channels), "num_categories": config.schema().num_categories}
    return make_network("UNet", **of_data, **config.diffusion.network.model_dump())
