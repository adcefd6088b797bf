"""What is known of how a model was made, as a file in its folder: whose scans, what was done with them, trainings, versions.

It names no subject, no path and no date, so it can be published with the model. What must stay with the data (which scans were
seen) is in `ldm3d.experiment`.
"""

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pandas as pd

import ldm3d
from ldm3d.config.sections import AutoencoderConfig, Config, DiffusionConfig
from ldm3d.data.bands import people_by_band
from ldm3d.data.preparing import load_info, read_scan_table
from ldm3d.data.source import source_of
from ldm3d.data.splits import TRAIN
from ldm3d.data.table_one import extra_columns, table_1
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.models.pretrained import read_json, weights_hash
from ldm3d.seen import seen_by
from ldm3d.shipped import model_folder

ACCOUNT = "training.json"
FORMAT = 1
_PACKAGES = ("torch", "monai", "accelerate", "nibabel", "numpy", "scipy")
_TRAINING = ("steps", "batch_size", "learning_rate", "optimizer", "schedule", "ema", "keep", "mixed_precision")


def account_of(config: Config) -> dict[str, Any]:
    """All that `ldm3d.methods` and the model card tell, as JSON values.

    Raises:
        InputError: nothing is prepared.
    """
    table = read_scan_table(config)
    columns: dict[str, list[Any]] = {}
    with contextlib.suppress(InputError, OSError):  # the tables may have moved since: then without what no covariate names
        columns = extra_columns(config, table)
    data, network, base = config.data, config.autoencoder.network, _account_of_base(config)
    return {
        "format": FORMAT,
        "versions": {"ldm3d": ldm3d.__version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
        "data": {
            "scans": _counts(table, "path"),
            "subjects": _counts(table, "subject"),
            "table": table_1(table, config.schema(), columns),
            "sites": _sites(table, columns),
            "few": _few(table, config),
            "bands": people_by_band(table[table["split"] == TRAIN], config.schema()),
            "bids": data.bids is not None,
            "source": source_of(data.bids),
        },
        "prepared": {
            "grid": {"shape": list(data.grid.shape), "spacing_mm": list(data.grid.spacing_mm), "place": data.grid.place},
            "percentiles": list(data.percentiles),
            "skull_stripped": data.skull_stripped,
            "masked": data.mask is not None,
            "registration": data.registration and data.registration.model_dump(),
            **_tools(config, table),
        },
        "stages": {"autoencoder": _of_autoencoder(config, base), "diffusion": stage_of(config.diffusion)},
        "latents": {"channels": network.latent_channels, "downsampling": network.downsampling},
        "started_with": {"autoencoder": config.base_model is not None, "diffusion": config.diffusion.init_from is not None},
        "earlier": _earlier(config, base),
        "sharpened": config.decoder_folder.is_dir(),
        "seed": config.seed,
    }


def stage_of(stage: AutoencoderConfig | DiffusionConfig) -> dict[str, Any]:
    """What an account says of a stage: settings of its training and its losses."""
    return {key: getattr(stage.training, key) for key in _TRAINING} | _of_stage(stage)


def _of_autoencoder(config: Config, base: dict[str, Any] | None) -> dict[str, Any]:
    """Of its own run, whose settings may have stood on that command line alone, or of the model that it was taken from."""
    if base:
        return base["stages"]["autoencoder"]
    seen = seen_by(config.autoencoder_run)
    if seen and seen.stage and config.autoencoder_folder.is_dir() and seen.network == weights_hash(config.autoencoder_folder):
        return dict(seen.stage)
    return stage_of(config.autoencoder)


def _account_of_base(config: Config) -> dict[str, Any] | None:
    """The account of the model that this one started with; None where it has none, or is no longer there."""
    if config.base_model is None:
        return None
    with contextlib.suppress(InputError):
        return read_account(model_folder(config.base_model))
    return None


def _earlier(config: Config, base: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """Trainings of the U-Net before the one in `stages`, the first one first; None in the place of what is not known."""
    if config.diffusion.init_from is None:
        return []
    if base is None:
        return [None]
    return [*base.get("earlier", [None] * base["started_with"]["diffusion"]), base["stages"]["diffusion"]]


def write_account(account: dict[str, Any], model: Path) -> None:
    """Write it into a model folder."""
    write_atomic(model / ACCOUNT, json.dumps(account, indent=1) + "\n")


def read_account(model: Path) -> dict[str, Any] | None:
    """The account of a model folder; None where there is none that this version reads."""
    if not (model / ACCOUNT).is_file():
        return None
    values = read_json(model / ACCOUNT)
    return values if values.get("format") == FORMAT else None


def _counts(table: pd.DataFrame, column: str) -> dict[str, int]:
    return {str(split): int(rows[column].nunique()) for split, rows in table.groupby("split")}


def _sites(table: pd.DataFrame, columns: dict[str, list[Any]]) -> dict[str, int]:
    """Training subjects of each site, the largest first; nothing where no column names sites."""
    if "site" not in columns:
        return {}
    sites = pd.Series(columns["site"], index=table.index, dtype=object).fillna("missing").astype(str)
    rows = table.assign(site=sites)[table["split"] == TRAIN].drop_duplicates("subject")
    return {str(site): int(count) for site, count in rows["site"].value_counts().items()}


def _few(table: pd.DataFrame, config: Config) -> dict[str, int]:
    """Training subjects of each category: "sex: F" -> 12."""
    rows = table[table["split"] == TRAIN].drop_duplicates("subject")
    categories = [(each.name, category) for each in config.schema() for category in each.categories]
    return {f"{name}: {category}": int((rows[name] == category).sum()) for name, category in categories}


def _tools(config: Config, table: pd.DataFrame) -> dict[str, Any]:
    """What was written beside the first prepared scan: programs with their versions."""
    with contextlib.suppress(InputError, OSError, ValueError):
        info = load_info(config, table["key"].iloc[0])
        tools = {name: info[name] for name in ("brain_extraction", "bias_correction") if name in info}
        if config.data.registration:
            packages = ("SimpleITK", *(["nilearn"] if config.data.registration.to == "mni152" else []))
            tools["registered_with"] = {name: importlib.metadata.version(name) for name in packages}
            if config.data.registration.to != "mni152":  # a path says more than others should know
                tools["registration"] = {**config.data.registration.model_dump(), "to": "a template of the users"}
        if "brain_extraction" in tools:
            words = tools["brain_extraction"]["command"].split()
            tools["brain_extraction"] = {**tools["brain_extraction"], "command": Path(words[0]).name}
        return tools
    return {}


def _of_stage(stage: Any) -> dict[str, Any]:
    """What the methods say of a stage beside its training."""
    names = ("l1", "l2", "kl", "latent_scaling", "target", "loss_weight", "drop_covariates")
    found = {name: getattr(stage, name) for name in names if hasattr(stage, name)}
    for name in ("perceptual", "adversarial", "start"):
        if getattr(stage, name, None):
            found[name] = True
    if hasattr(stage, "process"):
        found |= {"process": stage.process.kind, "times": stage.time_sampling.kind}
    return found
