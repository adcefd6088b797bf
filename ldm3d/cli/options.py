"""The application, and the options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

SHARED = ("prepare", "encode", "generate", "evaluate", "audit")  # commands whose work several processes share

app = typer.Typer(
    help="Latent diffusion for 3D brain MRI. Train with: accelerate launch -m ldm3d.training.autoencoder CONFIG, "
    "ldm3d encode CONFIG, accelerate launch -m ldm3d.training.diffusion CONFIG.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _before(context: typer.Context) -> None:
    """What is true of every command is checked here, once."""
    if context.invoked_subcommand not in SHARED:
        from ldm3d.processes import work_alone  # loads PyTorch, which takes seconds

        work_alone(f"ldm3d {context.invoked_subcommand}")


ConfigPath = Annotated[Path, typer.Argument(help="The experiment's YAML file.", show_default=False)]
Override = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the config.")]
Device = Annotated[str | None, typer.Option(help="Where to compute; the first GPU if there is one, else the CPU.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto: bfloat16 where the device multiplies it.")]
ModelPath = Annotated[Path, typer.Argument(help="Pipeline folder, for example runs/toy/model.", show_default=False)]
Root = Annotated[Path | None, typer.Option(help="Folder that holds all its scans, if they lie elsewhere.")]
Experiment = Annotated[
    str | None,
    typer.Option(help="The experiment.json of its run, where it is not beside MODEL; none: it has seen nothing of --data."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="The model's own if not given, as the next three.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Of the sampler.")]
Guidance = Annotated[float | None, typer.Option(min=0, help="1 is none.")]
SamplerName = Annotated[
    str | None, typer.Option(help="ddpm, ddim, euler, heun, dpmpp-2m, unipc, sde-euler, sde-heun or sde-pc.")
]
