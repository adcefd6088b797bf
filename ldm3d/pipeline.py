"""From covariates to volumes: everything a trained experiment needs, in one folder.

FOLDER/pipeline.json        Grid, covariates with their fitted normalisation, process, defaults, versions
FOLDER/autoencoder, unet    config.json and model.safetensors each
"""

import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

import ldm3d
from ldm3d import figures
from ldm3d.covariates import CovariateSchema, Value
from ldm3d.data.bids import finish_derivative, start_derivative, synthetic_path
from ldm3d.data.loading import generator
from ldm3d.data.nifti import to_image, write_volume
from ldm3d.diffusion.guidance import guided_denoiser
from ldm3d.diffusion.process import Process, choose, make_process
from ldm3d.diffusion.samplers import SAMPLERS, sample
from ldm3d.errors import InputError
from ldm3d.geometry import Grid
from ldm3d.memory import Plan, plan_decode
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.pretrained import weights_hash
from ldm3d.models.streaming import decode_streamed
from ldm3d.models.unet import TIMESTEPS, LatentUNet, cut_to

DESCRIPTION = "pipeline.json"
MOSAIC_VOLUMES = 16  # shown in the mosaic of a generated dataset
WHOLE = ((0, 0), (0, 0), (0, 0))  # a crop that leaves everything


@dataclass(frozen=True)
class Sampling:
    """How volumes are drawn.

    Args:
        sampler: "ddpm", "ddim", "euler", "heun", "dpmpp-2m" or "unipc".
        steps: of the sampler.
        guidance: classifier-free guidance scale; 1 is none, 0 ignores the covariates.
        guidance_rescale: 0 to 1, see `ldm3d.diffusion.guidance`.
        guidance_interval: times between which guidance acts.
        spacing: of the times; None for the sampler's own.
        seed: sample i of a seed is the same volume in any batch.
    """

    sampler: str = "heun"
    steps: int = 20
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    spacing: str | None = None
    seed: int = 0

    def __post_init__(self):
        choose("sampler", self.sampler, SAMPLERS)  # before anything is written, not when the first volume is drawn
        if self.steps < 1 or self.guidance < 0 or self.seed < 0:
            raise InputError(
                f"steps {self.steps}, guidance {self.guidance}, seed {self.seed}: steps must be at least 1, the others >= 0"
            )

    def replace(self, **changes: Any) -> "Sampling":
        """A copy with every change that is not None."""
        return Sampling(**{**self.to_dict(), **{key: value for key, value in changes.items() if value is not None}})

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


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
        """Write a BIDS derivative dataset; `folder` must be empty or absent."""
        volumes = (np.asarray(image.dataobj) for image in self.images)
        return self.pipeline.write(folder, volumes, self.rows, self.sampling)


class Pipeline:
    """Autoencoder, U-Net and all that belongs to them.

    Args:
        autoencoder, unet: networks in evaluation mode, on one device.
        schema: fitted covariates.
        grid: of the volumes.
        process: of the diffusion.
        target: what the U-Net predicts.
        sampling: what calls do unless asked otherwise.
        skull_stripped: whether the volumes are brains without skull; goes into sidecars.
        model_hash: names the weights in what is written; from_pretrained fills it in.
        crop: (before, after) planes of each axis that generated volumes lose after decoding.
        decode_mode: "auto" decodes latents whole or streamed, as memory asks; "whole" and "streamed" do as they say. An
            attribute, too, that can be set later.
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
        crop: Sequence[Sequence[int]] = WHOLE,
        decode_mode: str = "auto",
    ):
        self.autoencoder, self.unet, self.schema, self.grid = autoencoder, unet, schema, grid
        self.process, self.target, self.sampling = process, target, sampling or Sampling()
        self.skull_stripped, self.model_hash = skull_stripped, model_hash
        self.crop = tuple(tuple(planes) for planes in crop)
        self.decode_mode = decode_mode
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

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Pipeline":
        """Move both networks."""
        self.autoencoder.to(device=device, dtype=dtype)
        self.unet.to(device=device, dtype=dtype)
        return self

    def compile(self) -> "Pipeline":
        """Let torch.compile make the U-Net faster: worth its minute from some tens of volumes on.

        On CUDA, sampling then replays CUDA graphs, which takes the launches of single kernels off the host. A batch of
        another size compiles again: keep to one.
        """
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
            "crop": self.crop,
            "generates": "synthetic volumes; no patient's data",
        }
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        self.model_hash = weights_hash(folder / "autoencoder", folder / "unet")

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> "Pipeline":
        """Load a pipeline folder.

        Args:
            folder: written by training stage 2 or `save_pretrained`.
            device: None for CUDA where there is one, else the CPU.
            dtype: torch.float32 or torch.bfloat16.

        Raises:
            InputError: not such a folder, or a damaged one.
        """
        folder = Path(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not (folder / DESCRIPTION).is_file():
            raise InputError(f"{folder} holds no model: {DESCRIPTION} is missing; training writes one to OUTPUT/model")
        try:
            values = json.loads((folder / DESCRIPTION).read_text())
            parts = {
                "schema": CovariateSchema.from_dict(values["covariates"]),
                "grid": Grid.from_dict(values["grid"]),
                "process": make_process(**values["process"]),
                "target": values["target"],
                "sampling": Sampling(**values["sampling"]),
                "skull_stripped": values["skull_stripped"],
                "crop": values.get("crop", WHOLE),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / DESCRIPTION} is damaged or of another version of ldm3d: {error!r}") from None
        autoencoder = LatentSpace.from_pretrained(folder / "autoencoder", device, dtype)
        unet = LatentUNet.from_pretrained(folder / "unet", device, dtype)
        return cls(autoencoder, unet, model_hash=weights_hash(folder / "autoencoder", folder / "unet"), **parts)

    def __call__(
        self,
        num_volumes: int = 1,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
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
            sampler, steps, guidance, guidance_rescale, guidance_interval, spacing, seed: see `Sampling`; None takes the
                pipeline's own.
            batch_size: volumes at a time; of no influence on what they are.
            progress: called with the number of volumes done.
            covariates: by name; those left out are left open.

        Raises:
            InputError: unknown covariate, category or sampler, value out of range.
        """
        if rows is not None and covariates:
            raise InputError("give either `rows` or covariates by name, not both")
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
        """Check requests: every covariate as a value or None; a warning for what training never saw."""
        requests = [self.schema.parse(row) for row in rows]
        self.schema.warn_beyond_seen(requests)
        return requests

    def volumes(
        self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, batch_size: int = 8, first: int = 0
    ) -> Iterator[NDArray]:
        """Generate volumes one after the other, on the `output_grid`, float32 in [0, 1]; memory does not grow with them.

        Args:
            requests: from `parse`, one a volume.
            sampling: how.
            batch_size: volumes at a time.
            first: number of the first request in its series, if these are a part of it.

        Raises:
            InputError: guidance of a model that was trained with no covariate left open, or a spacing that does not fit;
                at once, before the first volume is asked for.
        """
        if self.schema.required and sampling.guidance != 1:
            raise InputError(
                f"guidance {sampling.guidance:g}: this model was trained with no covariate left open, so there is no "
                "unconditional answer to guide away from; use guidance 1"
            )
        if sampling.spacing is not None:
            self.process.times(sampling.steps, sampling.spacing)
        return self._volumes(requests, sampling, batch_size, first)

    def _volumes(
        self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, batch_size: int, first: int
    ) -> Iterator[NDArray]:
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            z = self.latents(batch, sampling, range(first + start, first + start + len(batch)))
            # One volume at a time: the decoder is where memory peaks
            for latent in z:
                yield self.cropped(self.decode(latent[None])[0, 0].cpu().numpy())

    def cropped(self, volume: NDArray) -> NDArray:
        """A volume (X, Y, Z) on the networks' grid without the planes that generated volumes lose."""
        return volume[tuple(slice(before, n - after) for n, (before, after) in zip(volume.shape, self.crop))]

    @torch.no_grad()
    def latents(self, requests: Sequence[Mapping[str, Value]], sampling: Sampling, numbers: Sequence[int]) -> Tensor:
        """Sample normalised latents (N, c, x, y, z), float32, for requests with these numbers in the series."""
        context = self.schema.encode(requests).to(self.device)  # (N, K, 2)
        channels, *shape = self.autoencoder.latent_shape(self.grid.shape)
        padded = self.unet.padded_shape(shape)
        # One generator a sample, asked in the order start, step 0, step 1, ...: batches have no influence
        generators = [generator("sample", sampling.seed, number) for number in numbers]

        def fresh_noise(_step: int | None = None) -> Tensor:
            return torch.stack([torch.randn((channels, *padded), generator=g) for g in generators]).to(self.device)

        def denoise(z: Tensor, t: float, context: Tensor) -> Tensor:
            timesteps = torch.full((len(z),), TIMESTEPS * t, device=z.device)
            output = self.unet(z.to(self.dtype), timesteps, context.to(self.dtype)).float()
            return self.process.to_data(self.target, output, z, t)

        denoiser = guided_denoiser(
            denoise,
            context,
            torch.zeros_like(context),
            sampling.guidance,
            sampling.guidance_rescale,
            sampling.guidance_interval,
        )
        z = sample(
            sampling.sampler,
            denoiser,
            fresh_noise(),
            self.process,
            sampling.steps,
            spacing=sampling.spacing,
            noise=fresh_noise,
        )
        return cut_to(z, shape)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents to volumes (N, C, X, Y, Z), float32, clipped to [0, 1]; whole or streamed, see `ldm3d.memory`."""
        return self._decode(self.autoencoder.denormalise(z.to(self.dtype)))

    @torch.no_grad()
    def reconstruct(self, volumes: Tensor) -> Tensor:
        """Volumes (N, C, X, Y, Z) through the autoencoder and back: the best that generation could look like."""
        moments = self.autoencoder.encode(volumes.to(self.device, self.dtype))
        return self._decode(self.autoencoder.sample(moments))

    def _decode(self, z: Tensor) -> Tensor:
        """Latents in their own scale to volumes, by a plan that is made once, so that it holds for every volume of a shape."""
        case = (z.shape, z.dtype, z.device, self.decode_mode)
        if case not in self._plans:
            self._plans[case] = plan_decode(self.autoencoder, z.shape, z.device, self.decode_mode)
            logging.getLogger("ldm3d").info("%s", self._plans[case])
        if self._plans[case].mode == "streamed":
            return decode_streamed(self.autoencoder, z).clamp_(0, 1)
        return self.autoencoder.decode(z).float().clamp_(0, 1)

    def write(
        self,
        folder: Path | str,
        volumes: Iterable[NDArray],
        rows: Sequence[Mapping[str, Value]],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> Path:
        """Write generated volumes as a BIDS derivative: volume, JSON sidecar, participants.tsv, mosaic.png.

        Args:
            folder: must be empty or absent.
            volumes: in the order of `rows`; taken one at a time.
            rows, sampling: what was asked, and how.
            progress: called with the number of volumes written.
        """
        folder = Path(folder)
        origin = {"Name": "ldm3d", "Version": ldm3d.__version__, "Description": f"model {self.model_hash}"}
        readme = (
            "Synthetic brain volumes, generated by a latent diffusion model (ldm3d). They show no patient. "
            "participants.tsv holds the covariates that were asked for, not measured ones; n/a was left open."
        )
        start_derivative(folder, "Synthetic brain volumes", [origin], readme)
        (folder / ".bidsignore").write_text("mosaic.png\n")
        table, shown = [], []
        for i, (volume, row) in enumerate(zip(volumes, rows)):
            path = synthetic_path(folder, i)
            write_volume(path, volume, self.output_grid.affine, self.mark)
            sidecar = {
                "synthetic": True,
                "SkullStripped": self.skull_stripped,
                "Description": "Synthetic T1w-like volume generated by ldm3d; intensities in [0, 1]",
                "model_hash": self.model_hash,
                "ldm3d_version": ldm3d.__version__,
                "sample": i,
                **sampling.to_dict(),
                "covariates": dict(row),
            }
            path.with_name(path.name.removesuffix(".nii.gz") + ".json").write_text(json.dumps(sidecar, indent=2) + "\n")
            table.append({"participant_id": path.parents[1].name, **row})
            if len(shown) < MOSAIC_VOLUMES:
                shown.append(volume)
            if progress:
                progress(i + 1)
        columns = {
            c.name: {"Description": f"asked {c.name.replace('_', ' ')}", **({"Units": c.unit} if c.unit else {})}
            for c in self.schema
        }
        finish_derivative(folder, pd.DataFrame(table), columns)
        titles = [describe(row) for row in rows[: len(shown)]]
        figures.save(figures.mosaic(shown, titles, self.grid.spacing_mm, heading="synthetic"), folder / "mosaic.png")
        return folder


def describe(row: Mapping[str, Value]) -> str:
    """A request in a line: "age 72, sex F"."""

    def text(value: Value) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    given = [f"{name.removesuffix('_ml').replace('_', ' ')} {text(v)}" for name, v in row.items() if v is not None]
    return ", ".join(given) or "nothing asked"
