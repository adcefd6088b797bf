"""Reading a config file, with overrides from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ldm3d.config.explain import explain
from ldm3d.config.recipe import over_recipe, shipped_configs
from ldm3d.config.sections import Config
from ldm3d.config.yaml import parse_yaml, read_yaml
from ldm3d.errors import InputError, shown


def load_config(path: Path | str, overrides: Sequence[str] = (), section: str | None = None) -> Config:
    """Read and check an experiment's YAML file, with what it leaves out from its `recipe` (`ldm3d.config.recipe`).

    Args:
        path: the file, or the name of a config that comes with ldm3d, such as "toy".
        overrides: "key.subkey=value" each; the value is read as YAML.
        section: a training stage's own section ("autoencoder", "diffusion"), in which an override's key is looked up
            when the top of the file has no such key: `training.steps=500` is then enough.

    Raises:
        InputError: file missing, too long or no YAML, a key twice, unknown key (the nearest valid one is named), wrong type,
            contradiction.
    """
    path = Path(path)
    if not path.is_file():
        shipped = shipped_configs()
        if str(path) not in shipped:
            raise InputError(f"no config file {path}; those that come with ldm3d are: {', '.join(shipped)}")
        path = shipped[str(path)]
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings; a config starts with `name:` and `output:`")
    for override in overrides:
        keys, value = parse_override(override)
        if section and keys[0] not in Config.model_fields and keys[0] != "recipe":
            keys = [section, *keys]
        set_key(values, keys, value)
    recipe = values.get("recipe")
    try:
        return Config.model_validate(over_recipe(values))
    except ValidationError as error:
        beside = f" (over recipe {recipe}, which `ldm3d config {recipe}` shows)" if recipe else ""
        raise InputError(f"{path}: {explain(error)}{beside}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_override(override: str) -> tuple[list[str], Any]:
    """The keys and the value of "key.subkey=value", the value read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {shown(override)}: write --set key.subkey=value")
    try:
        return key.split("."), parse_yaml(text, "it")
    except InputError as error:
        raise InputError(f"--set {shown(override)}: {shown(text)} is not a YAML value ({error})") from None


def set_key(values: dict, keys: list[str], value: Any) -> None:
    """Set a value deep in mappings, which are made where they are missing."""
    for key in keys[:-1]:
        # A copy: YAML's aliases are one object in several places, of which only this one is meant
        values[key] = dict(values[key]) if isinstance(values.get(key), dict) else {}
        values = values[key]
    values[keys[-1]] = value


def full_text(config: Config) -> str:
    """A config as YAML with every key that it stands for: its own, those of its recipe and all defaults."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
