"""Configs that come with ldm3d, by name, and as recipes: what a config leaves out is taken from one of them.

    recipe: brains-3mm

A recipe gives how scans are prepared and networks are trained (SECTIONS, and KEYS of `data`). What is the user's own is
never taken from it: name, output, seed, where the data lie, and the covariates.
"""

from pathlib import Path
from typing import Any

from ldm3d.config.yaml import read_yaml
from ldm3d.errors import InputError, choose, shown

PACKAGE = Path(__file__).parents[1]
FOLDERS = PACKAGE / "configs", PACKAGE.parent / "configs"  # of an installed package; of a clone
SECTIONS = ("autoencoder", "diffusion", "decoder", "generation")
KEYS = ("grid", "registration", "splits")


def shipped_configs() -> dict[str, Path]:
    """Name -> file of each config that comes with ldm3d: "toy", "conditions/inpaint"."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), PACKAGE / "configs")
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("conditions/*.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def over_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, with what they leave out from their recipe; the same values where they name none.

    Mappings are joined key by key; anything else of the config, null included, stands in place of what the recipe has, and
    so does a section of another `kind`.

    Raises:
        InputError: no config of this name comes with ldm3d.
    """
    values = dict(values)
    name = values.pop("recipe", None)
    if name is None:
        return values
    shipped = shipped_configs()
    if not isinstance(name, str):
        raise InputError(f"recipe is {shown(name)}; give the name of a config that comes with ldm3d: {', '.join(shipped)}")
    recipe = over_recipe(read_yaml(shipped[choose("recipe", name, shipped)]))
    taken = {section: recipe[section] for section in SECTIONS if section in recipe}
    taken["data"] = {key: recipe["data"][key] for key in KEYS if key in recipe["data"]}
    return _laid_over(taken, values)


def _laid_over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one, `upper` first."""
    if "kind" in upper and upper["kind"] != lower.get("kind"):
        return upper  # the keys of another kind do not belong to this one
    joined = lower | upper
    for key in lower.keys() & upper.keys():
        if isinstance(lower[key], dict) and isinstance(upper[key], dict):
            joined[key] = _laid_over(lower[key], upper[key])
    return joined
