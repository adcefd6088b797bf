"""From covariates to volumes: everything a trained experiment needs, in one folder.

FOLDER/pipeline.json        Grid, covariates with their fitted normalisation, process, defaults, versions
FOLDER/autoencoder, unet    config.json and model.safetensors each
"""

import copy
import hashlib
import importlib.metadata
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ldm3d
from ldm3d import precision
from ldm3d.covariates import CovariateSchema, Value
from ldm3d.data.nifti import from_image, to_image
from ldm3d.description import DESCRIPTION, NO_CROP, Sampling, check_parts, read_description
from ldm3d.devices import HostCopy, check_convolutions, computing_alike, described
from ldm3d.diffusion.denoiser import Denoiser, NetworkDenoiser
from ldm3d.diffusion.guidance import EVERYWHERE, classifier_free
from ldm3d.diffusion.process import Process
from ldm3d.diffusion.samplers import sample
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.generation import run
from ldm3d.generation.series import Origin
from ldm3d.geometry import Grid
from ldm3d.memory import Plan, plan_decode, tried
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.conditioning import Conditions
from ldm3d.models.pretrained import weights_hash
from ldm3d.models.streaming import decode_streamed
from ldm3d.models.unet import LatentUNet, cut_to
from ldm3d.randomness import generator

# Positions of latents that keep a network busy: as many volumes go through it together, but no more than the second number.
# Measured on CPUs. For GPUs they are assumed: 8 volumes of 1 mm, 32 of 3 mm; fewer would leave most of one idle
FILL = {"cpu": (8192, 4), "cuda": (2**17, 64)}
AHEAD = {"cpu": 0, "cuda": 1}  # volumes that are decoded while the one before is on its way to the host


@dataclass
class Result:
    """What a pipeline call made.

    Attributes:
        images: nibabel images in the Grid's space, mm, float32 in [0, 1]; marked as synthetic in their headers.
        rows: the covariates asked of each.
    """

    images: list
    rows: list[dict[str, Value]]
    pipeline: "Pipeline" = field(repr=False)
    sampling: Sampling = field(repr=False)

    def save(self, folder: Path | str) -> Path:
        """Write a BIDS derivative dataset; `folder` must be empty or absent, or hold an unfinished part of the same."""
        return self.pipeline.write(folder, map(from_image, self.images), self.rows, self.sampling)


class Pipeline:
    """Autoencoder, U-Net and all that belongs to them.

    Args:
        autoencoder, unet: networks in evaluation mode, on one device. Their weights are frozen: gradients pass through
            `denoiser`, `latents` and `decode` to what they are given, and cost nothing where that asks for none.
        schema: fitted covariates.
        grid: of the volumes.
        process: of the diffusion.
        target: what the U-Net predicts.
        sampling: what calls do unless asked otherwise.
        skull_stripped: whether the volumes are brains without skull; goes into sidecars.
        suffix: BIDS suffix of what was trained on and is written, "T1w" or "FLAIR".
        model_hash: names the weights in what is written; from_pretrained fills it in.
        crop: (before, after) planes of each axis that generated volumes lose after decoding.
        decode_mode: "auto" decodes latents whole or streamed, as memory asks; "whole" and "streamed" do as they say.
        group: volumes that go through the U-Net together; None for what fills it, see `group_size`.
        threads: of the CPU, while volumes are generated; None for as many as PyTorch uses.

    The last three are attributes that can be set later. The last bits of a volume follow from them: kernels add in another
    order for another batch or another number of threads. So batches always have `group` places, filled or not, and the number
    of threads is fixed: a volume is bit-identical alone, in any series and on any number of processes.
    """

    def __init__(
        self,
        autoencoder: LatentSpace,
        unet: LatentUNet,
        schema: CovariateSchema,
        grid: Grid,
        process: Process,
        target: str,
        sampling: Sampling | None = None,
        skull_stripped: bool = False,
        model_hash: str = "unsaved",
        crop: Sequence[Sequence[int]] = NO_CROP,
        decode_mode: str = "auto",
        group: int | None = None,
        threads: int | None = 1,
        suffix: str = "T1w",
    ):
        if any(number is not None and number < 1 for number in (group, threads)):
            raise InputError(f"group {group} and threads {threads} must be at least 1, or None")
        self.autoencoder, self.unet = autoencoder.requires_grad_(False), unet.requires_grad_(False)
        self.schema, self.grid = schema, grid
        self.process, self.target, self.sampling = process, target, sampling or Sampling()
        self.skull_stripped, self.suffix, self.model_hash = skull_stripped, suffix, model_hash
        self.crop = tuple(tuple(planes) for planes in crop)
        self.decode_mode, self.group, self.threads = decode_mode, group, threads
        self.compiled = False
        self._plans: dict[tuple, Plan] = {}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def output_grid(self) -> Grid:
        """The grid of generated volumes: the networks' own without what is cropped."""
        return self.grid.cropped(self.crop)

    @property
    def group_size(self) -> int:
        """Places of a batch: `group`, or what fills the device.

        One volume alone costs a whole batch. On a CPU it is as fast to go one by one where latents are large, and where they
        are small a batch of up to 4 costs little. A GPU takes many at a time, a multiple of 8 of them.
        """
        positions = math.prod(self.autoencoder.latent_shape(self.grid.shape)[1:])
        fill, most = FILL["cpu" if self.device.type == "cpu" else "cuda"]
        size = max(1, min(most, fill // positions))
        return self.group or (size - size % 8 if size > 8 else size)

    @property
    def computing(self) -> dict[str, Any]:
        """What the last bits of a volume follow from beside weights and request."""
        return {
            "device": described(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": (self.threads or torch.get_num_threads()) if self.device.type == "cpu" else None,
            "group": self.group_size,
            "decode": self._plan((1, *self.autoencoder.latent_shape(self.grid.shape)), self.dtype, self.device).mode,
            "compiled": self.compiled,
            "torch": torch.__version__,
        }

    @property
    def origin(self) -> Origin:
        """What a folder of generated volumes has to say of this pipeline."""
        parts = [self.schema.to_dict(), self.process.to_dict(), self.target, self.crop, self.grid.to_dict()]
        parts += [self.suffix] if self.suffix != "T1w" else []  # as in series that were begun before there was another
        settings = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        names = self.mark, self.model_hash, settings
        grid, either = self.output_grid, self.decode_mode == "auto"
        return Origin(grid, self.schema, self.suffix, self.skull_stripped, *names, self.computing, either)

    def decoding(self, mode: str) -> "Pipeline":
        """The same pipeline with this `decode_mode`."""
        other = copy.copy(self)
        other.decode_mode = mode
        return other

    def __repr__(self) -> str:
        grid, sampling = self.output_grid, self.sampling
        sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (self.autoencoder, self.unet)]
        return "\n".join(
            [
                f"Pipeline, model {self.model_hash}",
                f"  volumes   {' x '.join(map(str, grid.shape))} voxels of {' x '.join(f'{s:g}' for s in grid.spacing_mm)} mm",
                *(f"  {'asks for' if i == 0 else '':9} {c.name}: {c.answers}" for i, c in enumerate(self.schema)),
                *([] if len(self.schema) else ["  asks for  nothing: a model without covariates"]),
                f"  diffusion {self.process.kind}, predicts {self.target}",
                f"  sampling  {sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}",
                f"  networks  {sizes[0]:.2f} M parameters (autoencoder), {sizes[1]:.2f} M (U-Net), on {self.device.type}",
            ]
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Move both networks."""
        self.autoencoder.to(device=device, dtype=dtype)
        self.unet.to(device=device, dtype=dtype)
        return self

    def compile(self) -> "Pipeline":
        """Let torch.compile make the U-Net faster: worth its minute from some tens of volumes on.

        On CUDA, sampling then replays CUDA graphs, which takes the launches of single kernels off the host.
        """
        self.compiled = True
        self.unet.compile(mode="reduce-overhead" if self.device.type == "cuda" else None, dynamic=False)
        return self

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the pipeline as a folder of safetensors and JSON."""
        folder = Path(folder)
        self.autoencoder.save_pretrained(folder / "autoencoder")
        self.unet.save_pretrained(folder / "unet")
        versions = {name: importlib.metadata.version(name) for name in ("torch", "monai", "nibabel")}
        description = {
            "ldm3d": ldm3d.__version__,
            "versions": versions,
            "grid": self.grid.to_dict(),
            "covariates": self.schema.to_dict(),
            "process": self.process.to_dict(),
            "target": self.target,
            "sampling": self.sampling.to_dict(),
            "skull_stripped": self.skull_stripped,
            "suffix": self.suffix,
            "crop": self.crop,
            "generates": "synthetic volumes; no patient's data",
        }
        write_atomic(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
        self.model_hash = weights_hash(folder / "autoencoder", folder / "unet")

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Pipeline":
        """Load a pipeline folder.

        Args:
            folder: written by training stage 2 or `save_pretrained`.
            device: None for CUDA where there is one, else the CPU.
            dtype: torch.float32 or torch.bfloat16; None for what is fast on the device, as the command line has it.

        Raises:
            InputError: not such a folder, or a damaged one.
        """
        folder = Path(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or precision.dtype("auto", device)
        if not (folder / DESCRIPTION).is_file():
            raise InputError(f"{folder} holds no model: {DESCRIPTION} is missing; training writes one to OUTPUT/model")
        parts = read_description(folder / DESCRIPTION)
        autoencoder = LatentSpace.from_pretrained(folder / "autoencoder", device, dtype)
        unet = LatentUNet.from_pretrained(folder / "unet", device, dtype)
        check_convolutions(torch.device(device), dtype)
        check_parts(folder, autoencoder, unet, parts["schema"], parts["grid"])
        return cls(autoencoder, unet, model_hash=weights_hash(folder / "autoencoder", folder / "unet"), **parts)

    def __call__(
        self,
        num_volumes: int = 1,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
        ask: Mapping[str, Any] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        spacing: str | None = None,
        seed: int | None = None,
        batch_size: int = 8,
        progress: Callable[[int], None] | None = None,
        **covariates: Any,
    ) -> Result:
        """Generate volumes that show the asked covariates.

        Args:
            num_volumes: how many of the same request.
            rows: instead, one request a volume: a mapping of covariates each.
            ask: covariates as a mapping, for names that are arguments here.
            sampler, steps, guidance, guidance_rescale, guidance_interval, spacing, seed: see `Sampling`; None takes the
                pipeline's own.
            batch_size: volumes sampled before they are decoded; of no influence on what they are.
            progress: called with the number of volumes done.
            covariates: by name; those left out are left open.

        Raises:
            InputError: unknown covariate, category or sampler, value out of range.
        """
        if ask and (twice := ask.keys() & covariates.keys()):
            raise InputError(f"{', '.join(sorted(twice))}: asked twice, in `ask` and by name; keep one")
        covariates |= ask or {}
        if rows is not None and covariates:
            raise InputError("give either `rows` or covariates, not both")
        if num_volumes < 1:
            raise InputError(f"num_volumes is {num_volumes}; ask for at least 1")
        requests = self.parse(rows if rows is not None else [covariates] * num_volumes)
        sampling = self.sampling.replace(
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            spacing=spacing,
            seed=seed,
        )
        images = []
        for volume in self.volumes(requests, sampling, batch_size):
            images.append(to_image(volume, self.output_grid.affine, self.mark))
            if progress:
                progress(len(images))
        return Result(images, requests, self, sampling)

    @property
    def mark(self) -> str:
        """What the header of every written volume says."""
        return f"SYNTHETIC ldm3d {ldm3d.__version__} model {self.model_hash}"

    def parse(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Value]]:
        """Check requests: every covariate as a value or None; a warning for what training never saw.

        Raises:
            InputError: unknown covariate, category or kind of value, or one out of range; of several, with its row.
        """
        rows, requests = list(rows), []
        for number, row in enumerate(rows, start=1):
            try:
                requests.append(self.schema.parse(row))
            except InputError as error:
                raise InputError(f"row {number}: {error}" if len(rows) > 1 else str(error)) from None
        self.schema.warn_beyond_seen(requests)
        return requests

    def volumes(
        self,
        requests: Sequence[Mapping[str, Value]],
        sampling: Sampling,
        batch_size: int = 8,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[NDArray]:
        """Generate volumes (C, X, Y, Z) one by one, on the `output_grid`, float32 in [0, 1]; memory does not grow with them.

        Args:
            requests: from `parse`, one a volume.
            sampling: how.
            batch_size: volumes sampled before they are decoded, rounded up to whole batches of `group_size`.
            numbers: of the requests in their series; None for 0, 1, 2, ...

        Raises:
            InputError: guidance of a model that was trained with no covariate left open, or a spacing that does not fit;
                at once, before the first volume is asked for.
        """
        self.check_sampling(sampling)
        return self._volumes(requests, sampling, batch_size, range(len(requests)) if numbers is None else numbers)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise InputError where this model cannot be sampled so; see `volumes`."""
        if self.schema.required and sampling.guidance != 1:
            raise InputError(
                f"guidance {sampling.guidance:g}: this model was trained with no covariate left open, so there is no "
                "unconditional answer to guide away from; use guidance 1"
            )
        if sampling.spacing is not None:
            self.process.times(sampling.steps, sampling.spacing)

    def _volumes(
        self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, batch_size: int, numbers: Sequence[int]
    ) -> Iterator[NDArray]:
        groups = list(grouped(numbers, self.group_size))
        at_once = -(-batch_size // self.group_size)
        for start in range(0, len(groups), at_once):
            latents: list[Tensor] = []
            for places in groups[start : start + at_once]:
                with self._computing_alike():
                    latents += self._group([requests[k] for k in places], [numbers[k] for k in places], sampling)
            for volume in self._decoded(latents):
                if not np.isfinite(volume).all():
                    raise InputError(
                        "the model made a volume with NaN in it: its weights are damaged, or bfloat16 is too coarse for them "
                        "(use float32)"
                    )
                yield self.cropped(volume)

    def _decoded(self, latents: Sequence[Tensor]) -> Iterator[NDArray]:
        """Volumes (C, X, Y, Z) of latents (c, x, y, z), one at a time: the decoder is where memory peaks."""
        ahead = AHEAD["cpu" if self.device.type == "cpu" else "cuda"]
        leaving: deque[HostCopy] = deque()
        for latent in latents:
            with self._computing_alike():
                leaving.append(HostCopy(self.decode(latent[None])[0]))
            if len(leaving) > ahead:
                yield leaving.popleft().numpy()
        while leaving:
            yield leaving.popleft().numpy()

    def _group(self, requests: Sequence[Mapping[str, Value]], numbers: Sequence[int], sampling: Sampling) -> list[Tensor]:
        """Latents of requests of one group, each sampled at its number's own place in a batch that is always full."""
        size = self.group_size
        at = {number % size: k for k, number in enumerate(numbers)}
        filled = [at.get(place, 0) for place in range(size)]  # what stands in a place that nobody asked for changes nothing
        try:
            z = self.latents([requests[k] for k in filled], sampling, [numbers[k] for k in filled])
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"sampling {size} volumes at a time runs out of GPU memory ({error}); ask for fewer with --group "
                "(Pipeline.group)"
            ) from None
        return [z[number % size] for number in numbers]

    @contextmanager
    def _computing_alike(self) -> Iterator[None]:
        """Within it, PyTorch computes in the one way that volumes are bit-identical in, and fast."""
        with computing_alike(self.device, self.threads):
            yield

    def cropped(self, volume: NDArray) -> NDArray:
        """A volume (C, X, Y, Z) on the networks' grid without the planes that generated volumes lose."""
        kept = (slice(before, n - after) for n, (before, after) in zip(volume.shape[1:], self.crop))
        return volume[:, *kept]

    def denoiser(
        self,
        requests: Sequence[Mapping[str, Value]],
        guidance: float = 1.0,
        rescale: float = 0.0,
        interval: tuple[float, float] = EVERYWHERE,
    ) -> Denoiser:
        """(z, t) -> the expected clean latent of normalised latents (N, c, x, y, z), padded as the U-Net needs them.

        Args:
            requests: from `parse`, one for each of the batch.
            guidance, rescale, interval: see `ldm3d.diffusion.guidance.classifier_free`; without guidance the model itself.
        """
        asked = Conditions(self.schema.encode(requests).to(self.device))
        denoise = NetworkDenoiser(self.unet, self.process, self.target)
        if not len(self.schema):  # nothing is asked, so the answer with and without it would be the same
            guidance = 1.0
        return classifier_free(denoise, asked, asked.open(), guidance, rescale, interval)

    def latents(self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, numbers: Sequence[int]) -> Tensor:
        """Sample normalised latents (N, c, x, y, z), float32, for requests with these numbers in the series."""
        channels, *shape = self.autoencoder.latent_shape(self.grid.shape)
        padded = self.unet.padded_shape(shape)
        # One generator a sample, asked in the order start, step 0, step 1, ...: batches have no influence
        generators = [generator("sample", sampling.seed, number) for number in numbers]

        def fresh_noise(_step: int | None = None) -> Tensor:
            return torch.stack([torch.randn((channels, *padded), generator=g) for g in generators]).to(self.device)

        z = sample(
            sampling.sampler,
            self.denoiser(requests, sampling.guidance, sampling.guidance_rescale, sampling.guidance_interval),
            fresh_noise(),
            self.process,
            sampling.steps,
            spacing=sampling.spacing,
            noise=fresh_noise,
        )
        return cut_to(z, shape)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents to volumes (N, C, X, Y, Z), float32, clipped to [0, 1]; whole or streamed, see `ldm3d.memory`."""
        return self._decode(self.autoencoder.denormalise(z.to(self.dtype)))

    def reconstruct(self, volumes: Tensor) -> Tensor:
        """Volumes (N, C, X, Y, Z) through the autoencoder and back: the best that generation could look like."""
        moments = self.autoencoder.encode(volumes.to(self.device, self.dtype))
        return self._decode(self.autoencoder.sample(moments))

    def _decode(self, z: Tensor) -> Tensor:
        """Latents in their own scale to volumes, by a plan that is made once, so that it holds for every volume of a shape."""
        plan = self._plan(z.shape, z.dtype, z.device)
        if plan.mode == "whole" or z.requires_grad:
            try:
                return self.autoencoder.decode(z).float().clamp(0, 1)
            except torch.OutOfMemoryError as error:
                if self.decode_mode != "auto":  # as a series was begun: another way would give other last bits
                    raise InputError(
                        f"decoding a whole volume runs out of GPU memory, which it did not when this was begun ({error}); "
                        "end what else runs on this GPU, or name another folder: a new series is decoded in parts if need be"
                    ) from None
                logging.getLogger("ldm3d").warning(
                    "a whole decode ran out of memory: from here on volumes are decoded in parts"
                )
            # Outside of the handler, which holds on to the tensors of the decode
            streamed = plan_decode(self.autoencoder, z.shape, z.device, "streamed")
            self._plans[self._case(z.shape, z.dtype, z.device)] = streamed
        return decode_streamed(self.autoencoder, z).clamp_(0, 1)

    def _case(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple:
        return tuple(shape), dtype, device, self.decode_mode

    def _plan(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Plan:
        case = self._case(shape, dtype, device)
        if case not in self._plans:
            plan = plan_decode(self.autoencoder, shape, device, self.decode_mode)
            if self.decode_mode == "auto" and device.type == "cuda":
                plan = tried(plan, self.autoencoder, shape, dtype, device)
            self._plans[case] = plan
            logging.getLogger("ldm3d").info("%s", self._plans[case])
        return self._plans[case]

    def write(
        self,
        folder: Path | str,
        volumes: Iterable[NDArray],
        rows: Sequence[Mapping[str, Value]],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Path:
        """Write generated volumes as a BIDS derivative: volume, JSON sidecar, participants.tsv, mosaic.png.

        Args:
            folder: must be empty or absent, or hold an unfinished part of the same.
            volumes: in the order of `rows`; taken one at a time.
            rows, sampling: what was asked, and how.
            progress: called with the number of volumes written.
            numbers: as `volumes` was given them.

        Raises:
            InputError: the folder holds something else.
        """
        return run.write(folder, self.origin, volumes, rows, sampling, progress, numbers)


def grouped(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split 0, 1, ..., len(numbers) - 1 into runs whose numbers have different places in one batch of `size`."""
    run: list[int] = []
    for k, number in enumerate(numbers):
        if run and (number // size != numbers[run[-1]] // size or number <= numbers[run[-1]]):
            yield run
            run = []
        run.append(k)
    if run:
        yield run
