"""What a measure, or label maps, say of the prepared scans of a config: volumes for those who have only age and sex."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pandas as pd
from tqdm import tqdm

from ldm3d.config.sections import Config
from ldm3d.data.labels import LabelMaps, count_volumes, read_labels
from ldm3d.data.preparing import load_prepared, read_scan_table
from ldm3d.errors import InputError, some
from ldm3d.geometry import spacing_of
from ldm3d.rulers.volumetry import apply_measure, load_measure


def measure_scans(config: Config, measure: str, workers: int = 1, device: str = "cpu") -> pd.DataFrame:
    """What a measure finds in every prepared scan.

    Args:
        config: of the experiment; its scans are prepared.
        measure: see `load_measure`.
        workers: processes; a network measures in this one.
        device: where a network computes.

    Returns:
        A row a subject and session, as `data.covariates_tables` takes it; NaN where the measure finds nothing. Several scans
        of a session give their mean.

    Raises:
        InputError: nothing is prepared; no such measure.
    """
    function = load_measure(measure, device)
    scans = read_scan_table(config)
    keys = list(scans["key"])
    if workers == 1 or measure.startswith("segmenter:"):
        found = [_measured(config, key, function) for key in tqdm(keys, desc="measure", unit="scan", disable=None)]
    else:
        with ProcessPoolExecutor(min(workers, len(keys)), get_context("spawn")) as pool:
            work = pool.map(functools.partial(_measured, config, measure=function), keys)
            found = list(tqdm(work, desc="measure", total=len(keys), unit="scan", disable=None))
    return _as_table(config, scans, found)


def _measured(config: Config, key: str, measure) -> Mapping[str, float]:
    return dict(apply_measure(measure, load_prepared(config, key), config.data.grid.spacing_mm))


def count_label_maps(
    config: Config, maps: LabelMaps, groups: Mapping[str, Sequence[int]], totals: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """The volume in ml of groups of labels in the label map of every prepared scan, on the map's own voxels.

    Scans without a label map, or with several, are left out, with a warning. Arguments as in `ldm3d.rulers.segmenter`.

    Raises:
        InputError: nothing is prepared; no scan has one label map; a total of groups that are not there.
    """
    if strangers := {part for parts in totals.values() for part in parts} - set(groups):
        raise InputError(f"a total sums {some(sorted(strangers))}, which no --volume names; known are {some(groups)}")
    scans = read_scan_table(config)
    found, lacking = [], {}
    for i, row in tqdm(enumerate(scans.itertuples()), desc="measure", total=len(scans), unit="scan", disable=None):
        try:
            labels, affine = read_labels(maps.one(row.subject, row.session))
        except InputError as error:
            lacking[i] = str(error)
            continue
        counted = count_volumes(labels, spacing_of(affine), groups)
        found.append(counted | {name: sum(counted[part] for part in parts) for name, parts in totals.items()})
    if not found:
        raise InputError(f"none of {len(scans)} scans has one label map: {next(iter(lacking.values()))}")
    if lacking:
        first = next(iter(lacking.values()))
        warnings.warn(f"{len(lacking)} of {len(scans)} scans have no row, such as: {first}", stacklevel=2)
    return _as_table(config, scans.drop(index=list(lacking)), found)


def _as_table(config: Config, scans: pd.DataFrame, found: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    sessions = [config.data.session_column] if any(scans["session"]) else []
    names = [config.data.subject_column, *sessions]
    table = pd.DataFrame([*found]).replace([np.inf, -np.inf], np.nan)
    quantities = list(table)
    table[names[0]] = [f"sub-{subject}" for subject in scans["subject"]]
    if sessions:
        table[names[1]] = [f"ses-{session}" if session else "" for session in scans["session"]]
    return table.groupby(names, sort=True)[quantities].mean().round(3).reset_index()
