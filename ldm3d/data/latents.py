"""The latent cache: raw posterior moments of every prepared scan, written once and read by stage 2 alone.

FOLDER/moments.npy    float32 (scans, 2c, x, y, z), rows in the order of scans.tsv
FOLDER/scans.tsv      the table of prepared scans, with splits and covariates
FOLDER/latents.json   what the cache was made from; another origin is a stale cache
"""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.errors import InputError
from ldm3d.files import write_whole
from ldm3d.processes import ALONE, Processes

MOMENTS, SCANS, ORIGIN = "moments.npy", "scans.tsv", "latents.json"


def write_latents(
    folder: Path,
    scans: pd.DataFrame,
    load: Callable[[str], NDArray],
    encode: Callable[[NDArray], NDArray],
    origin: Mapping[str, str],
    batch_size: int = 8,
    processes: Processes = ALONE,
) -> None:
    """Encode all scans and write the cache; latents.json comes last, so a half-written cache is never taken for one.

    Args:
        folder: of the cache; what it held is replaced.
        scans: prepared scans, with the column `key`.
        load: key -> volume (X, Y, Z).
        encode: volumes (N, 1, X, Y, Z) -> moments (N, 2c, x, y, z), float32.
        origin: name -> fingerprint of everything the moments follow from.
        batch_size: scans at a time.
        processes: that share the work; all of them have to call this.
    """
    keys = list(scans["key"])
    firsts = processes.share(range(0, len(keys), batch_size))
    encoded = ((first, encode(np.stack([load(key) for key in keys[first : first + batch_size]])[:, None])) for first in firsts)
    start = list(itertools.islice(encoded, 1))  # none where there are more processes than batches
    shape = processes.gather(start[0][1].shape[1:] if start else None)[0]
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).unlink(missing_ok=True)
        np.lib.format.open_memmap(folder / MOMENTS, mode="w+", dtype=np.float32, shape=(len(keys), *shape)).flush()
    processes.wait()
    array = np.lib.format.open_memmap(folder / MOMENTS, mode="r+")
    bar = tqdm(itertools.chain(start, encoded), desc="encode", unit="batch", total=len(firsts), disable=not processes.is_main)
    for first, moments in bar:
        array[first : first + len(moments)] = moments
    array.flush()
    processes.wait()
    if processes.is_main:
        _finish(folder, scans, origin)
    processes.wait()


def _finish(folder: Path, scans: pd.DataFrame, origin: Mapping[str, str]) -> None:
    write_whole(folder / SCANS, scans.to_csv(sep="\t", index=False, na_rep="n/a", lineterminator="\n"))
    write_whole(folder / ORIGIN, json.dumps(dict(origin), indent=2) + "\n")


def check_latents(folder: Path, origin: Mapping[str, str]) -> None:
    """Raise InputError unless the cache is there and of this origin; the message says what has changed."""
    if not (folder / ORIGIN).is_file():
        raise InputError(f"no latent cache in {folder}; run `ldm3d encode CONFIG` first")
    try:
        found = json.loads((folder / ORIGIN).read_text())
    except ValueError:
        raise InputError(f"the latent cache in {folder} is damaged; run `ldm3d encode CONFIG` again") from None
    changed = [name for name in origin if found.get(name) != origin[name]]
    if changed:
        raise InputError(
            f"the latent cache in {folder} is stale: the {' and the '.join(changed)} changed since it was written; "
            "run `ldm3d encode CONFIG` again"
        )


def is_fresh(folder: Path, origin: Mapping[str, str]) -> bool:
    """Whether `read_latents` would succeed."""
    try:
        read_latents(folder, origin)
    except InputError:
        return False
    return True


def read_latents(folder: Path, origin: Mapping[str, str]) -> tuple[NDArray, pd.DataFrame]:
    """(moments as a read-only memory map, scans as text) of a cache that is fresh; see `check_latents`."""
    check_latents(folder, origin)
    try:
        scans = pd.read_csv(folder / SCANS, sep="\t", dtype=str, keep_default_na=False)
        moments = np.load(folder / MOMENTS, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(f"the latent cache in {folder} is damaged ({error}); run `ldm3d encode CONFIG --force`") from None
    if len(moments) != len(scans):
        raise InputError(f"the latent cache in {folder} is damaged; run `ldm3d encode CONFIG --force`")
    return moments, scans
