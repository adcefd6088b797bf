"""One strict YAML file per experiment.

Every key is checked when the file is read: an unknown one, a wrong type or two settings that contradict each other end
in an `InputError` that says where and what to write instead. Relative paths start at the current directory.
"""

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from ldm3d.covariates import NAME, Covariate, CovariateSchema
from ldm3d.errors import InputError, shown
from ldm3d.yaml_files import parse_yaml, read_yaml

MAX_VOXELS = 2**30  # of the grid: 1024^3
# What no covariate can be called: columns of ldm3d's own tables, options of `ldm3d generate`, arguments of a pipeline's call
RESERVED_NAMES = frozenset(
    {
        *("subject", "session", "path", "key", "split", "participant_id", "session_id"),
        *("ask", "audit", "batch_size", "check", "compile", "device", "group", "guidance", "help", "no_check", "num", "out"),
        *("precision", "sampler", "seed", "steps", "table", "threads", "volumes"),
        *("guidance_interval", "guidance_rescale", "num_volumes", "progress", "rows", "self", "spacing"),
    }
)

Positive = Annotated[int, Field(gt=0)]
_SHOWN = 10  # of many mistakes, those that a message spells out
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _types(annotation: Any) -> set[type]:
    """All types that an annotation is made of."""
    return {annotation} if isinstance(annotation, type) else set().union(*map(_types, get_args(annotation)))


def _write_flags(value: Any) -> Any:
    """yes and true as text, in lists too."""
    if isinstance(value, list | tuple):
        return [_write_flags(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value


class Section(BaseModel):
    """A part of the file: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _flags_are_no_numbers(cls, values: Any) -> Any:
        """Where a number belongs yes and true become text, which is an error; pydantic would take them for 1."""
        if not isinstance(values, dict):
            return values
        types = {name: _types(field.annotation) for name, field in cls.model_fields.items()}
        numbers = {name for name, found in types.items() if found & {int, float} and bool not in found}
        return {name: _write_flags(value) if name in numbers else value for name, value in values.items()}


class GridConfig(Section):
    """The grid that every volume is brought to: `shape` voxels (right, anterior, superior) of `spacing_mm`."""

    shape: tuple[Positive, Positive, Positive]
    spacing_mm: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]

    @model_validator(mode="before")
    @classmethod
    def _isotropic(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("spacing_mm"), int | float | str):
            values = {**values, "spacing_mm": [values["spacing_mm"]] * 3}
        return values

    @model_validator(mode="after")
    def _fits_memory(self):
        if math.prod(self.shape) > MAX_VOXELS:
            raise ValueError(f"shape {self.shape} has {math.prod(self.shape):,} voxels; at most {MAX_VOXELS:,} are worked on")
        return self


class SplitConfig(Section):
    """Share of the subjects held out; the rest trains."""

    validation: Fraction = 0.1
    test: Fraction = 0.1
    seed: Annotated[int, Field(ge=0)] = 0  # apart from the experiment's, so that repeats with other seeds share the split

    @model_validator(mode="after")
    def _leaves_training(self):
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} and test {self.test} leave no subject to train on")
        return self


def _texts(values: Any) -> Any:
    """One word or a list of them as a tuple of texts; numbers as they are written in short."""
    words = list(values) if isinstance(values, list | tuple | dict) else [values]
    for word in words:
        if isinstance(word, bool):
            raise ValueError(f"{str(word).lower()} is no text: YAML reads yes, no, on and off so; put the word in quotes")
        if not isinstance(word, str | int | float):
            raise ValueError(f"{shown(word)} is neither text nor a number")
    texts = tuple(str(word) for word in words)
    if twice := [word for word in texts if texts.count(word) > 1]:
        raise ValueError(f"{shown(twice[0])} is there twice; keep one")
    return texts


Codes = Annotated[tuple[str, ...], BeforeValidator(_texts)]  # words of a table, or one of them
ENTITIES = (  # what BIDS file names say of a file beside its subject, as it stands there
    *("ses", "acq", "ce", "chunk", "den", "desc", "dir", "echo", "flip", "hemi", "inv", "label", "mod", "mt", "part", "rec"),
    *("res", "run", "sample", "seg", "space", "trc"),
)
Suffix = Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$")]  # becomes part of file names


class DataConfig(Section):
    """Where the scans and covariates are: a BIDS dataset (`bids`), or any CSV or TSV with a column of paths (`table`)."""

    bids: Path | None = None
    table: Path | None = None
    root: Path | None = None  # no scan lies outside; relative paths start here. Default: the table's folder, or `bids`
    # Of the BIDS files, and of the volumes that a model of them generates
    suffix: Suffix = "T1w"
    # Which BIDS file of a session is its scan: {space: MNI152NLin2009cAsym, run: 1}; null for without, a list for each of them
    filter: dict[str, Any] = {}
    skull_stripped: bool = False  # whether the scans are; BIDS wants to know it of generated volumes
    path_column: str = "path"
    subject_column: str = "participant_id"
    session_column: str = "session_id"
    participants: Path | None = None  # table of covariates for `bids`, if it is not the dataset's own participants.tsv
    missing: Codes | None = None  # what stands for a missing value in any column; a covariate's own list takes its place
    grid: GridConfig
    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]] = (0.0, 99.8)
    splits: SplitConfig = SplitConfig()

    @field_validator("filter")
    @classmethod
    def _entities(cls, wanted: dict[str, Any]) -> dict[str, Any]:
        for entity, value in wanted.items():
            if entity not in ENTITIES:
                close = {"acquisition": ["acq"], "session": ["ses"]}.get(entity)
                close = close or difflib.get_close_matches(entity[:100], ENTITIES, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(ENTITIES)}"
                raise ValueError(f"{shown(entity)} is no entity of file names that is known; {hint}")
            for each in value if isinstance(value, list) and value else [value]:
                is_text = isinstance(each, str | int) and not isinstance(each, bool)
                if each is not None and not (is_text and re.fullmatch("[A-Za-z0-9+]+", str(each))):
                    raise ValueError(f"{entity} is {shown(each)}; give a label, a list of them, or null for none")
        return wanted

    @model_validator(mode="after")
    def _one_source(self):
        if (self.bids is None) == (self.table is None):
            raise ValueError("give either `bids: FOLDER` or `table: FILE.csv`")
        if self.participants and not self.bids:
            raise ValueError("`participants` goes with `bids`; a `table` has the covariates itself")
        if self.percentiles[0] >= self.percentiles[1]:
            raise ValueError(f"percentiles {self.percentiles} must rise")
        return self


class CovariateConfig(Section):
    """One covariate and the column of the table that holds it (default: the column of its name).

    `categories` lists the values of a categorical one, [F, M], or says what else stands for them: {F: [female, 2], M: [1]}.
    `missing` lists what stands for a missing value beside empty cells and n/a; given, it is complete: [] says that every
    number in the column is a value, however odd.
    """

    name: Annotated[str, Field(pattern=NAME)]
    column: str | None = None
    kind: Literal["continuous", "categorical"]
    unit: str = ""
    range: tuple[float, float] | None = None
    categories: dict[str, Codes] = {}
    missing: Annotated[Codes | None, Field(exclude_if=lambda codes: codes is None)] = None

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str, info: ValidationInfo) -> str:
        if name in RESERVED_NAMES and not (info.context or {}).get("saved"):
            raise ValueError(
                f"{name!r} is the name of an option, an argument or a column of ldm3d's own tables; "
                f"write `name: patient_{name}, column: {name}`"
            )
        return name

    @field_validator("categories", mode="before")
    @classmethod
    def _listed_or_named(cls, values: Any) -> Any:
        if isinstance(values, list | tuple):
            return {name: () for name in _texts(values)}
        if isinstance(values, dict):
            return dict(zip(_texts(values), (value if value is not None else () for value in values.values())))
        return values

    @field_validator("categories")
    @classmethod
    def _one_meaning_each(cls, values: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        meanings = {category.lower(): category for category in values}
        for category, aliases in values.items():
            if category.strip().lower() in ("", "n/a"):
                raise ValueError(f"{category!r} is how tables write a missing value; leave it out, or call it otherwise")
            for alias in aliases:
                if (other := meanings.setdefault(alias.lower(), category)) != category:
                    raise ValueError(f"{shown(alias)} stands for {shown(other)} and {shown(category)}; list it once")
        return values

    @model_validator(mode="after")
    def _no_category_is_missing(self):
        words = {word for category, aliases in self.categories.items() for word in (category, *aliases)}
        if both := sorted(words & set(self.missing or ())):
            raise ValueError(f"{shown(both[0])} is a category and stands for a missing value; drop it from one of them")
        return self

    @field_serializer("categories")
    def _as_it_was_listed(self, values: dict[str, tuple[str, ...]]) -> Any:
        return values if any(values.values()) else list(values)

    def covariate(self) -> Covariate:
        """The covariate, not yet fitted to a training split."""
        aliases = {category: words for category, words in self.categories.items() if words}
        return Covariate(self.name, self.kind, self.unit, self.range, tuple(self.categories), aliases=aliases)


class TrainingConfig(Section):
    """What both training loops share. Batch sizes are global: over all processes and accumulated gradients."""

    steps: Positive
    batch_size: Positive
    accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)]
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Fraction = 0.999
    # What the stage hands on: the averaged network after the last step, or the best of validation by the loss that is trained
    keep: Literal["last", "best"] = "last"
    max_skipped_steps: Annotated[int, Field(ge=0)] = 20  # whose loss is NaN or infinite; more end the training
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 where the hardware multiplies it
    log_every: Positive = 10
    validate_every: Positive = 100
    preview_every: Positive = 500
    checkpoint_every: Positive = 500
    workers: Annotated[int, Field(ge=0)] = 0  # processes that read data ahead; 0 reads in the training process

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError("float16 is no longer trained in; use bf16, which needs no loss scaling, or no (float32)")
        return "no" if value is False else value  # YAML reads an unquoted no as false

    @model_validator(mode="after")
    def _accumulation_divides(self):
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulation {self.accumulation}")
        return self


MonaiLibrary = Literal["monai", "monai-generative"]  # MONAI core, and the package its networks were published with


def _network_tag(network: Any) -> str:
    """Which section a `network:` is checked as, by its `kind`."""
    kind = network.get("kind", "ldm3d") if isinstance(network, dict) else getattr(network, "kind", "ldm3d")
    return "monai" if kind in get_args(MonaiLibrary) else str(kind)


NETWORK_KIND = Discriminator(_network_tag)


def _check_groups(channels: Sequence[int], norm_num_groups: int) -> None:
    if any(width % norm_num_groups for width in channels):
        raise ValueError(
            f"norm_num_groups {norm_num_groups} must divide every width of the channels {tuple(channels)}; "
            f"use multiples of {norm_num_groups}, or fewer groups"
        )


class AutoencoderNetworkConfig(Section):
    """Arguments of `ldm3d.models.autoencoder.Autoencoder`."""

    kind: Literal["ldm3d"] = "ldm3d"
    latent_channels: Positive
    downsampling: Positive
    channels: tuple[Positive, ...]
    blocks: Annotated[int, Field(ge=0)] = 2
    attention: bool = False
    linear_path: bool = True

    @model_validator(mode="after")
    def _power_of_two(self):
        levels = max(1, self.downsampling.bit_length() - 1)
        if self.downsampling & (self.downsampling - 1) or len(self.channels) != levels:
            raise ValueError(
                f"downsampling {self.downsampling} must be a power of two, 2^k, with k numbers of channels (one at each of "
                f"1/2, 1/4, ... of the resolution), got channels {self.channels}"
            )
        return self


class MonaiAutoencoderConfig(Section):
    """Arguments of `ldm3d.models.monai.MonaiAutoencoder`; `channels` begin at the volume's own resolution."""

    linear_path: ClassVar[bool] = False

    kind: MonaiLibrary
    latent_channels: Positive
    channels: tuple[Positive, ...]
    blocks: Positive = 2
    attention: tuple[bool, ...] = ()
    middle_attention: bool = False
    norm_num_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    flash_attention: bool = True

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channels) - 1)

    @model_validator(mode="after")
    def _levels_agree(self):
        if not self.channels or len(self.attention) not in (0, len(self.channels)):
            raise ValueError(f"attention {self.attention} needs one flag for each of the channels {self.channels}, or none")
        _check_groups(self.channels, self.norm_num_groups)
        return self


AutoencoderNetwork = Annotated[
    Annotated[AutoencoderNetworkConfig, Tag("ldm3d")] | Annotated[MonaiAutoencoderConfig, Tag("monai")], NETWORK_KIND
]


class PerceptualConfig(Section):
    """MONAI's perceptual loss on MedicalNet features; `weights` is a safetensors file of the ResNet-10."""

    weight: Annotated[float, Field(gt=0)]
    weights: Path


class AdversarialConfig(Section):
    """MONAI's patch discriminator with instance norm, from step `start` on."""

    weight: Annotated[float, Field(gt=0)]
    start: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    channels: Positive = 32
    layers: Positive = 3


class AutoencoderConfig(Section):
    """Stage 1."""

    network: AutoencoderNetwork
    linear_path_steps: Annotated[int, Field(ge=0)] = 600  # of the linear path alone, before the networks train
    l1: Annotated[float, Field(ge=0)] = 1.0
    l2: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 1e-6
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    changed_data: Literal["refuse", "go-on"] = "refuse"  # where a run that goes on finds other scans than it has seen
    training: TrainingConfig


class DecoderConfig(Section):
    """Stage 3, which is optional: the decoder alone, sharpened. The encoder and the latents stay as they are."""

    noise: Annotated[float, Field(ge=0)] = 0.2  # at most, in deviations of a latent: what the U-Net gets wrong
    l1: Annotated[float, Field(ge=0)] = 1.0
    l2: Annotated[float, Field(ge=0)] = 0.0
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    training: TrainingConfig


class ProcessConfig(Section):
    """The diffusion process; betas belong to vp-linear and vp-scaled-linear, gamma and the schedule's rate to vdm."""

    kind: Literal["flow", "vp-cosine", "vp-linear", "vp-scaled-linear", "vdm"] = "flow"
    beta_start: float | None = None
    beta_end: float | None = None
    # gamma = -log SNR at the data's end and at the noise's; None: those of ldm3d.diffusion.vdm.Schedule
    gamma_min: Annotated[float, Field(ge=-30, le=30)] | None = None
    gamma_max: Annotated[float, Field(ge=-30, le=30)] | None = None
    schedule_learning_rate: Annotated[float, Field(ge=0)] | None = None  # of gamma in between; 0 leaves it a straight line

    @model_validator(mode="after")
    def _betas_belong(self):
        if self.kind in ("flow", "vp-cosine", "vdm") and (self.beta_start, self.beta_end) != (None, None):
            raise ValueError(f"{self.kind} has no betas; drop beta_start and beta_end, or use vp-linear or vp-scaled-linear")
        return self

    @model_validator(mode="after")
    def _gamma_belongs(self):
        if self.kind != "vdm" and (self.gamma_min, self.gamma_max, self.schedule_learning_rate) != (None, None, None):
            raise ValueError(
                f"{self.kind} has no schedule to be learned; drop gamma_min, gamma_max and schedule_learning_rate, or use vdm"
            )
        ends = (self.gamma_min, self.gamma_max)
        if ends != (None, None) and (None in ends or self.gamma_min >= self.gamma_max):
            raise ValueError(f"gamma_min {self.gamma_min} and gamma_max {self.gamma_max}: give both, rising, or none of them")
        return self


class TimeSamplingConfig(Section):
    """How training times are drawn; location and scale belong to logit-normal."""

    kind: Literal["uniform", "logit-normal"] = "logit-normal"
    location: float = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0


class UNetConfig(Section):
    """Arguments of `ldm3d.models.unet.UNet`, beside those that follow from the data."""

    kind: Literal["ldm3d"] = "ldm3d"
    channels: tuple[Positive, ...]
    blocks: Positive = 1
    attention: tuple[bool, ...]
    head_channels: Positive = 32
    context_dim: Positive = 64
    tokens_per_covariate: Positive = 1
    covariates_in_time_embedding: bool = True
    activation_checkpointing: bool = False
    attention_backend: Literal["auto", "sdpa", "xformers", "math"] = "auto"
    fourier_features: tuple[Annotated[int, Field(ge=-8, le=16)], ...] | None = None

    @model_validator(mode="after")
    def _one_flag_a_level(self):
        if len(self.attention) != len(self.channels):
            raise ValueError(f"attention {self.attention} needs one flag for each of the channels {self.channels}")
        for width, attend in zip(self.channels, self.attention):
            if attend and width % self.head_channels:
                raise ValueError(f"head_channels {self.head_channels} must divide the {width} channels that attend")
        return self


class MonaiUNetConfig(Section):
    """Arguments of `ldm3d.models.monai.MonaiUNet`, beside those that follow from the data."""

    kind: MonaiLibrary
    channels: tuple[Positive, ...]
    blocks: Positive = 2
    attention: tuple[bool, ...]
    head_channels: tuple[Annotated[int, Field(ge=0)], ...] = (32,)  # a number for each level, or one for all
    context_dim: Positive = 64
    tokens_per_covariate: Positive = 1
    transformer_layers: Positive = 1
    resblock_updown: bool = False
    norm_num_groups: Positive = 32
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    upcast_attention: bool = False
    flash_attention: bool = True

    @model_validator(mode="before")
    @classmethod
    def _heads_of_every_level(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("head_channels"), int):
            values = {**values, "head_channels": [values["head_channels"]]}
        return values

    @model_validator(mode="after")
    def _levels_agree(self):
        if not self.channels or len(self.attention) != len(self.channels):
            raise ValueError(f"attention {self.attention} needs one flag for each of the channels {self.channels}")
        if len(self.head_channels) not in (1, len(self.channels)):
            raise ValueError(f"head_channels {self.head_channels} must be one number, or one for each of {self.channels}")
        heads = self.head_channels * (len(self.channels) if len(self.head_channels) == 1 else 1)
        for width, head, attend in zip(self.channels, heads, (*self.attention[:-1], True)):  # the middle attends, too
            if attend and (head == 0 or width % head):
                raise ValueError(f"head_channels {head} must divide the {width} channels that attend")
        if self.upcast_attention and self.kind == "monai":
            raise ValueError("upcast_attention stops MONAI core's network in half precision; use monai-generative or drop it")
        _check_groups(self.channels, self.norm_num_groups)
        return self


UNetNetwork = Annotated[Annotated[UNetConfig, Tag("ldm3d")] | Annotated[MonaiUNetConfig, Tag("monai")], NETWORK_KIND]


class DiffusionConfig(Section):
    """Stage 2."""

    process: ProcessConfig = ProcessConfig()
    target: Literal["noise", "v", "data", "velocity"] = "v"
    time_sampling: TimeSamplingConfig = TimeSamplingConfig()
    loss_weight: Literal["none", "min-snr"] = "none"
    drop_covariates: Fraction = 0.3  # share of the samples that leave some covariates open, or all
    network: UNetNetwork
    training: TrainingConfig

    @model_validator(mode="after")
    def _vdm_trains_on_the_bound(self):
        if self.process.kind != "vdm":
            return self
        conflicts = []
        if self.time_sampling.kind != "uniform":
            conflicts.append(f"time_sampling.kind {self.time_sampling.kind}: set it to uniform, the schedule places the times")
        if self.loss_weight != "none":
            conflicts.append(f"loss_weight {self.loss_weight}: set it to none, the bound has a weight of its own")
        if self.target == "velocity":
            conflicts.append("target velocity: use v, noise or data, which do not depend on a schedule that moves")
        if conflicts:
            raise ValueError(f"process.kind vdm does not go with {'; nor with '.join(conflicts)}")
        return self


class GenerationConfig(Section):
    """What generation does unless it is asked otherwise; saved with the pipeline."""

    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpmpp-2m", "unipc", "sde-euler", "sde-heun", "sde-pc"] = "heun"
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 1.0
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    # Of the times; None: the sampler's own
    spacing: Literal["uniform", "quadratic", "lambda", "karras", "share", "leading"] | None = None

    @model_validator(mode="after")
    def _interval_rises(self):
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} must rise")
        return self


class Config(Section):
    """The whole file."""

    name: str
    output: Path  # everything an experiment makes lies below this folder
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    covariates: tuple[CovariateConfig, ...] = ()  # none: volumes are generated, and nothing is asked of them
    autoencoder: AutoencoderConfig
    diffusion: DiffusionConfig
    decoder: DecoderConfig | None = None
    generation: GenerationConfig = GenerationConfig()

    @model_validator(mode="after")
    def _covariates_make_sense(self):
        self.schema()  # raises what is wrong with them
        return self

    @model_validator(mode="after")
    def _grid_fits(self):
        shape, factor = self.data.grid.shape, self.autoencoder.network.downsampling
        if any(n % factor for n in shape):
            down, up = (tuple(r * factor for r in rows) for rows in zip(*[(n // factor, -(-n // factor)) for n in shape]))
            raise ValueError(
                f"data.grid.shape {shape} must be divisible by autoencoder.network.downsampling {factor}; "
                f"crop to {down} or pad to {up}"
            )
        return self

    @model_validator(mode="after")
    def _spacing_fits(self):
        kind = self.diffusion.process.kind
        if self.generation.spacing == "leading" and kind in ("flow", "vp-cosine", "vdm"):
            raise ValueError(
                f"generation.spacing leading counts the steps of a DDPM's chain, which diffusion.process.kind {kind} has "
                "not; use vp-linear or vp-scaled-linear, or another spacing"
            )
        return self

    def schema(self) -> CovariateSchema:
        """The covariates, not yet fitted to a training split."""
        return CovariateSchema(tuple(c.covariate() for c in self.covariates))

    # Where the parts of an experiment lie; nobody else joins these names.
    @property
    def prepared_folder(self) -> Path:
        return self.output / "prepared"

    @property
    def latents_folder(self) -> Path:
        return self.output / "latents"

    @property
    def autoencoder_run(self) -> Path:
        return self.output / "autoencoder-training"

    @property
    def autoencoder_folder(self) -> Path:
        return self.output / "autoencoder"

    @property
    def diffusion_run(self) -> Path:
        return self.output / "diffusion-training"

    @property
    def decoder_run(self) -> Path:
        return self.output / "decoder-training"

    @property
    def decoder_folder(self) -> Path:
        return self.output / "decoder"

    @property
    def model_folder(self) -> Path:
        return self.output / "model"


def load_config(path: Path | str, overrides: Sequence[str] = (), section: str | None = None) -> Config:
    """Read and check an experiment's YAML file.

    Args:
        path: the file.
        overrides: "key.subkey=value" each; the value is read as YAML.
        section: a training stage's own section ("autoencoder", "diffusion"), in which an override's key is looked up
            when the top of the file has no such key: `training.steps=500` is then enough.

    Raises:
        InputError: file missing, too long or no YAML, a key twice, unknown key (the nearest valid one is named), wrong type,
            contradiction.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no config file {path}")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; a config starts with `name:` and `output:`")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"--set {shown(override)}: write --set key.subkey=value")
        keys = key.split(".")
        if section and keys[0] not in Config.model_fields:
            keys = [section, *keys]
        try:
            value = parse_yaml(text, "it")
        except InputError as error:
            raise InputError(f"--set {shown(override)}: {shown(text)} is not a YAML value ({error})") from None
        _set(values, keys, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None


def explain(error: ValidationError, root: type[Section] = Config) -> str:
    """What is wrong with the values of a section, in words."""
    problems = [_explain(problem, root) for problem in error.errors()]
    return "; ".join(problems[:_SHOWN]) + (f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")


def _set(values: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        # A copy: YAML's aliases are one object in several places, of which only this one is meant
        values[key] = dict(values[key]) if isinstance(values.get(key), dict) else {}
        values = values[key]
    values[keys[-1]] = value


def _explain(problem: dict, root: type[Section]) -> str:
    """One of pydantic's errors as a sentence with the key's full name."""
    location, section = _resolve(problem["loc"], root)
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        fields = list(section.model_fields)
        close = difflib.get_close_matches(location[-1][:100], fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(fields)}"
        return f"unknown key {shown(where)}; {hint}"
    if problem["type"] == "union_tag_invalid":
        known = ", ".join(("ldm3d", *get_args(MonaiLibrary)))
        return f"{where}.kind is {shown(problem['ctx']['tag'])}: use one of {known}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where} is {shown(problem['input'])}: {message}"


def _resolve(location: Sequence[str | int], root: type[Section]) -> tuple[list[str], type[Section]]:
    """(the keys of pydantic's `location`, as they stand in the file; the section that the last of them is in)."""
    keys, section, choices = [], root, {}
    for part in location:
        if part in choices:  # which of several kinds of section was meant: no key of the file
            section, choices = choices[part], {}
            continue
        keys.append(str(part))
        if part in section.model_fields and part != location[-1]:
            section, choices = _sections(section.model_fields[part].annotation, section)
    return keys, section


def _sections(annotation: Any, default: type[Section]) -> tuple[type[Section], dict[str, type[Section]]]:
    """The section that a field holds (`default` if none), and all of them by tag where a `kind` decides."""
    found, choices = default, {}
    for candidate in (annotation, *get_args(annotation)):
        plain, *extra = get_args(candidate) if get_args(candidate) else (candidate,)
        if isinstance(plain, type) and issubclass(plain, Section):
            found = plain
            choices |= {tag.tag: plain for tag in extra if isinstance(tag, Tag)}
    return found, choices
