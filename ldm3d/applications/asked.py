"""Which scans a command is asked for: one, those of a table, or all of a BIDS dataset, each with its covariates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm3d.applications.derived import check_labels
from ldm3d.config.data import DataConfig
from ldm3d.data.bids import read_columns, read_scans
from ldm3d.data.tables import check_column, read_table
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline


@dataclass(frozen=True)
class AskedScan:
    """A scan.

    Attributes:
        scan: its file.
        covariates: by name, as text; those that are not known are left out, or empty.
        cells: of its row in a table, by column.
    """

    scan: Path
    covariates: Mapping[str, str]
    cells: Mapping[str, str]


def asked_scans(
    pipe: Pipeline, scan: Path | None, table: Path | None, bids: Path | None, suffix: str | None = None
) -> list[AskedScan]:
    """The scans of exactly one of the three.

    Args:
        pipe: the model, which names covariates and the suffix of scans.
        scan: a file; or
        table: with a column path, from its own folder on, and columns of covariates; or
        bids: folder of a dataset, with its participants.tsv where there is one.
        suffix: of the scans in it; None: what the model makes.

    Raises:
        InputError: none or several of the three; no scans; two whose results would have one name.
    """
    if sum(each is not None for each in (scan, table, bids)) != 1:
        raise InputError("give either one scan, or --table with a path column, or --bids with the folder of a dataset")
    if scan is not None:
        return [AskedScan(scan, {}, {})]
    found = _of_table(pipe, table) if table is not None else _of_dataset(pipe, Path(str(bids)), suffix or pipe.suffix)
    check_labels([each.scan for each in found], str(table or bids))
    return found


def _of_table(pipe: Pipeline, table: Path) -> list[AskedScan]:
    frame = read_table(table)
    check_column(table, list(frame), "path", "the scans")
    if not len(frame):
        raise InputError(f"{table} has no rows; write one for each scan")
    own = [name for name in pipe.schema.names if name in frame]
    return [AskedScan(table.parent / row["path"], {name: row[name] for name in own}, row) for row in frame.to_dict("records")]


def _of_dataset(pipe: Pipeline, folder: Path, suffix: str) -> list[AskedScan]:
    grid = {"shape": pipe.grid.shape, "spacing_mm": pipe.grid.spacing_mm}
    data = DataConfig.model_validate({"bids": folder, "suffix": suffix, "grid": grid})
    scans = read_scans(data, ())
    cells = read_columns(data, scans, {name: [name] for name in pipe.schema.names})
    return [
        AskedScan(Path(path), {name: column[i] for name, column in cells.items()}, {}) for i, path in enumerate(scans["path"])
    ]
