"""Scans as they come -> volumes on the experiment's Grid, float in [0, 1]; and the way back.

Below `config.prepared_folder`:
    volumes/<key>.npy   float16 (C, X, Y, Z); <key>.json what the way back needs, and what was odd; <key>.npz how it looks
            <file>.key  the key of a file by its bytes, so that one that is as it was need not be unpacked
    scans.tsv           subject, session, path, key, split and the covariates of every scan that could be prepared
    splits.tsv          the split of every subject
    settings.json       what the rest was made with
    failed.tsv          scans that could not be prepared, and why; only if there are any

A key is a hash of the scan's voxels and of the settings that shape the volume (`ldm3d.data.keys`), so nothing is prepared
twice and nothing stale is ever taken for current. Volumes of older settings stay until the user deletes the folder.
"""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.config.sections import Config
from ldm3d.data.bids import read_scans
from ldm3d.data.masks import find_masks
from ldm3d.data.oddities import warn_of_oddities, who
from ldm3d.data.one_scan import DAMAGED, REMOVED, VERSION, prepare_scan, read_stored, steps_of
from ldm3d.data.people import kept_splits, split_columns, split_subjects
from ldm3d.data.placing import BLOCK_MM, grid_of, restore
from ldm3d.data.quality import read_look
from ldm3d.data.removed import Removed, read_removed
from ldm3d.data.tables import read_table, write_table
from ldm3d.errors import InputError
from ldm3d.files import checked_name, write_atomic
from ldm3d.geometry import Grid
from ldm3d.processes import ALONE, Processes, cores_each

_SHOWN = 20  # failed scans that are named on the terminal; failed.tsv has them all


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did."""

    table: pd.DataFrame  # as in scans.tsv
    told: list[dict[str, Any]]  # of each of its rows: cut_mm, extent_mm, around_zero, notes; correlation if it was registered
    warnings: list[str]  # of what is odd among all scans
    prepared: int  # scans made anew
    cached: int  # scans that were there already
    failed: pd.DataFrame  # subject, session, path, reason
    seconds: float


def prepare(config: Config, *, workers: int | None = None, strict: bool = False, processes: Processes = ALONE) -> Prepared:
    """Bring every scan of the config to the Grid, in parallel; only those that are new or changed.

    A scan that cannot be used is named with its reason and left out; the others go on.

    Args:
        config: the experiment.
        workers: processes that this one starts; None for one per available core, 1 for none beside this one.
        strict: one bad scan is an error, and no table is written.
        processes: that share the scans; all of them have to call this.

    Raises:
        InputError: what `read_scans` raises; no scan could be prepared; with `strict` any could not.
    """
    started = time.monotonic()
    folder = config.prepared_folder
    kept = _kept_splits(config, processes)
    scans = read_scans(config.data, config.covariates)
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    grid = grid_of(config.data.grid)
    arguments = processes.share(_work(config, scans["path"], folder / "volumes"))
    results: list[dict] = [{}] * len(arguments)
    with tqdm(total=len(arguments), desc="prepare", unit="scan", disable=None) as bar:  # None: no bar in a log file
        for i, result in _run(arguments, min(workers or cores_each(), len(arguments))):
            results[i] = result
            bar.update()
    results = processes.merge(results)

    reasons = pd.Series([result.get("reason") for result in results], index=scans.index, dtype=object)
    bad = reasons.notna()
    failed = scans.loc[bad, ["subject", "session", "path"]].assign(reason=reasons[bad])
    if processes.is_main:
        (folder / "failed.tsv").unlink(missing_ok=True)
    if bad.any():
        if processes.is_main:
            write_table(folder / "failed.tsv", failed)
        report = f"{len(failed)} of {len(scans)} scans could not be prepared:\n" + "\n".join(
            f"  {who(row)}: {row.reason}" for row in failed.head(_SHOWN).itertuples()
        )
        if len(failed) > _SHOWN:
            report += f"\n  and {len(failed) - _SHOWN} more, see {folder / 'failed.tsv'}"
        if strict or bad.all():
            raise InputError(report)
        if processes.is_main:
            print(report)

    good = [result for result in results if "reason" not in result]
    table = scans[~bad].reset_index(drop=True)
    table.insert(3, "key", [result["key"] for result in good])
    splits = split_subjects(table, config.data, config.covariates, kept)
    table = table.drop(columns=[*split_columns(config.data, config.covariates)])
    table.insert(4, "split", table["subject"].map(splits))
    odd = warn_of_oddities(table, good, tolerated_mm(grid), grid.place, config.data.skull_stripped)
    if processes.is_main:
        write_table(folder / "scans.tsv", table)
        write_table(folder / "splits.tsv", pd.DataFrame(sorted(splits.items()), columns=["subject", "split"]))
        write_atomic(folder / "settings.json", json.dumps(_settings(config), indent=2))
    processes.wait()
    cached = sum(result["cached"] for result in good)
    return Prepared(table, good, odd, len(good) - cached, cached, failed, time.monotonic() - started)


def try_out(config: Config, paths: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """What preparing some scans into another folder comes to: of each `reason`, or cut_mm and notes among others.

    Raises:
        InputError: no scan has a mask, or none can be registered.
    """
    return [prepare_scan(*each) for each in _work(config, paths, folder)]


def tolerated_mm(grid: Grid) -> float:
    """Millimetres of foreground that a Grid may cut off without a warning: it is not known any better."""
    return max(BLOCK_MM, *grid.spacing_mm)


def read_scan_table(config: Config) -> pd.DataFrame:
    """scans.tsv with the types of `read_scans`: what training and evaluation take scans, keys and splits from.

    Raises:
        InputError: nothing is prepared yet, or with other settings than the config's.
    """
    folder = config.prepared_folder
    if not (folder / "settings.json").is_file() or not (folder / "scans.tsv").is_file():
        raise InputError(f"no prepared scans in {folder}; run `ldm3d prepare` with this config first")
    before, now = _read_settings(folder), _settings(config)
    if before.get("version") != VERSION:
        raise InputError(f"{folder} was prepared by another version of ldm3d; run `ldm3d prepare` with this config again")
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changed = [f"{key} was {before.get(key)}, is now {now.get(key)}" for key in keys]
    if changed:
        raise InputError(f"{folder} was prepared with other settings: {'; '.join(changed)}; run `ldm3d prepare` again")
    table = read_table(folder / "scans.tsv").reset_index(drop=True)
    for covariate in config.schema():
        kind = float if covariate.kind == "continuous" else object
        values = [covariate.parse(value) for value in table[covariate.name]]
        table[covariate.name] = pd.Series(values, dtype=kind)
    return table


def load_prepared(config: Config, key: str) -> NDArray:
    """The prepared volume of a key as float32 (C, X, Y, Z) in [0, 1]."""
    path = config.prepared_folder / "volumes" / f"{checked_name(key, 'key')}.npy"
    if not path.is_file():
        raise InputError(f"no prepared volume {path}; run `ldm3d prepare` with this config")
    try:
        return read_stored(path)
    except DAMAGED as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run `ldm3d prepare` with this config again") from None


def load_look(config: Config, key: str) -> dict[str, NDArray] | None:
    """What `ldm3d.data.quality.look_at` found in a key's volume; None if the volume cannot be read."""
    return read_look(config.prepared_folder / "volumes" / f"{checked_name(key, 'key')}.npz")


def load_info(config: Config, key: str) -> dict[str, Any]:
    """What is known of a key's scan: the `info` of `to_grid`."""
    path = config.prepared_folder / "volumes" / f"{checked_name(key, 'key')}.json"
    if not path.is_file():
        raise InputError(f"no prepared volume {path}; run `ldm3d prepare` with this config")
    return json.loads(path.read_text(encoding="utf-8"))


def restore_scan(config: Config, key: str, volume: NDArray, scan: NDArray | None = None) -> tuple[NDArray, NDArray]:
    """The whole way back from the Grid to a scan's own voxels and intensities: placing, registration, bias field and mask.

    Args:
        config: whose scans are prepared.
        key: of the scan.
        volume: (1, X, Y, Z) on the Grid, in [0, 1]: what was prepared, or what a model made of it.
        scan: (1, X, Y, Z) as it was read, from which comes what a mask hid; None: it becomes 0.

    Returns:
        float32 (1, X, Y, Z) in the scan's shape, and the scan's affine.

    Raises:
        InputError: nothing is prepared for the key, or what was kept of it is damaged.
    """
    back, affine = restore(volume, load_info(config, key))
    return load_removed(config, key).put_back(back, affine, scan), affine


def load_removed(config: Config, key: str) -> Removed:
    """What a key's scan was relieved of; InputError if its file is damaged."""
    path = config.prepared_folder / "volumes" / f"{checked_name(key, 'key')}{REMOVED}"
    try:
        return read_removed(path)
    except (*DAMAGED, KeyError, BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}); delete the volumes of {key} and run `ldm3d prepare` again") from None


def fingerprint(config: Config) -> str:
    """16 hex digits that change with any prepared volume, covariate, subject or split, but not with where files lie."""
    table = read_scan_table(config).drop(columns="path")
    table = table.sort_values(["subject", "session", "key"]).to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(table.encode()).hexdigest()[:16]


def _work(config: Config, paths: Sequence[str], folder: Path) -> list[tuple]:
    """The arguments of `prepare_scan` for each scan."""
    data = config.data
    steps = steps_of(data)  # once, and not for each scan, if a program or a template is not there
    masks = find_masks(data, paths) if data.mask else [None] * len(paths)
    return [(path, mask, folder, data, steps) for path, mask in zip(paths, masks)]


def _run(arguments: Sequence[tuple], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(i, prepare_scan(*arguments[i])) for all i, as they get done.

    A scan that kills its worker (memory, a crash in a library) takes the whole pool with it. The rest is then tried
    again with half as many workers; if a single one dies, it is known which scan did it.
    """
    if workers == 1:
        yield from ((i, prepare_scan(*each)) for i, each in enumerate(arguments))
        return
    waiting, now = dict(enumerate(arguments)), workers
    while waiting:
        pool = ProcessPoolExecutor(min(now, len(waiting)), multiprocessing.get_context("spawn"))
        try:
            futures = {pool.submit(prepare_scan, *each): i for i, each in waiting.items()}
            for future in as_completed(futures):
                if not isinstance(future.exception(), BrokenProcessPool):
                    yield futures[future], future.result()
                    del waiting[futures[future]]
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for a thousand scans
        if not waiting:
            return
        if now == 1:
            if len(waiting) == len(arguments):
                raise RuntimeError(
                    "worker processes do not start; call prepare below `if __name__ == '__main__':` or with workers=1"
                )
            culprit = min(waiting)  # one worker takes them in order
            del waiting[culprit]
            yield culprit, {"reason": "its worker process died; out of memory? Try it with workers=1"}
        now = max(now // 2, 1) if now > 1 else workers


def _settings(config: Config) -> dict[str, Any]:
    """What the prepared folder depends on, by its name in the config."""
    data = config.data.model_dump(mode="json", exclude={"sample", "balance", "channels"})  # of training alone
    settings = {f"data.{key}": value for key, value in data.items() if key != "grid"}
    settings |= {f"data.grid.{key}": value for key, value in data["grid"].items()}
    settings |= {f"covariate {c.name}": c.model_dump(mode="json", exclude={"follows"}) for c in config.covariates}
    return {"version": VERSION, **settings}


def _read_settings(folder: Path) -> dict[str, Any]:
    """What a prepared folder was made with; {} where it is new, or damaged."""
    try:
        found = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = {}
    return found if isinstance(found, dict) else {}


def _kept_splits(config: Config, processes: Processes) -> dict[str, str]:
    """See `ldm3d.data.people.kept_splits`."""
    folder = config.prepared_folder
    before, now = _read_settings(folder), _settings(config)
    if processes.is_main and before and before.get("version") != VERSION:
        print(
            f"{folder} was prepared by another version of ldm3d: all scans are prepared anew, and older volumes stay there. "
            "Stage 1 goes on with them; what stage 2 has begun has to be ended with that version, or begun anew"
        )
    kept, message = kept_splits(folder, before, now, config.data)
    if processes.is_main and message:
        print(message)
    return kept
