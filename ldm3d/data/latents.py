"""The latent cache: raw posterior moments of every prepared scan, written once and read by stage 2 alone.

FOLDER/moments.npy    float32 (scans, 2c, x, y, z), rows in the order of scans.tsv
FOLDER/condition-NAME.npy   the same of an image condition, (scans, c', x, y, z); NaN where a scan has none
FOLDER/mirrored-*.npy       each of these of the volumes mirrored from left to right, where `diffusion.mirror` asks for them
FOLDER/scans.tsv      the table of prepared scans, with splits and covariates
FOLDER/latents.json   what the cache was made from; another origin is a stale cache
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from ldm3d.data.batches import evenly
from ldm3d.errors import InputError
from ldm3d.files import write_atomic
from ldm3d.processes import ALONE, Processes

MOMENTS, SCANS, ORIGIN = "moments.npy", "scans.tsv", "latents.json"
NOISE_LIMIT = 0.1  # of a channel's variance


def write_latents(
    folder: Path,
    scans: pd.DataFrame,
    load: Callable[[str], NDArray],
    encode: Callable[[NDArray], NDArray],
    origin: Mapping[str, str],
    batch_size: int = 8,
    processes: Processes = ALONE,
    conditions: Mapping[str, tuple[Callable[[str], NDArray], Callable[[NDArray], NDArray]]] | None = None,
    mirrored: bool = False,
) -> None:
    """Encode all scans and write the cache; latents.json comes last, so a half-written cache is never taken for one.

    Args:
        folder: of the cache; what it held is replaced.
        scans: prepared scans, with the column `key`.
        load: key -> volume (C, X, Y, Z).
        encode: volumes (N, C, X, Y, Z) -> moments (N, 2c, x, y, z), float32.
        origin: name -> fingerprint of everything the moments follow from.
        batch_size: scans at a time.
        processes: that share the work; all of them have to call this.
        conditions: name -> the same two functions of an image condition.
        mirrored: whether the mirrored volumes and images are encoded, too.
    """
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).unlink(missing_ok=True)
    arrays = {MOMENTS: (load, encode), **{condition_file(name): pair for name, pair in (conditions or {}).items()}}
    if mirrored:
        arrays |= {mirrored_file(name): (functools.partial(_flipped, own), code) for name, (own, code) in arrays.items()}
    for name, pair in arrays.items():
        _write_array(folder / name, list(scans["key"]), *pair, batch_size, processes)
    if processes.is_main:
        _finish(folder, scans, origin)
    processes.wait()


def _write_array(
    path: Path,
    keys: Sequence[str],
    load: Callable[[str], NDArray],
    encode: Callable[[NDArray], NDArray],
    batch_size: int,
    processes: Processes,
) -> None:
    """One array of the cache, a row a scan."""
    firsts = processes.share(range(0, len(keys), batch_size))
    encoded = ((first, encode(np.stack([load(key) for key in keys[first : first + batch_size]]))) for first in firsts)
    start = list(itertools.islice(encoded, 1))  # none where there are more processes than batches
    shape = processes.gather(start[0][1].shape[1:] if start else None)[0]
    if processes.is_main:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(keys), *shape)).flush()
    processes.wait()
    array = np.lib.format.open_memmap(path, mode="r+")
    bar = tqdm(itertools.chain(start, encoded), desc="encode", unit="batch", total=len(firsts), disable=not processes.is_main)
    for first, values in bar:
        array[first : first + len(values)] = values
    array.flush()
    processes.wait()


def condition_file(name: str) -> str:
    """Where a condition's rows are."""
    return f"condition-{name}.npy"


def mirrored_file(name: str) -> str:
    """Where the rows of an array are of the mirrored volumes."""
    return f"mirrored-{name}"


def _flipped(load: Callable[[str], NDArray], key: str) -> NDArray:
    """A volume (C, X, Y, Z) mirrored from left to right."""
    return load(key)[:, ::-1]


def _finish(folder: Path, scans: pd.DataFrame, origin: Mapping[str, str]) -> None:
    write_atomic(folder / SCANS, scans.to_csv(sep="\t", index=False, na_rep="n/a", lineterminator="\n"))
    write_atomic(folder / ORIGIN, json.dumps(dict(origin), indent=2) + "\n")


def noise_share(moments: NDArray, most: int = 256) -> NDArray:
    """Share of each channel's variance that is the posterior's noise, (c,): E var / (Var mean + E var), in [0, 1].

    What is noise there tells nothing of a volume, and yet the diffusion model has to learn it like everything else.

    Args:
        moments: of all scans, (scans, 2c, x, y, z), for example a memory map.
        most: at most so many scans, evenly chosen, are looked at.
    """
    total = np.zeros((3, moments.shape[1] // 2))  # means of: the mean, its square, the variance
    complete = np.isfinite(moments[:, :, 0, 0, 0]).all(axis=1).nonzero()[0]  # what is made may be missing
    chosen = evenly(complete.tolist(), most)
    for scan in chosen:
        mean, log_variance = np.split(moments[scan].astype(np.float64), 2)  # (c, x, y, z) each
        total += np.stack([part.mean(axis=(1, 2, 3)) for part in (mean, mean**2, np.exp(log_variance))]) / len(chosen)
    mean, square, noise = total
    return noise / (square - mean**2 + noise)


def describe_noise(shares: NDArray) -> tuple[str, str | None]:
    """(the shares of `noise_share` in a line, what to do about those above `NOISE_LIMIT` or None)."""
    line = f"posterior noise in the variance of each latent channel: {', '.join(f'{share:.2%}' for share in shares)}"
    loud = [f"{channel} ({share:.0%})" for channel, share in enumerate(shares, 1) if share > NOISE_LIMIT]
    if not loud:
        return line, None
    return line, (
        f"more than {NOISE_LIMIT:.0%} of the variance of latent channel(s) {', '.join(loud)} is noise of the autoencoder, "
        "and stage 2 would have to learn it: lower autoencoder.kl, train stage 1 longer, or use fewer latent_channels"
    )


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
