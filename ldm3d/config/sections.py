"""One strict YAML file per experiment.

Every key is checked when the file is read: an unknown one, a wrong type or two settings that contradict each other end
in an `InputError` that says where and what to write instead. Relative paths start at the current directory.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ldm3d.config.base import Fraction, Positive, Sampler, Section
from ldm3d.config.coded import check_channels, check_label_maps
from ldm3d.config.conditions import (
    Condition,
    ImageCondition,
    LabelsCondition,
    check_detail,
    check_made,
    check_names,
    check_sides,
    check_told,
)
from ldm3d.config.data import CovariateConfig, DataConfig
from ldm3d.config.networks import AutoencoderNetwork, UNetNetwork
from ldm3d.config.training import AdversarialConfig, PerceptualConfig, TrainingConfig
from ldm3d.covariates import CovariateSchema
from ldm3d.errors import nearest

PROBABILITIES = "probseg"  # BIDS suffix of label maps that are shares of each voxel


class AutoencoderConfig(Section):
    """Stage 1."""

    network: AutoencoderNetwork
    # A trained model whose autoencoder is taken, as it is, and not trained; `network` has to describe it
    shared: Annotated[str | None, Field(exclude_if=lambda model: model is None)] = None
    # unit: variance 1 for each latent channel; voxels: the scale at which it changes the voxels, so that detail drowns first
    latent_scaling: Literal["unit", "voxels"] = "unit"
    linear_path_steps: Annotated[int, Field(ge=0)] = 600  # of the linear path alone, before the networks train
    l1: Annotated[float, Field(ge=0)] = 1.0
    l2: Annotated[float, Field(ge=0)] = 0.0
    kl: Annotated[float, Field(ge=0)] = 1e-6
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    # Mirror training volumes at random, and shift them by less than a block of `downsampling` voxels
    augment: Annotated[bool, Field(exclude_if=lambda augment: not augment)] = False
    changed_data: Literal["refuse", "go-on"] = "refuse"  # if a resumed run finds other scans than it has seen
    training: TrainingConfig


class DecoderConfig(Section):
    """Stage 3, which is optional: the decoder alone is trained further. Encoder and latents stay as they are."""

    noise: Annotated[float, Field(ge=0)] = 0.2  # largest deviation, in units of a latent's: imitates errors of the U-Net
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
    # gamma = -log SNR at the data's end and at the noise's; None: the defaults of ldm3d.diffusion.vdm.VDMSchedule
    gamma_min: Annotated[float, Field(ge=-30, le=30)] | None = None
    gamma_max: Annotated[float, Field(ge=-30, le=30)] | None = None
    schedule_learning_rate: Annotated[float, Field(ge=0)] | None = None  # of gamma between its ends; 0: a straight line

    @model_validator(mode="after")
    def _betas_belong(self) -> Self:
        if self.kind in ("flow", "vp-cosine", "vdm") and (self.beta_start, self.beta_end) != (None, None):
            raise ValueError(f"{self.kind} has no betas; drop beta_start and beta_end, or use vp-linear or vp-scaled-linear")
        return self

    @model_validator(mode="after")
    def _gamma_belongs(self) -> Self:
        if self.kind != "vdm" and (self.gamma_min, self.gamma_max, self.schedule_learning_rate) != (None, None, None):
            raise ValueError(
                f"{self.kind} has no schedule to be learned; drop gamma_min, gamma_max and schedule_learning_rate, or use vdm"
            )
        low, high = self.gamma_min, self.gamma_max
        if (low is None) != (high is None) or (low is not None and high is not None and low >= high):
            raise ValueError(f"gamma_min {low} and gamma_max {high}: give both, rising, or none of them")
        return self


class TimeSamplingConfig(Section):
    """How training times are drawn; location and scale belong to logit-normal."""

    kind: Literal["uniform", "logit-normal"] = "logit-normal"
    location: float = 0.0
    scale: Annotated[float, Field(gt=0)] = 1.0


class StartConfig(Section):
    """The Gaussian of the training latents that denoises at high noise (`ldm3d.start`)."""

    components: Positive = 96  # principal components of the latents; fewer where there are too few scans
    until: Annotated[float, Field(gt=0, lt=100)] = 1.0  # sigma / alpha from which on the network denoises
    # The network sees the Gaussian's answer, and learns what it leaves
    residual: Annotated[bool, Field(exclude_if=lambda residual: not residual)] = False
    refit: Annotated[bool, Field(exclude_if=lambda refit: not refit)] = False  # to these scans, though init_from has one
    # The Gaussian knows the images of `conditions`, too (ldm3d.reading)
    images: Annotated[bool, Field(exclude_if=lambda images: not images)] = False


class DiffusionConfig(Section):
    """Stage 2."""

    process: ProcessConfig = ProcessConfig()
    target: Literal["noise", "v", "data", "velocity"] = "v"
    time_sampling: TimeSamplingConfig = TimeSamplingConfig()
    loss_weight: Literal["none", "min-snr", "noise", "level"] = "none"
    drop_covariates: Fraction = 0.3  # share of the samples for which some or all covariates are left open
    # A Gaussian denoises at high noise, the network below it; None: the network alone, as at all noise with `conditions`
    start: Annotated[StartConfig | None, Field(exclude_if=lambda start: start is None)] = None
    # Train on brains mirrored from left to right, too, with the images that belong to them: twice as many
    mirror: Annotated[bool, Field(exclude_if=lambda mirror: not mirror)] = False
    network: UNetNetwork
    # A trained model, whose autoencoder and U-Net this one starts with
    init_from: Annotated[str | None, Field(exclude_if=lambda model: model is None)] = None
    # Images that the network is given beside covariates (ldm3d.conditions)
    conditions: Annotated[tuple[Condition, ...], Field(exclude_if=lambda conditions: not conditions)] = ()
    # The condition that is made, from the scan itself and the other conditions; None: the scan is made
    makes: Annotated[str | None, Field(exclude_if=lambda name: name is None)] = None
    training: TrainingConfig

    @property
    def learns_residual(self) -> bool:
        """Whether the network learns what the Gaussian leaves."""
        return self.start is not None and self.start.residual

    def channels(self, latent: int) -> dict[str, int]:
        """Those of the network's input and output, for latents of so many: beside z it may see the Gaussian's answer."""
        return {"in_channels": latent * (1 + self.learns_residual), "out_channels": latent}

    def objective(self) -> dict[str, Any]:
        """Arguments of `ldm3d.diffusion.objective.make_objective`."""
        beside = {"drop_covariates", "network", "training", "init_from", "conditions", "makes", "mirror"}
        if self.conditions:  # the network sees images at every level of noise
            beside.add("start")
        return self.model_dump(exclude=beside, exclude_none=True)

    @model_validator(mode="after")
    def _conditions_fit(self) -> Self:
        check_names(self.conditions)
        if self.mirror:
            check_sides(self.conditions)
        if self.conditions and self.start and not self.start.residual:
            raise ValueError("start: with `conditions` the network sees what the Gaussian says; set start.residual to true")
        if self.start and self.start.images and not self.conditions:
            raise ValueError("start.images: there are no `conditions`; leave it out")
        check_made(self.conditions, self.makes, self.init_from)
        if (self.conditions or self.init_from) and self.network.kind != "ldm3d":
            raise ValueError(f"conditions and init_from need ldm3d's own network, not one of {self.network.kind}")
        return self

    @model_validator(mode="after")
    def _vdm_trains_on_the_bound(self) -> Self:
        if self.process.kind != "vdm":
            return self
        conflicts = ["start: leave it out, a schedule that is learned begins with pure noise"] if self.start else []
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
    """Defaults of generation; saved with the pipeline."""

    sampler: Sampler = "heun"
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 1.0
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    image_guidance: Annotated[float, Field(ge=0, exclude_if=lambda scale: scale == 1)] = 1.0
    spread: Annotated[float, Field(gt=0, le=2, exclude_if=lambda factor: factor == 1)] = 1.0
    # Of the times; None: the sampler's own
    spacing: Literal["uniform", "quadratic", "lambda", "karras", "share", "leading"] | None = None

    @model_validator(mode="after")
    def _interval_rises(self) -> Self:
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval {self.guidance_interval} must rise")
        return self


def _below_output(name: str) -> property:
    return property(lambda config: config.output / name, doc=f"OUTPUT/{name}")


class Config(Section):
    """The file."""

    name: str
    output: Path  # the folder of everything that the experiment makes
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    covariates: tuple[CovariateConfig, ...] = ()  # none: an unconditional model
    autoencoder: AutoencoderConfig
    diffusion: DiffusionConfig
    decoder: DecoderConfig | None = None
    generation: GenerationConfig = GenerationConfig()

    @model_validator(mode="after")
    def _covariates_make_sense(self) -> "Config":
        self.schema()  # raises if they do not
        return self

    @model_validator(mode="after")
    def _balance_is_by_covariates(self) -> Self:
        names = [covariate.name for covariate in self.covariates]
        for name in self.data.balance.by if self.data.balance else ():
            if name not in names:
                close = nearest(name, names)
                hint = f"did you mean {close!r}?" if close else f"use {', '.join(names) or 'none: there are none'}"
                raise ValueError(f"data.balance.by: {name!r} is no covariate; {hint}")
        return self

    @model_validator(mode="after")
    def _told_covariates_exist(self) -> Self:
        check_detail(self.diffusion.conditions, self.autoencoder.network.downsampling)
        check_told(self.diffusion.conditions, [each.name for each in self.covariates if each.kind == "continuous"])
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> Self:
        shape, factor = self.data.grid.shape, self.autoencoder.network.downsampling
        if any(n % factor for n in shape):
            down, up = (tuple(r * factor for r in rows) for rows in zip(*[(n // factor, -(-n // factor)) for n in shape]))
            raise ValueError(
                f"data.grid.shape {shape} must be divisible by autoencoder.network.downsampling {factor}; "
                f"crop to {down} or pad to {up}"
            )
        return self

    @model_validator(mode="after")
    def _spacing_fits(self) -> Self:
        kind = self.diffusion.process.kind
        if self.generation.spacing == "leading" and kind in ("flow", "vp-cosine", "vdm"):
            raise ValueError(
                f"generation.spacing leading counts the steps of a DDPM's chain, and diffusion.process.kind {kind} has "
                "none; use vp-linear or vp-scaled-linear, or another spacing"
            )
        return self

    @model_validator(mode="after")
    def _scales_fit(self) -> Self:
        diffusion, by_channel = self.diffusion, self.autoencoder.latent_scaling == "voxels"
        if by_channel and (diffusion.target != "v" or diffusion.process.kind == "vdm"):
            raise ValueError(
                f"autoencoder.latent_scaling voxels needs diffusion.target v and a process other than vdm, not "
                f"{diffusion.target} and {diffusion.process.kind}; or set it to unit"
            )
        if diffusion.learns_residual and diffusion.target != "v":
            raise ValueError(f"diffusion.start.residual needs diffusion.target v, not {diffusion.target}")
        if diffusion.loss_weight in ("noise", "level") and not by_channel:
            raise ValueError(
                f"diffusion.loss_weight {diffusion.loss_weight} needs autoencoder.latent_scaling voxels; for channels of one "
                "variance use diffusion.target noise"
            )
        return self

    @property
    def given_conditions(self) -> tuple[Condition, ...]:
        """The conditions that the model is given: `diffusion.conditions`, with the scan in place of what is made instead."""
        diffusion, suffix = self.diffusion, self.data.suffix
        scan = ImageCondition(name=suffix, kind="image", suffix=suffix, drop=0.0)
        if self.made_labels:
            scan = scan.model_copy(update={"form": "voxels"})
        return tuple(
            scan.model_copy(update={"drop": each.drop}) if each.name == diffusion.makes else each
            for each in diffusion.conditions
        )

    @property
    def made_suffix(self) -> str:
        """BIDS suffix of what the model makes."""
        if self.made_labels:
            return PROBABILITIES
        made = (each for each in self.diffusion.conditions if each.name == self.diffusion.makes)
        return next((each.suffix for each in made if isinstance(each, ImageCondition) and each.suffix), self.data.suffix)

    @property
    def made_labels(self) -> LabelsCondition | None:
        """The label maps that the model makes, whose groups are the channels of its volumes; None: it makes images."""
        made = (each for each in self.diffusion.conditions if each.name == self.diffusion.makes)
        return next((each for each in made if isinstance(each, LabelsCondition)), None)

    @property
    def contrasts(self) -> tuple[ImageCondition, ...]:
        """What `data.channels` has beside the scan: found as images that are given are."""
        return tuple(ImageCondition(name=suffix, kind="image", suffix=suffix) for suffix in self.data.channels[1:])

    @property
    def autoencoder_arguments(self) -> dict[str, Any]:
        """Of `ldm3d.models.pretrained.make_network`: the network, with the channels of what the model makes."""
        labels, channels = self.made_labels, self.data.channels
        of_volumes = {"in_channels": len(labels.groups)} if labels else {"contrasts": len(channels)} if channels else {}
        return {**self.autoencoder.network.model_dump(), **of_volumes}

    @model_validator(mode="after")
    def _channels_fit(self) -> Self:
        check_label_maps(self.made_labels, self.autoencoder)
        check_channels(self.data.channels, self)
        return self

    @property
    def base_model(self) -> str | None:
        """The trained model whose autoencoder is taken; None: stage 1 trains one."""
        return self.autoencoder.shared or self.diffusion.init_from

    @model_validator(mode="after")
    def _one_base(self) -> Self:
        shared, start = self.autoencoder.shared, self.diffusion.init_from
        if shared and start and shared != start:
            raise ValueError(
                f"autoencoder.shared {shared} and diffusion.init_from {start}: a U-Net goes on with the latents that it was "
                "trained on; drop autoencoder.shared"
            )
        return self

    def schema(self) -> CovariateSchema:  # type: ignore[override]  # pydantic's, of JSON, is deprecated
        """The covariates, not yet fitted to a training split."""
        return CovariateSchema(tuple(c.covariate() for c in self.covariates))

    # The only place that knows the names of an experiment's folders
    prepared_folder = _below_output("prepared")
    latents_folder = _below_output("latents")
    autoencoder_run = _below_output("autoencoder-training")
    autoencoder_folder = _below_output("autoencoder")
    diffusion_run = _below_output("diffusion-training")
    decoder_run = _below_output("decoder-training")
    decoder_folder = _below_output("decoder")
    model_folder = _below_output("model")
