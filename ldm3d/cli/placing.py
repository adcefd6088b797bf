"""How a given scan is brought to a model, as options of the commands edit, restore, calibrate and anomaly."""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ldm3d.cli.options import load_model
from ldm3d.errors import InputError, choose

Register = Annotated[str, typer.Option(help="model (as its training scans were), none (lies there already), rigid or affine.")]
Template = Annotated[str, typer.Option(help="For rigid and affine: mni152, or a NIfTI file.")]
Stripped = Annotated[bool, typer.Option("--stripped", help="The scan has no skull any more: its brain is not extracted.")]


class Ready(NamedTuple):
    """A model, and the options of `ldm3d.applications.placed.place` for its scans."""

    pipe: Any  # a Pipeline, which commands import late: it takes a second
    placing: dict[str, Any]


def ready(
    model: Path, device: str | None, precision: str, register: str, template: str, stripped: bool, scan: Path | None = None
) -> Ready:
    """Load a model; InputError where the options or the scan, if one is given, are wrong."""
    from ldm3d.config.data import RegistrationConfig

    choose("--register", register, ("model", "none", "rigid", "affine"))
    if scan is not None and not scan.is_file():
        raise InputError(f"{scan}: no such file")
    wanted = {"model": None, "none": False}
    how = wanted[register] if register in wanted else RegistrationConfig(to=template, kind=register)
    # Named only where it is asked for, so that results that were made before there was the option stay theirs
    return Ready(load_model(model, device, precision)[0], {"register": how, **({"stripped": True} if stripped else {})})
