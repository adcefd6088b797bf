"""From covariates to volumes: everything a trained experiment needs, in one folder.

The files:

    FOLDER/pipeline.json        Grid, covariates with their fitted normalisation, process, defaults, versions
    FOLDER/autoencoder, unet    config.json and model.safetensors each
    FOLDER/start                the same, where sampling starts with a Gaussian
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

import ldm3d
from ldm3d.applied import Applied
from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Condition
from ldm3d.contrast import Contrast
from ldm3d.covariates import CovariateSchema, Value
from ldm3d.data.nifti import to_image
from ldm3d.description import NO_CROP, Preparation, Sampling, summary
from ldm3d.diffusion.process import Process
from ldm3d.errors import InputError
from ldm3d.folder import read_folder, write_folder
from ldm3d.generation.given import Images, for_all
from ldm3d.generation.given_scans import check_needed
from ldm3d.generation.identity import computing_of, origin_of
from ldm3d.generation.run import Result
from ldm3d.generation.sampling import draw
from ldm3d.generation.series import Origin, Series
from ldm3d.geometry import Grid
from ldm3d.memory import PlannedDecoder
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.unet import LatentUNet
from ldm3d.networks import Networks
from ldm3d.start import GaussianStart


class Pipeline(Networks, Applied):
    """Autoencoder, U-Net and all that belongs to them.

    What computes: `ldm3d.networks`; what is done with a given scan: `ldm3d.applied`.

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
        scales: of the latent channels, see `ldm3d.diffusion.preconditioning`; none where all have variance 1.
        start: denoises at high noise in place of the U-Net, if there are no `conditions`; None: there is no such Gaussian.
        denoising: sigma / alpha -> (error of the model, of the best Gaussian) on validation latents, relative to their
            variance; what is known of it from training.
        conditions: images that the U-Net takes beside covariates, see `ldm3d.conditions`.
        preparation: how the scans of the training were brought to the Grid; None where that is not known.
        contrasts: how the images of conditions looked in the training, by the condition's name; others are warned of.
        suffixes: of the contrasts in a volume, where there are several, the first of them `suffix`.
        labels: of the groups whose shares of each voxel are the channels of volumes; None: volumes are images.
        model_hash: names the weights in what is written; from_pretrained fills it in.
        crop: (before, after) planes of each axis that generated volumes lose after decoding.
        decode_mode: "auto" decodes latents whole or streamed, as memory asks; "whole" and "streamed" do as they say.
        group: volumes that go through the U-Net together; None for what fills it, see `group_size`.
        threads: of the CPU, while volumes are generated; None for as many as PyTorch uses.

    The last three can be set later. The last bits of a volume follow from them, see `ldm3d.generation.sampling`.
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
        scales: Sequence[float] = (),
        start: GaussianStart | None = None,
        denoising: Mapping[str, tuple[float, float]] | None = None,
        conditions: Sequence[Condition] = (),
        preparation: Preparation | None = None,
        contrasts: Mapping[str, Contrast] | None = None,
        labels: Mapping[str, Sequence[int]] | None = None,
        suffixes: Sequence[str] = (),
    ):
        if any(number is not None and number < 1 for number in (group, threads)):
            raise InputError(f"group {group} and threads {threads} must be at least 1, or None")
        self.autoencoder, self.unet = autoencoder.requires_grad_(False), unet.requires_grad_(False)
        self.start, self.schema, self.grid = start, schema, grid
        self.process, self.target, self.sampling = process, target, sampling or Sampling()
        self.skull_stripped, self.suffix, self.model_hash, self.scales = skull_stripped, suffix, model_hash, tuple(scales)
        self.denoising, self.preparation, self.contrasts = dict(denoising or {}), preparation, dict(contrasts or {})
        self.labels = {name: tuple(values) for name, values in (labels or {}).items()}
        self._further = tuple(suffixes[1:])
        self.crop = tuple(tuple(planes) for planes in crop)
        self.decode_mode, self.group, self.threads = decode_mode, group, threads
        self.compiled = False
        self.conditions, self.channels = tuple(conditions), ImageChannels(conditions, autoencoder)
        self.images: Images | None = None  # what is given; see `given`
        self._decoder = PlannedDecoder()

    @property
    def output_grid(self) -> Grid:
        """The grid of generated volumes: the networks' own without what is cropped."""
        return self.grid.cropped(self.crop)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """BIDS suffixes of the contrasts in a volume, whose channels they are in this order."""
        return self.suffix, *self._further

    @property
    def computing(self) -> dict[str, Any]:
        """What the last bits of a volume follow from beside weights and request."""
        shape = (1, *self.autoencoder.latent_shape(self.grid.shape))
        plan = self._decoder.plan(self.autoencoder, shape, self.dtype, self.device, self.decode_mode)
        return computing_of(self, plan.mode)

    @property
    def origin(self) -> Origin:
        """What a folder of generated volumes has to say of this pipeline."""
        return origin_of(self)

    def decoding(self, mode: str) -> "Pipeline":
        """The same pipeline with this `decode_mode`."""
        other = copy.copy(self)
        other.decode_mode = mode
        return other

    def given(self, images: Images | Mapping[str, Any], like: str | None = None, stripped: bool = False) -> "Pipeline":
        """The same pipeline with images given: a set for all requests, as `__call__` takes it, or those of a series."""
        other = copy.copy(self)
        other.images = images if isinstance(images, Images) else for_all(self, images, like, stripped)
        return other

    def __repr__(self) -> str:
        return summary(self)

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None, rounded_from: str | None = None) -> None:
        """Write the pipeline as a folder of safetensors and JSON.

        Args:
            folder: where.
            dtype: of the weights in the files, see `Pretrained.save_pretrained`; the pipeline itself does not change.
            rounded_from: `model_hash` of the weights before an earlier rounding; None where there was none.
        """
        saved = write_folder(self, Path(folder), dtype, rounded_from)
        if dtype is None:
            self.model_hash = saved

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "Pipeline":
        """Load a pipeline folder.

        Args:
            folder: written by training stage 2 or `save_pretrained`; the name of a shipped model; or "user/name" at a hub.
            device: None for CUDA where there is one, else the CPU.
            dtype: to compute in, torch.float32 or torch.bfloat16; None for what is fast on the device, as the command line
                has it. The precision of the files has no say in it.
            revision: branch, tag or commit of a model at a hub; None for the newest.

        Raises:
            InputError: not such a folder, or a damaged one.
        """
        return cls(**read_folder(folder, device, dtype, revision))

    def __call__(
        self,
        num_volumes: int = 1,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
        ask: Mapping[str, Any] | None = None,
        conditions: Mapping[str, Any] | None = None,
        like: str | None = None,
        stripped: bool = False,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        image_guidance: float | None = None,
        spread: float | None = None,
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
            conditions: by the condition's name a file or a nibabel image in any space; or a pair of it and a mask of what was
                measured, where the condition hides voxels. The same for all volumes.
            like: name of a condition on whose own voxels the answers lie; None: on the Grid.
            stripped: scans of `conditions` have no skull any more, so no brain is extracted where the training's were.
            sampler, steps, guidance, guidance_rescale, guidance_interval, image_guidance, spread, spacing, seed: see
                `Sampling`; None takes the pipeline's own.
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
        guided = {"guidance": guidance, "guidance_rescale": guidance_rescale, "guidance_interval": guidance_interval}
        guided |= {"image_guidance": image_guidance, "spread": spread}
        sampling = self.sampling.replace(sampler=sampler, steps=steps, spacing=spacing, seed=seed, **guided)
        if not conditions and self.images is None:
            check_needed(self.conditions)
        pipeline, images = self.given(conditions or {}, like, stripped) if conditions or like else self, []
        affine = pipeline.images.affine(0) if pipeline.images else None
        for volume in pipeline.volumes(requests, sampling, batch_size):
            images.append(to_image(volume, self.output_grid.affine if affine is None else affine, self.mark))
            if progress:
                progress(len(images))
        return Result(images, requests, pipeline.origin, sampling)

    @property
    def mark(self) -> str:
        """What the header of every written volume says."""
        return f"SYNTHETIC ldm3d {ldm3d.__version__} model {self.model_hash}"

    def parse(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Value]]:
        """Check requests: every covariate as a value or None; a warning for what training never saw.

        Raises:
            InputError: unknown covariate, category or kind of value, or one out of range; of several, with its row.
        """
        requests = self.schema.parse_all(list(rows))
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
            InputError: guidance of a model that was trained with no covariate left open, a spread that it has no mean for, or
                a spacing that does not fit; at once, before the first volume is asked for.
        """
        self.check_sampling(sampling)
        numbers = range(len(requests)) if numbers is None else numbers
        drawn = draw(self, requests, numbers, sampling, batch_size)
        if self.images is None:
            return map(self.cropped, drawn)
        images = self.images
        return (images.finished(number, volume, self.cropped) for number, volume in zip(numbers, drawn))

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise InputError where this model cannot be sampled so; see `volumes`."""
        if self.schema.required and sampling.guidance != 1:
            raise InputError(
                f"guidance {sampling.guidance:g}: this model was trained with no covariate left open, so there is no "
                "unconditional answer to guide away from; use guidance 1"
            )
        if sampling.spread != 1 and (self.start is None or self.conditions):
            raise InputError(
                f"spread {sampling.spread:g}: only a model with a Gaussian (`diffusion.start`) and without images knows the "
                "mean that volumes would be drawn away from; use spread 1"
            )
        if sampling.spacing is not None:
            self.process.times(sampling.steps, sampling.spacing)

    def cropped(self, volume: NDArray) -> NDArray:
        """A volume (C, X, Y, Z) on the networks' grid without the planes that generated volumes lose."""
        kept = (slice(before, n - after) for n, (before, after) in zip(volume.shape[1:], self.crop))
        return volume[:, *kept]

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
        with Series(folder, self.origin, rows, sampling.to_dict(), numbers) as series:
            series.write_all(volumes, progress)
        return Path(folder)
