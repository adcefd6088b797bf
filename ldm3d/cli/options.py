"""The application, and what several commands share: options, and the model that they load."""

import os
import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from ldm3d.config.base import Sampler

SHARED = ("prepare", "encode", "generate", "evaluate", "audit")  # commands that several processes can share

app = typer.Typer(
    help="Latent diffusion for 3D brain MRI. Train with: accelerate launch -m ldm3d.training.autoencoder CONFIG, "
    "ldm3d encode CONFIG, accelerate launch -m ldm3d.training.diffusion CONFIG.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _before(context: typer.Context) -> None:
    """Say that libraries are loaded, and refuse several processes for commands that do not share their work."""
    if "--help" in sys.argv:  # which loads nothing
        return
    if "torch" not in sys.modules and not int(os.environ.get("RANK") or 0):
        print("loading libraries", file=sys.stderr, flush=True)
    if context.invoked_subcommand not in SHARED:
        from ldm3d.processes import work_alone  # loads PyTorch, which takes seconds

        work_alone(f"ldm3d {context.invoked_subcommand}")


ConfigPath = Annotated[Path, typer.Argument(help="The experiment's YAML file.", show_default=False)]
Override = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the config.")]
DataOverride = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Of --data: data.KEY=VALUE, covariates.NAME.column=COLUMN (null: none)."),
]
Device = Annotated[str | None, typer.Option(help="Where to compute; the first GPU if there is one, else the CPU.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto: bfloat16 if the device supports it.")]
ModelPath = Annotated[
    Path, typer.Argument(help="Pipeline folder, a shipped model's name, or user/name at a hub.", show_default=False)
]
Root = Annotated[Path | None, typer.Option(help="Folder of all scans of --data, if it is another one.")]
Experiment = Annotated[
    str | None, typer.Option(help="experiment.json, if not beside MODEL; none: MODEL was not trained on any scan of --data.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of all noise; by default the model's.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; by default the model's.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="Guidance scale, 1: no guidance; by default the model's.")]
Spread = Annotated[float | None, typer.Option(help="Draws volumes away from their mean, 1: no; by default the model's.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Volumes sampled before they are decoded; does not change them.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each process; changes the last bits of volumes.")]
SeriesFolder = Annotated[Path, typer.Option(help="Folder: empty, absent, or of the same command before.", show_default=False)]
Audit = Annotated[Path | None, typer.Option(help="Folder of `ldm3d audit`: withhold copies of training subjects.")]
VOLUMETRY = "ldm3d.rulers.volumetry:measure_volumes"
Ruler = Annotated[
    str, typer.Option(help="package.module:function (volume, spacing_mm) -> {covariate: value}, or segmenter:FOLDER")
]
SamplerName = Annotated[str | None, typer.Option(help=f"By default the model's; {', '.join(get_args(Sampler))}.")]


def title(model: Path) -> str:
    """A model or folder on a page that is given to others: no folders of this machine beyond the last two."""
    return "/".join(model.parts[-2:]) if model.is_absolute() else str(model)


def load_model(model: Path, device: str | None, precision: str, seed=None, steps=None, guidance=None, sampler=None) -> tuple:
    """The pipeline, which uses all threads, and its sampling with the settings that are not None."""
    from ldm3d.pipeline import Pipeline
    from ldm3d.precision import dtype
    from ldm3d.processes import own_device

    device = device or own_device()
    pipeline = Pipeline.from_pretrained(model, device, dtype(precision, device))
    pipeline.threads = None  # all: measurements do not depend on the last bits
    return pipeline, pipeline.sampling.replace(seed=seed, steps=steps, guidance=guidance, sampler=sampler)
