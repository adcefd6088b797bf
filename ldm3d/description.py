"""pipeline.json, which describes a model folder beside its weights, with the defaults of sampling."""

import importlib.metadata
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

import ldm3d
from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Condition, in_words, without_sources
from ldm3d.config.data import MAX_VOXELS, BrainExtractionConfig, DataConfig, RegistrationConfig, Suffix
from ldm3d.contrast import Contrast, blocks_of
from ldm3d.covariates import CovariateSchema
from ldm3d.diffusion.process import TARGETS
from ldm3d.diffusion.samplers import SAMPLERS
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError, choose, shown
from ldm3d.files import write_atomic
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.pretrained import read_json, weights_hash
from ldm3d.models.unet import LatentUNet
from ldm3d.start import GaussianStart

DESCRIPTION = "pipeline.json"
# What it describes
PARTS = (
    *("schema", "grid", "process", "target", "sampling", "skull_stripped", "suffix", "crop", "scales", "denoising"),
    *("preparation", "conditions", "contrasts", "labels", "suffixes"),
)
ROUNDED_FROM = "rounded_from"  # key of the hash of the weights before they were rounded to half precision
START = "start"  # folder of what sampling starts with
NO_CROP = ((0, 0), (0, 0), (0, 0))
WIDEST = 2.0  # spread, beyond which no volume looks like a brain
MAX_STEPS = 100_000  # of a sampler, or of the chain that a process was made from
Scales = tuple[Annotated[float, Field(gt=0, lt=1e6)], ...]
# sigma / alpha -> errors of the model and of the best Gaussian
Denoising = Annotated[dict[str, tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]], Field(max_length=100)]
ImageConditions = Annotated[tuple[Condition, ...], Field(max_length=100)]
Groups = Annotated[dict[str, tuple[int, ...]], Field(max_length=1000)]
Suffixes = Annotated[tuple[Suffix, ...], Field(max_length=100)]
Percentile = Annotated[float, Field(ge=0, le=100)]
Planes = Annotated[int, Field(ge=0)]
Crop = tuple[tuple[Planes, Planes], tuple[Planes, Planes], tuple[Planes, Planes]]


@dataclass(frozen=True)
class Sampling:
    """How volumes are sampled.

    Args:
        sampler: a name in `ldm3d.diffusion.samplers.SAMPLERS`.
        steps: of the sampler.
        guidance: classifier-free guidance scale; 1 is none, 0 ignores the covariates.
        guidance_rescale: 0 to 1, see `ldm3d.diffusion.guidance`.
        guidance_interval: times between which guidance acts.
        image_guidance: scale of the guidance by images, apart from covariates; see `ldm3d.diffusion.guidance.apart`.
        spread: factor by which a sampled latent is drawn away from the mean that the Gaussian of `ldm3d.start` has under the
            covariates. A network's error takes from the variance of what is sampled; this gives it back. 1 changes nothing.
        spacing: of the times; None for the sampler's own.
        seed: sample i of a seed is the same volume in any batch.
    """

    sampler: str = "heun"
    steps: int = 20
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    image_guidance: float = 1.0
    spread: float = 1.0
    spacing: str | None = None
    seed: int = 0

    # For the check of a file's values by pydantic in `read_description`
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 (no field)

    def __post_init__(self) -> None:
        choose("sampler", self.sampler, SAMPLERS)  # here, before anything is written
        if self.steps < 1 or min(self.guidance, self.image_guidance) < 0 or self.seed < 0:
            raise InputError(
                f"steps {self.steps}, guidance {self.guidance}, seed {self.seed}: steps must be at least 1, the others >= 0"
            )
        if not 0 < self.spread <= WIDEST:
            raise InputError(f"spread {self.spread:g} must be above 0, and {WIDEST:g} at most")

    def __str__(self) -> str:
        return f"{self.sampler}, {self.steps} steps, guidance {self.guidance:g}, spread {self.spread:g}"

    def replace(self, **changes: Any) -> "Sampling":
        """A copy with every change that is not None."""
        return Sampling(**{**self.to_dict(), **{key: value for key, value in changes.items() if value is not None}})

    def to_dict(self) -> dict[str, Any]:
        # Without these defaults, as in series and models that were made before there was another value
        return {name: value for name, value in vars(self).items() if name not in ("image_guidance", "spread") or value != 1}


@dataclass(frozen=True)
class Preparation:
    """How the scans of the training were brought to the Grid, as any other scan for the model has to be.

    Args:
        percentiles: of its intensities, which become 0 and 1, see `ldm3d.data.placing.to_grid`.
        registration: to which template, and how; None: placed as it lay. A template of the user's is a file's name here.
        brain_extraction: the command that took the skull away; None: none did. A program's folder is not kept.
        bias_correction: by which the bias field was divided out; None: it was not.
    """

    percentiles: tuple[Percentile, Percentile] = (0.0, 99.8)
    registration: RegistrationConfig | None = None
    brain_extraction: BrainExtractionConfig | None = None
    bias_correction: Literal["n4"] | None = None

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 (no field)

    @classmethod
    def of(cls, data: DataConfig) -> "Preparation":
        """That of a config's data; without folders of the user's, for a model folder can be published."""
        to = data.registration and data.registration.model_copy(update={"to": Path(data.registration.to).name})
        tool = data.brain_extraction
        if tool:
            program, *words = shlex.split(tool.command)
            tool = BrainExtractionConfig(command=shlex.join([Path(program).name, *words]))
        return cls(data.percentiles, to, tool, data.bias_correction)

    def to_dict(self) -> dict[str, Any]:
        to, tool = self.registration, self.brain_extraction
        return {
            "percentiles": self.percentiles,
            **({"registration": {"to": to.to, "kind": to.kind}} if to else {}),
            **({"brain_extraction": {"command": tool.command}} if tool else {}),
            **({"bias_correction": self.bias_correction} if self.bias_correction else {}),
        }


def write_description(path: Path, parts: Mapping[str, Any], rounded_from: str | None = None) -> None:
    """Write `PARTS` of a pipeline as pipeline.json; with the hash of the weights before they were rounded, if they were."""
    description = {
        "ldm3d": ldm3d.__version__,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "monai", "nibabel")},
        "grid": parts["grid"].to_dict(),
        "covariates": parts["schema"].to_dict(),
        "process": parts["process"].to_dict(),
        "target": parts["target"],
        "sampling": parts["sampling"].to_dict(),
        **{name: parts[name] for name in ("skull_stripped", "suffix", "crop")},
        **({"scales": parts["scales"]} if parts["scales"] else {}),
        **({"starts": True} if parts["starts"] else {}),
        **({"denoising": parts["denoising"]} if parts["denoising"] else {}),
        **({"conditions": [*map(without_sources, parts["conditions"])]} if parts["conditions"] else {}),
        **({"contrasts": {name: each.to_dict() for name, each in parts["contrasts"].items()}} if parts["contrasts"] else {}),
        **({"preparation": parts["preparation"].to_dict()} if parts["preparation"] else {}),
        **({"labels": parts["labels"]} if parts["labels"] else {}),
        **({"suffixes": parts["suffixes"]} if len(parts["suffixes"]) > 1 else {}),
        "generates": "synthetic volumes; no patient's data",
        **({ROUNDED_FROM: rounded_from} if rounded_from else {}),
    }
    write_atomic(path, json.dumps(description, indent=2) + "\n")


def read_description(path: Path) -> dict[str, Any]:
    """pipeline.json as arguments of `Pipeline`; InputError if a value is missing or invalid."""
    values = read_json(path)
    try:
        process = make_process(**values["process"])
        options = {name: value for name, value in process.to_dict().items() if name != "kind"}
        parts: dict[str, Any] = {
            "schema": CovariateSchema.from_dict(values["covariates"]),
            "grid": Grid.from_dict(values["grid"]),
            "process": TypeAdapter(type(process)).validate_python(options),
            "target": choose("target", values["target"], TARGETS),
            "sampling": TypeAdapter(Sampling).validate_python(values["sampling"]),
            "skull_stripped": bool(values["skull_stripped"]),
            "suffix": TypeAdapter(Suffix).validate_python(values.get("suffix", "T1w")),  # older folders lack it
            "crop": TypeAdapter(Crop).validate_python(values.get("crop", NO_CROP)),
            "scales": TypeAdapter(Scales).validate_python(values.get("scales", ())),
            "starts": bool(values.get("starts", False)),
            "denoising": TypeAdapter(Denoising).validate_python(values.get("denoising", {})),
            "conditions": TypeAdapter(ImageConditions).validate_python(values.get("conditions", ())),
            "contrasts": TypeAdapter(dict[str, Contrast]).validate_python(values.get("contrasts", {})),
            "preparation": TypeAdapter(Preparation | None).validate_python(values.get("preparation")),
            "labels": TypeAdapter(Groups).validate_python(values.get("labels", {})),
            "suffixes": TypeAdapter(Suffixes).validate_python(values.get("suffixes", ())),
        }
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))} is {shown(first['input'])}: {first['msg']}"
        raise InputError(f"{path} is damaged or of another version of ldm3d: {reason}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path} is damaged or of another version of ldm3d: {shown(error)}") from None
    grid, steps = parts["grid"], getattr(process, "train_steps", 1)
    if math.prod(grid.shape) > MAX_VOXELS or steps > MAX_STEPS or parts["sampling"].steps > MAX_STEPS:
        raise InputError(
            f"{path}: a grid of {grid.shape} voxels, {steps} steps of the process, {parts['sampling'].steps} of the sampler; "
            f"at most {MAX_VOXELS:,} voxels and {MAX_STEPS:,} steps are taken"
        )
    if any(sum(planes) >= n for planes, n in zip(parts["crop"], grid.shape)):
        raise InputError(f"{path}: crop {parts['crop']} leaves nothing of the grid {grid.shape}")
    if not np.isfinite(grid.affine).all() or abs(np.linalg.det(grid.affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: the grid's affine {grid.affine.tolist()} maps voxels nowhere")
    return parts


def summary(pipeline: Any) -> str:
    """What a pipeline says of itself on the terminal."""
    grid, sampling, networks = pipeline.output_grid, pipeline.sampling, (pipeline.autoencoder, pipeline.unet)
    sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    return "\n".join(
        [
            f"Pipeline, model {pipeline.model_hash}",
            f"  volumes   {' x '.join(map(str, grid.shape))} voxels of {' x '.join(f'{s:g}' for s in grid.spacing_mm)} mm"
            + (f", each of {' and '.join(pipeline.suffixes)}" if len(pipeline.suffixes) > 1 else ""),
            *(f"  {'asks for' if i == 0 else '':9} {c.name}: {c.answers}" for i, c in enumerate(pipeline.schema)),
            *([] if len(pipeline.schema) else ["  asks for  nothing: a model without covariates"]),
            f"  diffusion {pipeline.process.kind}, predicts {pipeline.target}" + _of_start(pipeline),
            *(f"  {'takes' if i == 0 else '':9} {c.name}: {in_words(c)}" for i, c in enumerate(pipeline.conditions)),
            f"  sampling  {sampling}",
            f"  networks  {sizes[0]:.2f} M parameters (autoencoder), {sizes[1]:.2f} M (U-Net), on {pipeline.device.type}",
        ]
    )


def _of_start(pipeline: Any) -> str:
    """What the Gaussian of a pipeline does, behind its process."""
    if pipeline.start is None:
        return ""
    if pipeline.conditions:
        return "; beside a Gaussian" + (" that knows the images" if pipeline.start.image_channels else "")
    return f"; a Gaussian starts, until sigma / alpha is {pipeline.start.until:g}"


def hash_of_model(folder: Path) -> str:
    """`weights_hash` of a pipeline folder."""
    return weights_hash(
        *(folder / name for name in ("autoencoder", "unet", START) if name != START or (folder / name).is_dir())
    )


def check_parts(
    folder: Path, autoencoder: LatentSpace, unet: LatentUNet, start: GaussianStart | None, parts: Mapping[str, Any]
) -> None:
    """Raise InputError unless networks, covariates, Grid and scales of a folder, see `read_description`, belong together."""
    channels, factor = autoencoder.latent_channels, autoencoder.downsampling
    schema, grid, scales = parts["schema"], parts["grid"], parts["scales"]
    if scales and (len(scales) != channels or parts["target"] != "v"):
        raise InputError(
            f"{folder}: {len(scales)} scales and target {parts['target']}; scales are of all {channels} latent channels, and "
            "need target v"
        )
    inputs = channels * (1 + (start is not None and start.residual))
    if (unet.in_channels, unet.out_channels) != (inputs, channels):
        raise InputError(
            f"{folder}: the autoencoder has {channels} latent channels, the U-Net takes {unet.in_channels} and gives "
            f"{unet.out_channels} instead of {inputs} and {channels}; they are of different models"
        )
    if start is not None and start.residual and not scales:
        raise InputError(f"{folder}: {START} is of a network that needs scales, and {DESCRIPTION} has none")
    wanted = ImageChannels(parts["conditions"], autoencoder).count
    if start is not None and start.image_channels not in (0, wanted):
        raise InputError(
            f"{folder}: {START} knows images of {start.image_channels} channels, the conditions in {DESCRIPTION} have "
            f"{wanted}; they are of different models"
        )
    if unet.image_channels != wanted:
        raise InputError(
            f"{folder}: the U-Net takes images of {unet.image_channels} channels, the conditions in {DESCRIPTION} have "
            f"{wanted}; they are of different models"
        )
    if list(unet.arguments["num_categories"]) != schema.num_categories:
        raise InputError(
            f"{folder}: the U-Net was made for covariates with {unet.arguments['num_categories']} categories, {DESCRIPTION} "
            f"lists {schema.num_categories}; they are of different models"
        )
    latent = channels, *unet.padded_shape([n // factor for n in grid.shape])
    if start is not None and (start.shape, list(start.num_categories)) != (latent, schema.num_categories):
        raise InputError(
            f"{folder}: {START} is of latents {start.shape} and covariates with {list(start.num_categories)} categories, the "
            f"networks are of {latent} and {schema.num_categories}; they are of different models"
        )
    wanted_blocks = blocks_of(grid.shape, grid.spacing_mm)
    if odd := [name for name, each in parts["contrasts"].items() if each.shape != wanted_blocks]:
        raise InputError(
            f"{folder}: the contrast of {odd[0]} is of another grid; it is damaged or of another version of ldm3d"
        )
    if parts["labels"] and len(parts["labels"]) != autoencoder.in_channels:
        raise InputError(
            f"{folder}: {DESCRIPTION} lists {len(parts['labels'])} groups of labels, the autoencoder has "
            f"{autoencoder.in_channels} channels; they are of different models"
        )
    if max(1, len(parts["suffixes"])) != autoencoder.contrasts or parts["suffix"] != [*parts["suffixes"], parts["suffix"]][0]:
        raise InputError(
            f"{folder}: {DESCRIPTION} lists contrasts {', '.join(parts['suffixes']) or parts['suffix']} of {parts['suffix']} "
            f"volumes, the autoencoder codes {autoencoder.contrasts}; they are of different models"
        )
    if any(n % factor for n in grid.shape):
        raise InputError(f"{folder}: the autoencoder's downsampling {factor} does not divide the grid {grid.shape}")
