"""Published MONAI models as pipelines: their weights key by key, and the settings that their files lack.

Two layouts are told apart by the names of the files, which lie in the folder itself or in its models/, as .pt, .pth or
.safetensors:

    autoencoder and diffusion_model or model    Brain image synthesis of MONAI's model zoo (Pinaya et al. 2022)
    autoencoder and latentdiffusion             Brain Latent Progression, without its ControlNet (Puglisi et al. 2024)

Networks and betas are taken from configs/inference.json, if there is one. A file import.yaml in the folder may set any key of
`ImportConfig` anew, and `ranges`, {covariate: [lowest, highest]}; a model of one's own is imported by setting all of them.
"""

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field, ValidationError, model_validator

from ldm3d.config.base import Section
from ldm3d.config.bundle import read_bundle
from ldm3d.config.data import GridConfig, Suffix
from ldm3d.config.explain import explain
from ldm3d.config.networks import MonaiAutoencoderConfig, MonaiLibrary, MonaiUNetConfig
from ldm3d.config.sections import GenerationConfig, ProcessConfig
from ldm3d.config.yaml import read_yaml
from ldm3d.covariates import NAME, Covariate, CovariateSchema
from ldm3d.description import NO_CROP, Sampling
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError, choose
from ldm3d.geometry import Grid, spacing_of
from ldm3d.models.foreign import convert, read_weights
from ldm3d.models.pretrained import Pretrained, load_weights, make_network
from ldm3d.pipeline import Pipeline

SETTINGS = "import.yaml"
SUFFIXES = (".pth", ".pt", ".safetensors")

AUTOENCODER = {"latent_channels": 3, "channels": [64, 128, 128, 128], "blocks": 2}
UNET = {
    "channels": [256, 512, 768],
    "blocks": 2,
    "attention": [False, True, True],
    "head_channels": [0, 512, 768],
    "resblock_updown": True,
    "upcast_attention": True,
}
SHARED = {
    "autoencoder": AUTOENCODER,
    "process": {"kind": "vp-scaled-linear", "beta_start": 0.0015, "beta_end": 0.0205},
    "generation": {"sampler": "ddim", "steps": 50, "spacing": "leading"},
    "skull_stripped": True,
}

# Ages and the order of the sexes are from the authors' demonstration; for the two volumes the bundle gives a range of 0 to 1
# only. Crop and affine are those of the bundle's saver; by the affine, the first axis of the model runs to the left.
MODEL_ZOO = SHARED | {
    "skull_stripped": False,
    "unet": UNET | {"concatenate": True},
    "covariates": [
        {"name": "sex", "categories": ["F", "M"]},
        {"name": "age", "unit": "years", "range": [44, 82]},
        {"name": "ventricular_volume_ml", "unit": "ml", "range": [6.99568, 171.375]},
        {"name": "brain_volume_ml", "unit": "ml", "range": [1144.24, 1793.91]},
    ],
    "grid": {"shape": [160, 224, 160], "spacing_mm": 1},
    "crop": [[5, 5], [5, 5], [0, 15]],
    "affine": [[-1, 0, 0, 96.48149872], [0, 1, 0, -141.47715759], [0, 0, 1, -156.55375671], [0, 0, 0, 1]],
    "scale_factor": 1.0,
}
# Volumes are SynthSeg's, in mm3 after affine registration to MNI152; their ranges are the training set's. The affine is that
# of MNI152 at 1.5 mm, one voxel further in: 120 x 144 x 120 voxels are the middle of its 122 x 146 x 122.
BRLP = SHARED | {
    "unet": UNET,
    "covariates": [
        {"name": "age", "unit": "years", "range": [0, 100]},
        {"name": "sex", "categories": ["M", "F"]},
        {"name": "diagnosis", "categories": ["CN", "MCI", "AD"]},
        {"name": "cerebral_cortex_mm3", "unit": "mm3"},
        {"name": "hippocampus_mm3", "unit": "mm3"},
        {"name": "amygdala_mm3", "unit": "mm3"},
        {"name": "cerebral_white_matter_mm3", "unit": "mm3"},
        {"name": "lateral_ventricle_mm3", "unit": "mm3"},
    ],
    "grid": {"shape": [120, 144, 120], "spacing_mm": 1.5},
    "affine": [[-1.5, 0, 0, 88.5], [0, 1.5, 0, -124.5], [0, 0, 1.5, -70.5], [0, 0, 0, 1]],
}
LAYOUTS = {"latentdiffusion": BRLP, "diffusion_model": MODEL_ZOO, "model": MODEL_ZOO}

Row = tuple[float, float, float, float]
Planes = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class ScaledCovariate(Section):
    """A covariate that enters the network as a number from 0 to 1: by its `range`, or categories in equal steps."""

    name: Annotated[str, Field(pattern=NAME)]
    unit: str = ""
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _range_or_categories(self):
        if bool(self.range) == bool(self.categories):
            raise ValueError(f"covariate {self.name} needs either `range: [lowest, highest]` or `categories`")
        if self.range and self.range[0] >= self.range[1]:
            raise ValueError(f"covariate {self.name}: range {self.range} must rise")
        return self

    def covariate(self) -> Covariate:
        if self.categories:
            return Covariate(self.name, "categorical", categories=self.categories, required=True)
        low, high = self.range
        return Covariate(self.name, "continuous", self.unit, mean=low, std=high - low, seen=self.range, required=True)


class PublishedUNetConfig(MonaiUNetConfig):
    """A U-Net that reads the covariates' values themselves."""

    conditioning: Literal["values"] = "values"
    concatenate: bool = False


class ImportConfig(Section):
    """The settings that two files of weights need to become a pipeline."""

    autoencoder: MonaiAutoencoderConfig
    unet: PublishedUNetConfig
    covariates: tuple[ScaledCovariate, ...]  # in the order of the network's input
    grid: GridConfig  # of the autoencoder's volumes
    crop: tuple[Planes, Planes, Planes] = NO_CROP  # planes (before, after) that generated volumes lose
    affine: tuple[Row, Row, Row, Row] | None = None  # of generated volumes; None centres the grid at 0
    process: ProcessConfig
    target: Literal["noise", "v", "data"] = "noise"
    scale_factor: Annotated[float, Field(gt=0)]  # latents of the U-Net = scale_factor times latents of the autoencoder
    generation: GenerationConfig
    skull_stripped: bool = False
    suffix: Suffix = "T1w"  # BIDS suffix of what it generates


def import_model(folder: Path, out: Path, library: str = "monai", settings: Path | None = None) -> Pipeline:
    """Make a pipeline of a published model and write it.

    Args:
        folder: see the top of this file.
        out: pipeline folder to write; must be empty or absent.
        library: of the new networks, "monai" or "monai-generative"; the weights may be of either.
        settings: read instead of FOLDER/import.yaml.

    Raises:
        InputError: no such model in `folder`, settings that are wrong or missing, or weights that are not of these networks.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty; choose another --out")
    choose("library", library, get_args(MonaiLibrary))
    weights, stem = find_weights(folder)
    config = read_settings(folder, stem, library, settings)
    latents = config.autoencoder.latent_channels
    schema = CovariateSchema(tuple(c.covariate() for c in config.covariates))
    grid = make_grid(config)

    def load(part: str, path: Path, **arguments: Any) -> Pretrained:
        network = make_network(part, **arguments)
        load_weights(network.network, convert(read_weights(path), network.network.state_dict(), path), path)
        return network.eval().requires_grad_(False)

    autoencoder = load("Autoencoder", weights["autoencoder"], **config.autoencoder.model_dump())
    of_data = {"in_channels": latents, "out_channels": latents, "num_categories": schema.num_categories}
    unet = load("UNet", weights["unet"], **of_data, **config.unet.model_dump())
    autoencoder.latent_std.fill_(1 / config.scale_factor)

    process = make_process(**config.process.model_dump(exclude_none=True))
    sampling = Sampling(**config.generation.model_dump())
    stripped = config.skull_stripped
    pipeline = Pipeline(autoencoder, unet, schema, grid, process, config.target, sampling, stripped, crop=config.crop)
    pipeline.suffix = config.suffix
    pipeline.save_pretrained(out)
    return pipeline


def find_weights(folder: Path) -> tuple[dict[str, Path], str]:
    """({"autoencoder": file, "unet": file}, stem of the U-Net's file)."""

    def find(stem: str) -> Path | None:
        paths = (parent / f"{stem}{suffix}" for parent in (folder, folder / "models") for suffix in SUFFIXES)
        return next((path for path in paths if path.is_file()), None)

    autoencoder = find("autoencoder")
    unets = {stem: path for stem in LAYOUTS if (path := find(stem))}
    if autoencoder is None or not unets:
        raise InputError(
            f"{folder} holds no published model: expected autoencoder.pth, and diffusion_model.pth or model.pt (MONAI's model "
            "zoo) or latentdiffusion.pth (Brain Latent Progression), there or in its folder models"
        )
    if len(unets) > 1:
        raise InputError(f"{folder} holds several U-Nets, {', '.join(p.name for p in unets.values())}; leave one")
    stem, unet = next(iter(unets.items()))
    return {"autoencoder": autoencoder, "unet": unet}, stem


def read_settings(folder: Path, stem: str, library: str, settings: Path | None) -> ImportConfig:
    """The layout's settings, overridden by configs/inference.json, and these by the user's."""
    values = deepcopy(LAYOUTS[stem])
    bundle = folder / "configs" / "inference.json"
    if bundle.is_file():
        for key, found in read_bundle(bundle).items():
            values[key] = {**values[key], **found}
    source = settings or folder / SETTINGS
    given: dict[str, Any] = {}
    if settings or source.is_file():
        given = _read_yaml(source)
    if "grid" in given:  # the layout's crop and affine belong to its own grid
        values = {key: value for key, value in values.items() if key not in ("crop", "affine")}
    ranges = given.pop("ranges", {})
    for key, value in given.items():
        together = isinstance(value, dict) and isinstance(values.get(key), dict) and key != "grid"
        values[key] = {**values[key], **value} if together else value
    _set_ranges(values, ranges, source)
    for part in ("autoencoder", "unet"):
        if isinstance(values.get(part), dict):
            values[part] = {**values[part], "kind": library, "flash_attention": library == "monai"}
    if library == "monai" and isinstance(values.get("unet"), dict):
        values["unet"]["upcast_attention"] = False  # the same in float32; in half precision MONAI core's own code stops
    try:
        return ImportConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {explain(error, ImportConfig)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no file {path}")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; write for example `scale_factor: 1.0`")
    return values


def _set_ranges(values: dict[str, Any], ranges: Any, source: Path) -> None:
    """Put the user's ranges into the covariates, and report all that are still missing at once."""
    covariates = values["covariates"] if isinstance(values["covariates"], list) else []
    covariates = [c for c in covariates if isinstance(c, dict)]
    if not isinstance(ranges, dict):
        raise InputError(f"{source}: ranges is {ranges!r}; write {{covariate: [lowest, highest]}}")
    for name, limits in ranges.items():
        choose("covariate in `ranges`", name, [str(c.get("name")) for c in covariates])
        next(c for c in covariates if c.get("name") == name)["range"] = limits
    missing = [c.get("name") for c in covariates if not c.get("range") and not c.get("categories")]
    asked = ["scale_factor: 1.0"] * ("scale_factor" not in values)
    if missing:
        asked.append(f"ranges: {{{', '.join(f'{name}: [lowest, highest]' for name in missing)}}}")
    if asked:
        raise InputError(
            "the model's files do not say what its latents were multiplied by, or how its covariates were scaled to 0..1; "
            f"write what was used in its training into {source}, as: {'; '.join(asked)}"
        )


def make_grid(config: ImportConfig) -> Grid:
    """The grid of the autoencoder's volumes; the affine of the settings is that of the cropped ones."""
    shape, spacing = config.grid.shape, config.grid.spacing_mm
    factor = config.autoencoder.downsampling
    if any(n % factor for n in shape):
        raise InputError(f"grid.shape {shape} must be divisible by the autoencoder's downsampling {factor}")
    if any(sum(planes) >= n for n, planes in zip(shape, config.crop)):
        raise InputError(f"crop {config.crop} leaves nothing of grid.shape {shape}")
    if config.affine is None:
        return Grid.centred(shape, spacing)
    affine = np.array(config.affine, dtype=np.float64)
    if not np.allclose(spacing_of(affine), spacing):
        raise InputError(f"affine has voxels of {spacing_of(affine).tolist()} mm, grid.spacing_mm says {spacing}")
    affine[:, 3] = affine @ [*(-before for before, _ in config.crop), 1]
    return Grid(shape, spacing, affine)
