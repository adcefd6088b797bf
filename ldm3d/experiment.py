"""What belongs to which: latents to their autoencoder and data, a trained model to the settings and scans it was made with.

MODEL/experiment.json lets `evaluate` prepare other scans in the same way and keep to those that the model never saw. Scans
are named by a hash of their content, so the model folder carries no subject's identifier.
"""

import json
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from ldm3d.config import Config, explain
from ldm3d.data.preprocess import fingerprint, prepare, read_scan_table
from ldm3d.errors import InputError, shown
from ldm3d.models.pretrained import read_json, weights_hash
from ldm3d.processes import ALONE, Processes

EXPERIMENT = "experiment.json"


def latents_origin(config: Config) -> dict[str, str]:
    """What a latent cache of this experiment follows from: a cache of anything else is stale.

    Raises:
        InputError: no autoencoder yet, or nothing prepared.
    """
    if not config.autoencoder_folder.is_dir():
        raise InputError(
            f"no autoencoder in {config.autoencoder_folder}; train it with `accelerate launch -m "
            "ldm3d.training.autoencoder CONFIG` first"
        )
    return {"autoencoder": weights_hash(config.autoencoder_folder), "prepared data": fingerprint(config)}


def save_experiment(config: Config, folder: Path) -> None:
    """Write experiment.json beside a model of this config."""
    scans = read_scan_table(config)
    seen = sorted(scans.loc[scans["split"] != "test", "key"])
    validation = sorted(scans.loc[scans["split"] == "validation", "key"])  # seen, but not trained on
    values = {"config": config.model_dump(mode="json", exclude_unset=True), "seen": seen, "validation": validation}
    (folder / EXPERIMENT).write_text(json.dumps(values, indent=1) + "\n")


def held_out_scans(
    model: Path, data: Path, work: Path, root: Path | None = None, processes: Processes = ALONE
) -> tuple[Config, pd.DataFrame]:
    """Prepare the scans of a dataset as the model's own were, and leave out every subject that it has seen.

    Arguments and errors: see `scans_by_use`.

    Returns:
        (config whose prepared folder holds the scans, rows of its scan table).
    """
    config, _, held_out = scans_by_use(model, data, work, root, processes)
    return config, held_out


def scans_by_use(
    model: Path, data: Path, work: Path, root: Path | None = None, processes: Processes = ALONE
) -> tuple[Config, pd.DataFrame, pd.DataFrame]:
    """Prepare the scans of a dataset as the model's own were, and say which it was trained on and which it has never seen.

    Args:
        model: pipeline folder.
        data: BIDS folder, or table with a path column.
        work: where to put prepared volumes, unless it is the experiment's own data, prepared already.
        root: folder that holds all files of `data`, see `DataConfig`; None for its own.
        processes: that share the work; all of them have to call this.

    Returns:
        (config whose prepared folder holds the scans, rows of its scan table that were trained on, those of subjects that
        were not seen in any way). Subjects of the validation split are in neither.

    Raises:
        InputError: no experiment.json, no such data, or nothing held out in it.
    """
    try:
        values = read_json(model / EXPERIMENT)
        config, seen = Config.model_validate(values["config"], context={"saved": True}), set(values["seen"])
        trained = seen - set(values.get("validation", ()))
    except FileNotFoundError:
        raise InputError(f"{model} has no {EXPERIMENT}: it is no model that training stage 2 wrote") from None
    except ValidationError as error:
        raise InputError(f"{model / EXPERIMENT} is damaged or of another version: {explain(error)}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{model / EXPERIMENT} is damaged or of another version: {shown(error)}") from None
    if not data.exists():
        raise InputError(f"no data in {data}; give a BIDS folder, or a CSV or TSV with a path column")
    own = config.data.bids or config.data.table
    if own.resolve() != data.resolve() or not config.prepared_folder.is_dir():
        source = {"bids": data, "table": None} if data.is_dir() else {"bids": None, "table": data}
        source |= {"root": root, "participants": None}
        config = config.model_copy(update={"data": config.data.model_copy(update=source), "output": work})
    prepare(config, processes=processes)
    scans = read_scan_table(config)
    known = set(scans.loc[scans["key"].isin(seen), "subject"])
    held_out = scans[~scans["subject"].isin(known)].reset_index(drop=True)
    if held_out.empty:
        raise InputError(f"all {len(scans)} scans of {data} are of subjects that the model was trained on; give others")
    return config, scans[scans["key"].isin(trained)].reset_index(drop=True), held_out
