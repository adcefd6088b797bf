"""The config under which a model's scans are prepared that are not its training's: other folders, columns, masks, tables.

Grid and intensities are the model's; where scans and covariates come from is the data's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ldm3d.config.conditions import Condition
from ldm3d.config.data import BRAIN_TOOLS
from ldm3d.config.explain import explain
from ldm3d.config.read import parse_override, set_key
from ldm3d.config.sections import Config
from ldm3d.errors import InputError, choose, shown

# Keys of `data` that the model or the command line decides, and by what
_DECIDED = {
    "grid": "the model has its own",
    "percentiles": "the model has its own",
    **dict.fromkeys(("bids", "table"), "give --data"),
    "root": "give --root",
}
_OF_COVARIATES = ("column", "categories", "missing")


def config_for(
    config: Config, base: Path, data: Path, work: Path, root: Path | None, own: bool, overrides: Sequence[str]
) -> Config:
    """The config for preparing a dataset as a model's training data were.

    Args:
        config: of the training.
        base: folder to which its relative paths refer.
        data: BIDS folder, or table.
        work: where prepared scans go.
        root: folder of all files of `data`; None for its own.
        own: whether this is the data that the model was trained on.
        overrides: "data.KEY=VALUE", and "covariates.NAME.column=COLUMN" (also categories, missing). A column that is null is
            not in these data: such a covariate is not in the config that is returned.

    Raises:
        InputError: unclear overrides; a command of a file from elsewhere.
    """
    if own and root is None and config.data.root:
        root = base / config.data.root
    source = {"bids": data, "table": None} if data.is_dir() else {"bids": None, "table": data}
    elsewhere: dict[str, Any] = {name: getattr(config.data, name) for name in ("participants", "derivatives", "sessions")}
    elsewhere = {name: base / path if own and path else None for name, path in elsewhere.items()}
    elsewhere["covariates_tables"] = tuple(str(base / pattern) for pattern in config.data.covariates_tables if own)
    elsewhere["exclude"] = config.data.exclude if own else None  # which names scans, or a column, of the training's data
    mask = config.data.mask and dict(config.data.mask)  # other data have masks of their own; a table's scans are stripped
    if mask and own and "root" in mask:
        mask["root"] = str(base / mask["root"])
    elif mask:
        mask = {name: value for name, value in mask.items() if name != "root"} if data.is_dir() else None
    # Who is held out follows from what the model has seen, whatever columns the training's splits came from
    rule = {"split_column": None, "group_column": None, "splits": config.data.splits.model_copy(update={"stratify": ()})}
    data_of = config.data.model_copy(update={**source, **elsewhere, **rule, "root": root, "mask": mask})
    conditions = tuple(_of_data(each, base if own else None) for each in config.diffusion.conditions)
    diffusion = config.diffusion.model_copy(update={"conditions": conditions})
    config = config.model_copy(update={"data": data_of, "diffusion": diffusion, "output": work})
    trusted = any(override.startswith("data.brain_extraction") for override in overrides)
    config = _overridden(config, overrides) if overrides else config
    tool = config.data.brain_extraction
    if tool and tool.command not in BRAIN_TOOLS and not trusted:
        raise InputError(
            f"the model's experiment.json asks for running {shown(tool.command)} on every scan, and a file from elsewhere "
            "could ask for any command: if you trust it, add --set 'data.brain_extraction.command=...' with this command, or "
            "--set data.brain_extraction=null for skull-stripped scans"
        )
    return config


def found_from(config: Config, base: Path) -> Config:
    """The same config with the folders in which images of conditions are found, if these are relative to `base`."""
    folders = {name: base / path for name in ("bids", "derivatives") if (path := getattr(config.data, name))}
    conditions = tuple(_of_data(each, base) for each in config.diffusion.conditions)
    diffusion = config.diffusion.model_copy(update={"conditions": conditions})
    return config.model_copy(update={"data": config.data.model_copy(update=folders), "diffusion": diffusion})


def _of_data(condition: Condition, base: Path | None) -> Condition:
    """A condition whose files are in the same folder as in the training, relative to `base`; None: in the data's own."""
    folder = getattr(condition, "derivatives", None)
    return condition.model_copy(update={"derivatives": base / folder if base else None}) if folder else condition


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    values = config.model_dump(mode="json")
    covariates = {each["name"]: each for each in values["covariates"]}
    absent = set()
    for override in overrides:
        (top, *keys), value = parse_override(override)
        if top == "data" and keys:
            if keys[0] in _DECIDED:
                raise InputError(f"--set {shown(override)}: data.{keys[0]} cannot be set here; {_DECIDED[keys[0]]}")
            set_key(values["data"], keys, value)
        elif top == "covariates" and len(keys) == 2:
            covariate = covariates[choose("covariate", keys[0], covariates)]
            covariate[choose("key of a covariate here", keys[1], _OF_COVARIATES)] = value
            if keys[1] == "column":
                (absent.add if value is None else absent.discard)(keys[0])
        else:
            raise InputError(
                f"--set {shown(override)}: write data.KEY=VALUE, or covariates.NAME.column=COLUMN (null: not in these data); "
                "everything else is the model's"
            )
    values["covariates"] = [each for name, each in covariates.items() if name not in absent]
    try:
        return Config.model_validate(values, context={"saved": True})
    except ValidationError as error:
        raise InputError(f"--set: {explain(error)}") from None
