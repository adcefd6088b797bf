"""How networks are trained: settings that every training has, and losses that some have."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ldm3d.config.base import Fraction, Positive, Section

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class TrainingConfig(Section):
    """Settings of every training. Batch sizes are global: over all processes and accumulated gradients."""

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
    # The network that is exported: the average after the last step, or the one with the best validation loss
    keep: Literal["last", "best"] = "last"
    max_skipped_steps: Annotated[int, Field(ge=0)] = 20  # steps with a loss that is NaN or infinite; more end the training
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 where the hardware multiplies it
    log_every: Positive = 10
    validate_every: Positive = 100
    preview_every: Positive = 500
    checkpoint_every: Positive = 500
    # Beside metrics.jsonl; one, or a list of them, or none: []
    tracker: Annotated[tuple[Tracker, ...], Field(exclude_if=lambda names: names == ("tensorboard",))] = ("tensorboard",)
    workers: Annotated[int, Field(ge=0)] = 0  # processes that prefetch data; 0: the training process reads

    @field_validator("tracker", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        if value == "fp16":
            raise ValueError("float16 is no longer trained in; use bf16, which needs no loss scaling, or no (float32)")
        return "no" if value is False else value  # YAML reads an unquoted no as false

    @model_validator(mode="after")
    def _accumulation_divides(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulation {self.accumulation}")
        return self


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
