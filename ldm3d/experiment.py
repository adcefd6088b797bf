"""The origin of latents (autoencoder and data) and of a trained model (settings and scans).

With OUTPUT/experiment.json, `evaluate` prepares other scans in the same way and uses only those that the model has never seen.
The file names scans, subjects and local paths, so it lies beside the model folder, not in it: that can be published.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from ldm3d.account import account_of, write_account
from ldm3d.base_model import take_autoencoder
from ldm3d.config.conditions import without_sources
from ldm3d.config.explain import explain
from ldm3d.config.sections import Config
from ldm3d.data.conditions import ScanImages, find_files, with_files
from ldm3d.data.conditions import fingerprint as fingerprint_of_condition
from ldm3d.data.keys import file_key, scan_of, settings_of
from ldm3d.data.placing import grid_of
from ldm3d.data.preparing import fingerprint, prepare, read_scan_table
from ldm3d.description import DESCRIPTION, ROUNDED_FROM, Sampling, hash_of_model, read_description
from ldm3d.errors import InputError, shown, some
from ldm3d.files import write_atomic
from ldm3d.geometry import FOREGROUND, Grid
from ldm3d.methods import methods_text, write_methods
from ldm3d.models.pretrained import read_json, weights_hash
from ldm3d.other_data import config_for, found_from
from ldm3d.processes import ALONE, Processes
from ldm3d.seen import Seen, seen_by
from ldm3d.shipped import model_folder

EXPERIMENT = "experiment.json"
FORMAT = 2  # 1: in the model folder, scans by the bytes of their files
NONE = "none"  # instead of a file: the user declares that the model has seen nothing of the data


@dataclass(frozen=True)
class Experiment:
    """What is known of the training of a model.

    Attributes:
        config: its settings; `output` is the present folder of the run.
        base: folder to which relative paths of its data refer.
        train: scans that any stage was trained on.
        seen: these, and those of validation.
        subjects: labels of all subjects that were seen; empty in old files.
        by_file: whether scans are identified by the bytes of their files, as in old files.
        file: experiment.json; None for a model that is declared to have seen nothing.
    """

    config: Config
    base: Path = Path()
    train: frozenset[str] = frozenset()
    seen: frozenset[str] = frozenset()
    subjects: frozenset[str] = frozenset()
    by_file: bool = False
    file: Path | None = None

    @property
    def data(self) -> Path:
        """BIDS folder or table that it was trained on."""
        return (self.base / (self.config.data.bids or self.config.data.table)).resolve()


def latents_origin(config: Config) -> dict[str, str]:
    """The origin of this experiment's latent cache; one with another origin is stale.

    Raises:
        InputError: no autoencoder yet, or nothing prepared.
    """
    if not take_autoencoder(config) and not config.autoencoder_folder.is_dir():
        raise InputError(
            f"no autoencoder in {config.autoencoder_folder}; train it with `accelerate launch -m "
            "ldm3d.training.autoencoder CONFIG` first"
        )
    origin = {"autoencoder": weights_hash(config.autoencoder_folder), "prepared data": fingerprint(config)}
    if config.diffusion.mirror:
        origin["mirrored volumes"] = "mirrored-*.npy"
    if conditions := with_files(config):
        scans = read_scan_table(config)
        for each in conditions:
            files = find_files(config, each, scans)
            kind = "contrast" if each in config.contrasts else "condition"
            origin[f"{kind} {each.name}"] = fingerprint_of_condition(config, each, files, list(scans["key"]))
    return origin


def save_experiment(config: Config, model: Path) -> None:
    """Write OUTPUT/experiment.json for a model of this config: what all stages have seen by their records, or else by the
    table of prepared scans. What others may know of it is written into the model folder (`ldm3d.account`, `ldm3d.methods`)."""
    first, second = seen_by(config.autoencoder_run), seen_by(config.diffusion_run) or _seen_by_table(config)
    if first and first.network != weights_hash(config.autoencoder_folder):
        first = None  # of another autoencoder
    if config.base_model:
        first = _seen_by_base(config.base_model)
    known = [stage for stage in (first, second, seen_by(config.decoder_run)) if stage]
    train = frozenset.union(*(stage.train for stage in known))
    seen = frozenset.union(train, *(stage.validation for stage in known))
    values = {
        "format": FORMAT,
        "model": hash_of_model(model),
        "base": str(Path.cwd()),
        "config": config.model_dump(mode="json", exclude_unset=True),
        "train": sorted(train),
        "validation": sorted(seen - train),
        "subjects": sorted(frozenset.union(*(stage.subjects for stage in known))),
        "autoencoder_known": first is not None,
    }
    write_atomic(config.output / EXPERIMENT, json.dumps(values, indent=1) + "\n")
    account = account_of(config)
    write_account(account, model)
    write_methods(model, methods_text(account, Sampling(**config.generation.model_dump())), account)
    (model / EXPERIMENT).unlink(missing_ok=True)  # an older version's


def find_experiment(model: Path, given: str | Path | None = None) -> Experiment:
    """What is known of a model.

    Args:
        model: pipeline folder, or the name of a shipped model.
        given: its experiment.json; None for the one beside the folder, or, of old models, in it; NONE for a model that
            has seen nothing of the data, as the user knows.

    Raises:
        InputError: there is none, it is damaged, or of another model.
    """
    model = model_folder(model)
    if str(given) == NONE:
        return Experiment(_config_of(model))
    paths = [Path(given)] if given else [model.resolve().parent / EXPERIMENT, model / EXPERIMENT]
    names = [hash_of_model(model), read_json(model / DESCRIPTION).get(ROUNDED_FROM)]
    names = [name for name in names if name]
    for path in paths:
        if path.is_file():
            values = read_json(path)
            inside = path.resolve().parent == model.resolve()
            if inside:
                warnings.warn(
                    f"{path} names scans and local paths of the training: before you publish the model folder, move that "
                    f"file to {model.resolve().parent} or elsewhere (and give it as --experiment FILE)",
                    stacklevel=3,
                )
            if inside or given or values.get("model") in names:
                return _read_experiment(path, values, names)
    raise InputError(
        f"nothing says which scans {model} was trained on, so that none can be called held out: there is no "
        f"{' or '.join(map(str, paths))} of it. Give the {EXPERIMENT} of the run that made it (--experiment FILE); or, if "
        f"you know that it has never seen a scan of --data, declare it with --experiment {NONE}"
    )


def scans_by_use(
    model: Path,
    data: Path,
    work: Path,
    root: Path | None = None,
    processes: Processes = ALONE,
    experiment: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Config, pd.DataFrame, pd.DataFrame]:
    """Prepare the scans of a dataset as the model's were, and find those that it was trained on and those it has never seen.

    The experiment's folder is only read: scans that are not prepared there with the model's settings are prepared in `work`.

    Args:
        model: pipeline folder, or the name of a shipped model.
        data: BIDS folder, or table with a path column.
        work: where to put prepared volumes, unless it is the experiment's own data, prepared already.
        root: folder that holds all files of `data`, see `DataConfig`; None for its own.
        processes: that share the work; all of them have to call this.
        experiment: see `find_experiment`.
        overrides: of the config for `data`, see `ldm3d.other_data.config_for`.

    Returns:
        (config whose prepared folder holds the scans, rows of its scan table that were trained on, those of subjects that
        were not seen in any way). Subjects of the validation split are in neither; nor are scans that lack an image which
        the model takes or makes.

    Raises:
        InputError: what `find_experiment` raises; no such data, or nothing held out in it.
    """
    known = find_experiment(model, experiment)
    if not data.exists():
        raise InputError(f"no data in {data}; give a BIDS folder, or a CSV or TSV with a path column")
    own = known.file is not None and known.data == data.resolve()
    config, scans = _prepared(known, data, work, root, own, processes, overrides)
    for covariate in read_description(model_folder(str(model)) / DESCRIPTION)["schema"]:
        if covariate.name not in scans:  # not in these data, so left open
            scans[covariate.name] = pd.Series([None] * len(scans), dtype=float if covariate.kind == "continuous" else object)
    if known.by_file:
        before = settings_of(grid_of(config.data.grid), config.data.percentiles, version=1)
        names = pd.Series([file_key(Path(path), before) for path in scans["path"]], dtype=object)
    else:
        names = scans["key"].map(scan_of)
    seen = set(scans.loc[names.isin(known.seen), "subject"])
    seen |= _seen_by_label(known, scans, seen, data, own, processes.is_main)
    if config.diffusion.conditions or config.contrasts:  # those that lack an image are of no use; `ScanImages` warns of them
        complete = ScanImages(config, scans).complete
        scans, names = scans.iloc[complete], names.iloc[complete]
    held_out = scans[~scans["subject"].isin(seen)].reset_index(drop=True)
    if held_out.empty:
        raise InputError(f"all {len(scans)} scans of {data} are of subjects that the model was trained on; give others")
    return config, scans[names.isin(known.train)].reset_index(drop=True), held_out


def _prepared(
    known: Experiment,
    data: Path,
    work: Path,
    root: Path | None,
    own: bool,
    processes: Processes,
    overrides: Sequence[str],
) -> tuple[Config, pd.DataFrame]:
    """(config whose prepared folder holds them, table) of a dataset's scans."""
    config = known.config
    if own and config.prepared_folder.is_dir() and not overrides:
        try:
            return found_from(config, known.base), read_scan_table(config)
        except InputError as error:
            if processes.is_main:
                print(f"{error}\npreparing the scans in {work} for now", flush=True)
    config = config_for(config, known.base, data, work, root, own, overrides)
    try:
        prepare(config, processes=processes)
    except InputError as error:
        if own:
            raise
        raise InputError(
            f"{error}\n(of other data: --set covariates.NAME.column=COLUMN names another column, null one that is not there; "
            "--set data.KEY=VALUE sets filter, participants, mask and others)"
        ) from None
    return config, read_scan_table(config)


def _seen_by_label(
    known: Experiment, scans: pd.DataFrame, by_scan: set[str], data: Path, own: bool, is_main: bool
) -> set[str]:
    """Subjects with the labels of seen ones but other scans; in the experiment's own data these count as seen."""
    alike = sorted((known.subjects & set(scans["subject"])) - by_scan)
    if own and known.by_file and not by_scan:
        raise InputError(
            f"{data} is what the model was trained on, but none of its {len(scans)} files is unchanged: compressed anew? This "
            f"model's {EXPERIMENT} identifies scans by the bytes of their files; give the original files, or train it again"
        )
    if alike and is_main:
        consequence = "if they are the same people, processed otherwise, they are not truly held out"
        if own:
            consequence = "their scans were changed since the training. They count as seen: not as trained on, not as held out"
        warnings.warn(
            f"{len(alike)} subjects of {data} are called like subjects that the model has seen ({some(alike)}), and none of "
            f"their scans has the voxels that it saw: {consequence}",
            stacklevel=4,
        )
    return set(alike) if own else set()


def _seen_by_base(model: str) -> Seen | None:
    """What the model that a training started with has seen; None if nothing says so."""
    try:
        base = find_experiment(Path(model))
    except InputError:
        return None
    return Seen(base.train, base.seen - base.train, base.subjects)


def _seen_by_table(config: Config) -> Seen:
    """By the table of prepared scans, for runs that began before runs recorded what they see."""
    scans = read_scan_table(config)
    of = {split: scans[scans["split"] == split] for split in ("train", "validation")}
    names = {split: frozenset(rows["key"].map(scan_of)) for split, rows in of.items()}
    return Seen(names["train"], names["validation"], frozenset(pd.concat(of.values())["subject"]))


def _read_experiment(path: Path, values: dict[str, Any], names: Sequence[str]) -> Experiment:
    """The content of a file about a model with one of these hashes; a warning where it is incomplete."""
    try:
        config, form = Config.model_validate(values["config"], context={"saved": True}), values.get("format", 1)
        if form == 1:
            seen = frozenset(values["seen"])
            train = seen - {*values.get("validation", ())}
            if seen:
                warnings.warn(
                    f"{path} is of an older version: it identifies scans by the bytes of their files, and lists those of "
                    "stage 2 alone. Scans that were compressed anew since count as never seen",
                    stacklevel=4,
                )
            return Experiment(config, Path(), train, seen, by_file=True, file=path)
        if form != FORMAT:
            raise InputError(f"{path} is of another version of ldm3d (format {shown(form)}, here {FORMAT}); update ldm3d")
        if values["model"] not in names:
            raise InputError(f"{path} is of model {shown(values['model'])}, and this is {names[0]}; give its own")
        if not values["autoencoder_known"]:
            warnings.warn(
                f"{path} does not know which scans the autoencoder was trained on: some that count as held out may be among "
                "them, so that reconstructions look better than they are. Train stage 1 again to know",
                stacklevel=4,
            )
        train = frozenset(values["train"])
        config = config.model_copy(update={"output": path.resolve().parent})
        seen = train | {*values["validation"]}
        return Experiment(config, Path(values["base"]), train, seen, frozenset(values["subjects"]), file=path)
    except ValidationError as error:
        raise InputError(f"{path} is damaged or of another version: {explain(error)}") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or of another version: {shown(error)}") from None


def _place_of(grid: Grid) -> dict[str, Any]:
    """Where a model's grid lies, as keys of the config's."""
    if grid.place == FOREGROUND:
        return {}
    return {"place": grid.place, "origin_mm": grid.centre_mm.tolist()}


def _config_of(model: Path) -> Config:
    """A config for preparing scans, with the model's covariates as columns; nothing is trained by it."""
    parts = read_description(model / DESCRIPTION)
    grid, schema = parts["grid"], parts["schema"]
    unused = {"steps": 1, "batch_size": 1, "learning_rate": 1e-4}
    columns = ("name", "kind", "unit", "categories")
    values = {
        "name": "unknown",
        "output": "not-given",
        "data": {
            "bids" if parts["suffixes"] else "table": "not-given.csv",
            "grid": {"shape": list(grid.shape), "spacing_mm": list(grid.spacing_mm), **_place_of(grid)},
            "skull_stripped": parts["skull_stripped"],
            "suffix": parts["suffix"],
            "channels": parts["suffixes"],
            "splits": {"validation": 0, "test": 0},
            **(parts["preparation"].to_dict() if parts["preparation"] else {}),
        },
        "covariates": [{name: getattr(c, name) for name in columns} | {"range": c.range} for c in schema],
        "autoencoder": {"network": {"latent_channels": 1, "downsampling": 1, "channels": [1]}, "training": unused},
        "diffusion": {
            "network": {"channels": [1], "attention": [False]},
            "training": unused,
            "conditions": [*map(without_sources, parts["conditions"])],
        },
    }
    return Config.model_validate(values)
