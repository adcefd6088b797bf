"""An atlas as a BIDS derivative, which a killed command leaves in order, and goes on with.

OUT/tpl-NAME/cohort-CELL/anat/   ..._desc-mean_T1w.nii.gz       the mean of the cell's volumes
                                 ..._desc-deviation_T1w.nii.gz  their standard deviation
                                 ..._desc-sharp_T1w.nii.gz      the template of the mean shape
                                 ..._desc-mean_T1w.json         appears last: with it the cell is done
OUT/tpl-NAME/..._desc-film_T1w.nii.gz   the templates over age, four-dimensional
OUT/cohorts.tsv                  each cell: what was asked, and volumes measured on its template and on its volumes
OUT/sourcedata/CELL/             the generated volumes: see `ldm3d.generation.series`
OUT/figures/                     a picture of all templates, and the films
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm3d import figures
from ldm3d.applications.atlas import Cell, Template, cells_of, film, template_of
from ldm3d.applications.derived import Kind
from ldm3d.applications.edit import VOLUMETRY
from ldm3d.covariates import describe
from ldm3d.data.derivative import as_json, synthetic_path
from ldm3d.data.nifti import read_volume, unpack_volume, write_volume
from ldm3d.data.tables import write_table
from ldm3d.description import Sampling
from ldm3d.files import write_atomic
from ldm3d.generation.run import generate
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop
from ldm3d.rulers.volumetry import Measure, apply_measure, load_measure

README = (
    "Templates of synthetic brains (ldm3d): means of volumes that a latent diffusion model generated for each group. They "
    "show what the model learned of its training data, not a population. For research."
)
TABLE = "cohorts.tsv"
ATLAS = Kind("atlas", "Templates of synthetic brains", README, ("mean",), ("deviation", "film", TABLE))
NAMES = ("mean", "deviation", "sharp")


def atlas(
    pipe: Pipeline,
    folder: Path | str,
    asked: Mapping[str, Any],
    by: Sequence[str] = (),
    volumes: int = 100,
    *,
    name: str = "synthetic",
    rounds: int = 2,
    sampling: Sampling | None = None,
    measure: str | Measure = VOLUMETRY,
    batch_size: int = 8,
    progress: Callable[[str, int, int], None] | None = None,
    stop: Stop | None = None,
) -> bool:
    """Write an atlas.

    >>> pipe.atlas("out", {"age": "20:90:10"}, by=["sex"])

    Args:
        pipe: the model.
        folder: empty, absent, or of the same atlas before; what is there is not made again.
        asked, by: see `cells_of`.
        volumes: of each cell.
        name: letters and digits, after `tpl-`.
        rounds: of registration for the sharp template; 0 for none.
        sampling: None for the pipeline's own.
        measure: of volumes, see `ldm3d.rulers.volumetry.load_measure`.
        batch_size: see `Pipeline.volumes`.
        progress: called with (cell, volumes that are drawn and averaged, all of them).
        stop: looked at before every volume and cell.

    Returns:
        Whether it is complete; False where a stop was asked for.

    Raises:
        InputError: what `cells_of` and `generate` raise; the folder holds something else.
    """
    folder, stop, sampling = Path(folder), stop or Stop(), sampling or pipe.sampling
    cells = cells_of(pipe.schema, asked, by)
    pipe.schema.warn_beyond_seen([cell.row for cell in cells])
    pipe.check_sampling(sampling)
    ATLAS.check(folder)
    ruler = load_measure(measure, str(pipe.device)) if isinstance(measure, str) else measure
    total = volumes * (2 + rounds)  # drawn once, averaged once, registered in each round
    found = [CellFiles(folder, name, pipe, cell, volumes, rounds, sampling) for cell in cells]
    for files in found:
        if files.is_done:
            continue
        ATLAS.begin(folder, pipe.model_hash)
        show = functools.partial(progress, files.cell.label) if progress else lambda *_: None
        rows = [dict(files.cell.row)] * volumes
        drawn = lambda done, _all, show=show: show(done, total)  # noqa: E731
        generate(pipe, files.drawn, rows, sampling, batch_size, progress=drawn, stop=stop)
        if stop.asked:
            return False
        files.write(ruler, lambda done, show=show: show(volumes + done, total))
    _finish(folder, name, pipe, found)
    return True


class CellFiles:
    """The files of one cell.

    Args:
        folder, name, volumes, rounds, sampling: see `atlas`.
        pipe: the model.
        cell: which.
    """

    def __init__(self, folder: Path, name: str, pipe: Pipeline, cell: Cell, volumes: int, rounds: int, sampling: Sampling):
        self.folder, self.name, self.pipe, self.cell = folder, name, pipe, cell
        self.volumes, self.rounds, self.sampling = volumes, rounds, sampling
        self.drawn = folder / "sourcedata" / cell.label
        follows_from = [pipe.model_hash, dict(cell.row), volumes, rounds, sampling.to_dict()]
        self.identity = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()[:16]

    def path(self, desc: str, ending: str = ".nii.gz") -> Path:
        stem = f"tpl-{self.name}_cohort-{self.cell.label}"
        anat = self.folder / f"tpl-{self.name}" / f"cohort-{self.cell.label}" / "anat"
        return anat / f"{stem}_desc-{desc}_{self.pipe.suffix}{ending}"

    @property
    def sidecar(self) -> dict[str, Any]:
        """What is said of the cell; empty where it is not done."""
        try:
            said: dict[str, Any] = json.loads(self.path("mean", ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said

    @property
    def is_done(self) -> bool:
        """Whether it is there, as it is asked for now; otherwise it is made anew from volumes that have to be the same."""
        return self.sidecar.get("Identity") == self.identity

    def volume(self, desc: str) -> NDArray:
        """(X, Y, Z) of what was written."""
        return read_volume(self.path(desc))[0][0]

    @property
    def best(self) -> str:
        """Description of the template to show."""
        return "sharp" if self.rounds else "mean"

    def write(self, measure: Measure, progress: Callable[[int], None]) -> None:
        """Average the volumes that were drawn, and write what comes of it."""
        spacing, done, measured = self.pipe.grid.spacing_mm, 0, []

        def count() -> None:
            nonlocal done
            done += 1
            progress(done)

        def drawn() -> Iterator[NDArray]:
            for i in range(self.volumes):
                volume = unpack_volume(synthetic_path(self.drawn, i, self.volumes, self.pipe.suffix).read_bytes())
                if len(measured) == i:  # the first time
                    measured.append(apply_measure(measure, volume, spacing))
                yield volume[0]

        found = template_of(drawn, self.rounds, count)
        for desc in NAMES if self.rounds else NAMES[:2]:
            write_volume(self.path(desc), getattr(found, desc)[None], self.pipe.output_grid.affine, self.pipe.mark)
        write_atomic(self.path("mean", ".json"), as_json(self._sidecar(found, measured, measure)))

    def _sidecar(self, found: Template, measured: Sequence[Mapping[str, float]], measure: Measure) -> dict[str, Any]:
        of_people = pd.DataFrame(measured)
        of_template = apply_measure(measure, found.best[None], self.pipe.grid.spacing_mm)
        return {
            "Description": f"Mean of {found.count} synthetic {self.pipe.suffix}-like volumes, generated by ldm3d",
            "synthetic": True,
            "Sources": [f"bids::sourcedata/{self.cell.label}"],
            "SkullStripped": self.pipe.skull_stripped,
            "Resolution": " x ".join(f"{mm:g}" for mm in self.pipe.grid.spacing_mm) + " mm",
            "model_hash": self.pipe.model_hash,
            "Cohort": {name: value for name, value in self.cell.row.items() if value is not None},
            "Volumes": {
                name: {
                    "Template": _number(of_template[name]),
                    "Mean": _number(of_people[name].mean()),
                    "Deviation": _number(of_people[name].std()),
                }
                for name in of_people
            },
            **self.sampling.to_dict(),
            "Rounds": self.rounds,
            "Identity": self.identity,
        }


def _finish(folder: Path, name: str, pipe: Pipeline, cells: Sequence[CellFiles]) -> None:
    """The table of all cells, the picture, and the films."""
    rows = []
    for files in cells:
        row = {"cohort": files.cell.label, **files.cell.row, "volumes": files.volumes}
        for covariate, of in files.sidecar["Volumes"].items():
            row |= {f"{covariate}_{kind.lower()}": value for kind, value in of.items()}
        rows.append(row)
    write_table(folder / TABLE, pd.DataFrame(rows))
    (folder / "figures").mkdir(exist_ok=True)
    shown = [files.volume(files.best)[None] for files in cells]
    titles = [describe(files.cell.row) for files in cells]
    columns = min(4, len({files.cell.position for files in cells}))
    spacing = pipe.grid.spacing_mm
    figures.save(figures.mosaic(shown, titles, spacing, columns, "synthetic: templates"), folder / "figures" / "templates.png")
    for label in dict.fromkeys(files.cell.film for files in cells):
        among = [files for files in cells if files.cell.film == label]
        positions = [float(files.cell.position or 0) for files in among]
        if len(positions) < 2:
            continue
        at, frames = film(positions, [files.volume(files.best) for files in among])
        stem = f"tpl-{name}" + (f"_cohort-{label}" if label else "") + "_desc-film"
        path = folder / f"tpl-{name}" / (f"cohort-{label}" if label else "") / "anat" / f"{stem}_{pipe.suffix}.nii.gz"
        write_volume(path, frames, pipe.output_grid.affine, pipe.mark)
        about = {"Description": "Templates over the frames' values", "synthetic": True, "Frames": [round(a, 4) for a in at]}
        write_atomic(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), as_json(about))
        moving = [f"synthetic  {label}  {place:.0f}" for place in at]
        figures.save_film(frames[:, None], moving, spacing, folder / "figures" / f"{stem}.gif")


def _number(value: float) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None
