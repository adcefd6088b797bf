"""The command line of every training: `accelerate launch -m ldm3d.training.STAGE CONFIG [--set key=value ...]`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.errors import exit_on_input_error
from ldm3d.preemption import Stop, preemption


@exit_on_input_error
def run(train: Callable[[Config, Stop], None], description: str, section: str) -> None:
    """Train by the config named on the command line, with its --set overrides, to the end or until a request to stop."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="the experiment's YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. training.steps=500"
    )
    arguments = parser.parse_args()
    with preemption() as stop:
        train(load_config(arguments.config, arguments.set, section), stop)
