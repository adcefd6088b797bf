"""A page for a trained model: serve."""

from typing import Annotated

import typer

from ldm3d.cli.options import Device, ModelPath, Precision, app
from ldm3d.errors import InputError
from ldm3d.serve import PREVIEW_STEPS


@app.command()
def serve(
    model: ModelPath,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen at; beyond loopback the URL has a token.")] = "127.0.0.1",
    preview_steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the coarse preview.")] = PREVIEW_STEPS,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; 1 gives the volumes of `ldm3d generate`.")] = 1,
    waiting: Annotated[int, typer.Option(min=1, help="Requests at once; one is computed, the others wait.")] = 256,
    seconds: Annotated[float, typer.Option(min=1, help="Of computing, for one volume.")] = 600,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """A web page on this machine: sliders for the covariates, and the brain that follows."""
    try:
        from ldm3d.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing, which the page needs; pip install 'ldm3d[serve]'") from None
    from ldm3d.cli.options import load_model
    from ldm3d.serve.asked import Limits
    from ldm3d.serve.studio import Studio

    pipeline, _ = load_model(model, device, precision)
    pipeline.threads = threads
    limits = Limits(waiting=waiting, seconds=seconds)
    run(Studio(pipeline, model.resolve().name, limits, preview_steps), host, port)
