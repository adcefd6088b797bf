"""Reading a config file, with overrides from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ldm3d.config.explain import explain
from ldm3d.config.sections import Config
from ldm3d.config.yaml import parse_yaml, read_yaml
from ldm3d.errors import InputError, shown

PACKAGE = Path(__file__).parents[1]
FOLDERS = PACKAGE / "configs", PACKAGE.parent / "configs"  # of an installed package; of a clone


def shipped_configs() -> dict[str, Path]:
    """Name -> file of each config that comes with ldm3d: "toy", "conditions/inpaint"."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), PACKAGE / "configs")
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("conditions/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def load_config(path: Path | str, overrides: Sequence[str] = (), section: str | None = None) -> Config:
    """Read and check an experiment's YAML file.

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
        if section and keys[0] not in Config.model_fields:
            keys = [section, *keys]
        set_key(values, keys, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from None


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
