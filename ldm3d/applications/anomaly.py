"""What is not as in healthy people: a scan against its healthy counterpart, judged by what is usual.

Legend: as in `ldm3d.applications.counterpart` and `ldm3d.applications.calibration`.
"""

import hashlib
import inspect
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.applications.calibration import Calibration
from ldm3d.applications.counterpart import Counterpart, counterpart
from ldm3d.applications.derived import Derived, Kind
from ldm3d.data.placing import restore
from ldm3d.errors import InputError, itemised
from ldm3d.files import write_atomic
from ldm3d.geometry import resample, slices_through
from ldm3d.pipeline import Pipeline

README = (
    "Brain scans against their healthy counterparts: what differs from what a latent diffusion model (ldm3d) of healthy "
    "people expects. The counterparts are derived and partly synthetic. Not for diagnosis: unusual is not ill, and usual is "
    "not healthy."
)
ANOMALY = Kind(
    "anomaly",
    "Brain scans against their healthy counterparts (DERIVED)",
    README,
    ("zscore",),
    ("logp", "clusters", "counterpart"),
)


@dataclass(frozen=True, eq=False)
class Anomaly:
    """A scan's difference from its healthy counterpart.

    Attributes:
        counterpart: with the scan.
        score: z, (X, Y, Z) on the Grid; positive where the scan is brighter; 0 outside of the brain.
        p: two-sided, not corrected for the number of voxels.
        labels: clusters by number, 0 for none.
        clusters: a row each, see `Calibration.clusters`; p there is corrected for their number.
    """

    counterpart: Counterpart
    score: NDArray
    p: NDArray
    labels: NDArray
    clusters: list[dict[str, Any]]


def anomaly(
    pipe: Pipeline, image: Any, calibration: Calibration, covariates: Mapping[str, Any] | None = None, **options: Any
) -> Anomaly:
    """Judge a scan.

    Args:
        pipe: the model.
        image: see `ldm3d.applications.placed.place`.
        calibration: of the same model and options.
        covariates: see `counterpart`; those that were given in the calibration.
        options: of `counterpart`.

    Raises:
        InputError: what `counterpart` raises; the calibration is of another model or of other options.
    """
    calibration.check(about_of(pipe, options))
    found = counterpart(pipe, image, covariates, **options)
    score = calibration.score(residual_of(found))
    return Anomaly(found, score, calibration.p_values(score), *calibration.clusters(score))


def calibrate(
    pipe: Pipeline,
    people: Iterable[tuple[Any, Mapping[str, Any]]],
    progress: Callable[[str], None] | None = None,
    folder: Path | None = None,
    **options: Any,
) -> Calibration:
    """What is usual in healthy people whom the model has not seen.

    Args:
        pipe: the model.
        people: (scan, covariates) of each, as for `anomaly`.
        progress: called after each with what became of it.
        folder: what is found of each person (whose scan is a file) is kept there, so that a call that was stopped goes on;
            None: it starts anew.
        options: of `counterpart`.

    Raises:
        InputError: fewer scans than `Calibration.fit` needs can be used.
    """
    residuals, volumes, failed = [], [], {}
    for scan, covariates in people:
        try:
            residual, volume = _of_healthy(pipe, scan, covariates, options, folder)
        except InputError as error:
            failed[str(scan)] = str(error)
            outcome = f"left out: {error}"
        else:
            residuals.append(residual)
            volumes.append(volume)
            outcome = str(scan)
        if progress:
            progress(outcome)
    if failed and len(residuals) < 2:
        raise InputError(f"no healthy scan could be used:\n{itemised(failed)}")
    return Calibration.fit(residuals, volumes, about_of(pipe, options))


def _of_healthy(
    pipe: Pipeline, scan: Any, covariates: Mapping[str, Any], options: Mapping[str, Any], folder: Path | None
) -> tuple[NDArray, NDArray]:
    """Residual and volume of a healthy person, (X, Y, Z); from the folder if they are there."""
    kept = None
    if folder is not None and isinstance(scan, str | Path) and Path(scan).is_file():
        content = hashlib.sha256(Path(scan).read_bytes()).hexdigest()
        told = [content, about_of(pipe, options), dict(covariates), options.get("register"), options.get("stripped")]
        kept = folder / f"{hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]}.npz"
        if kept.is_file():
            with np.load(kept, allow_pickle=False) as stored:
                return stored["residual"], stored["volume"]
    found = counterpart(pipe, scan, covariates, **options)
    residual, volume = residual_of(found), found.placed.volume[0, 0].cpu().numpy()
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        content_of = io.BytesIO()
        np.savez(content_of, residual=residual, volume=volume)
        write_atomic(kept, content_of.getvalue())
    return residual, volume


def about_of(pipe: Pipeline, options: Mapping[str, Any]) -> dict[str, Any]:
    """What residuals follow from beside a scan, with what `counterpart` has by default; as JSON has it."""
    arguments = inspect.signature(counterpart).parameters.values()
    told = {each.name: options.get(each.name, each.default) for each in arguments if each.kind is each.KEYWORD_ONLY}
    told = {name: told[name] for name in sorted(told) if name not in ("progress", "register", "stripped")}
    about: dict[str, Any] = json.loads(json.dumps({"model": pipe.model_hash, **told}))
    return about


def residual_of(found: Counterpart) -> NDArray:
    """The residual's first channel, (X, Y, Z)."""
    residual: NDArray = found.residual[0, 0].cpu().numpy()
    return residual


def write_anomaly(files: Derived, found: Anomaly, calibration: Calibration) -> Path:
    """Write z, -log10 p, clusters and the counterpart on the scan's own voxels, and a picture; returns the path of z."""
    placed = found.counterpart.placed

    def back(values: NDArray) -> NDArray:
        return restore(values[None].astype(np.float32), {**placed.info, "low": 0.0, "high": 1.0})[0]

    labels = resample(
        found.labels[None].astype(np.int16),
        np.array(placed.info["grid_affine"]),
        placed.affine,
        placed.scan.shape[1:],
        "nearest",
    )
    images = {
        "zscore": back(found.score),
        "logp": back(-np.log10(found.p)),
        "clusters": labels,
        "counterpart": placed.back(found.counterpart.mean, reference=placed.volume),
    }
    grid_affine = np.array(placed.info["grid_affine"])
    rows = [
        {
            **row,
            "centre_mm": (grid_affine @ [*row["centre"], 1])[:3].round(1).tolist(),
            "ml": row["voxels"] * files.pipe.grid.voxel_ml,
        }
        for row in found.clusters
    ]
    title = "difference from the healthy counterpart, p < 0.01 (not corrected)"
    picture = figures.overlay(
        placed.volume[0].cpu().numpy(),
        found.score[None] * (found.p[None] < 0.01),
        files.pipe.grid.spacing_mm,
        title + (", through the largest cluster" if found.clusters else ""),
        "z",
        signed=True,
        where=slices_through(found.labels == 1) if found.clusters else None,
    )
    figures.save(picture, files.figure("zscore"))
    sidecar = {
        "Description": f"A {files.pipe.suffix} scan against its healthy counterpart by ldm3d: derived; research only",
        "Anomaly": {
            **found.counterpart.settings,
            "HealthyPeople": calibration.people,
            "Calibration": calibration.identity,
            "Clusters": rows,
            "Registration": placed.info.get("registration"),
        },
    }
    return files.write(images, placed.affine, placed.mark, sidecar)
