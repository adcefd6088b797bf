"""The command line, all but training.

ldm3d phantoms | import-dicom | config | check | prepare | measure | encode | generate | atlas | augment | edit | restore |
calibrate | anomaly | segment | dicom | info | evaluate | segmenter | compare | audit | likelihood | explain | export |
push | import-monai | serve | demo.

Training is started with `accelerate launch`; see `ldm3d.training.autoencoder` and `ldm3d.training.diffusion`.
"""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli import (  # noqa: F401 (each adds its commands)
    data,
    edit,
    evaluation,
    generation,
    populations,
    restore,
    rulers,
    segment,
    serve,
)
from ldm3d.cli.options import app
from ldm3d.errors import exit_on_input_error


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write all output.")] = Path("demo"),
    config: Annotated[Path, typer.Option(help="The toy experiment: a file, or one that comes with ldm3d.")] = Path("toy"),
    quick: Annotated[bool, typer.Option("--quick", help="Every part in small, in about a minute; it learns nothing.")] = False,
) -> None:
    """The whole path on toy brains, from phantoms to an HTML page, in a few minutes on two cores."""
    from ldm3d.demo import FULL, QUICK, run_demo

    run_demo(out, config, QUICK if quick else FULL)


@exit_on_input_error
def main() -> None:
    """Entry point of the console script."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", flush=True)
    app()
