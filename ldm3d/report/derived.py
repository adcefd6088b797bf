"""The page of a folder of results: what a model made of scans (edit, restore, anomaly, segment), an atlas, or more people.

Pictures come first, and what was measured is below each. The pictures stay files of the folder, so that a page of many scans
stays small: it is to be moved with its folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm3d.applications.anomaly import ANOMALY
from ldm3d.applications.atlas_files import ATLAS
from ldm3d.applications.atlas_files import TABLE as COHORTS
from ldm3d.applications.derived import Kind
from ldm3d.applications.edit_files import EDIT
from ldm3d.applications.restore_files import RESTORE
from ldm3d.applications.segment import SEGMENT
from ldm3d.covariates import describe, in_words
from ldm3d.data.tables import read_table
from ldm3d.report.page import Section, command, now, number, write_page

TEMPLATE = "derived.html"
OF_SCANS = "SHOWS THE SCANS: KEEP THIS PAGE WITH THE DATA"
SYNTHETIC = "SYNTHETIC DATA"
UNUSUAL = 0.05  # corrected p of a cluster
CAPTIONS = {
    "edited": "The scan, and what it becomes.",
    "difference": "Where the last one differs from the scan.",
    "restored": "What is known, the mean of the draws, and a draw; the deviation of the draws says how far to trust the mean.",
    "zscore": "Where the scan differs from its healthy counterpart more than healthy people's do.",
    "templates": "The template of each cell.",
    "film": "The templates, moving.",
}
GROUPS = "groups.tsv"
AUGMENTED = (
    "Volumes that a latent diffusion model (ldm3d) generated for groups of a table that have few people. They hold what the "
    "model learned of its training data, and are no people."
)
Table = dict[str, list]


def write_derived(folder: Path, kind: Kind) -> Path:
    """Write FOLDER/report.html of all that is done there.

    Args:
        folder: of results of this kind.
        kind: see `ldm3d.applications.derived`.

    Returns:
        The page.
    """
    sections = _atlas(folder) if kind is ATLAS else _scans(folder, kind)
    return _write(folder, kind.title, kind.readme, sections, SYNTHETIC if kind is ATLAS else OF_SCANS, folder)


def write_augmented(folder: Path) -> Path:
    """Write FOLDER/report.html of people who were added to a table, see `ldm3d.applications.augment`; returns the page."""
    groups = read_table(folder / GROUPS)
    table = {"columns": [in_words(name) for name in groups], "rows": groups.to_numpy().tolist()}
    labels = len(groups.columns) - 2  # the last are counts
    shown = [{"source": "volumes/mosaic.png", "caption": "The first of the generated volumes.", "name": "mosaic"}]
    found = [Section("Groups, and how many people each has", "", table, labels, shown, fold="Each group, real and generated")]
    return _write(folder, "Generated volumes for thin groups", AUGMENTED, found, SYNTHETIC, folder / "volumes")


def _write(folder: Path, title: str, about: str, sections: Sequence[Section], badge: str, dataset: Path) -> Path:
    described = json.loads((dataset / "dataset_description.json").read_text(encoding="utf-8"))
    made = {"command": command(), "made": now(), "model": described["GeneratedBy"][0]["Description"].rpartition(" ")[2]}
    return write_page(folder, title, sections, made, (), TEMPLATE, badge=badge, about=about)


def _scans(folder: Path, kind: Kind) -> list[Section]:
    """A section for each scan that is done."""
    paths = sorted(path for main in kind.mains for path in folder.rglob(f"sub-*_desc-{main}_*.json"))
    return [_scan(folder, kind, path) for path in paths]


def _scan(folder: Path, kind: Kind, sidecar: Path) -> Section:
    stem, said = sidecar.name.partition("_desc-")[0], json.loads(sidecar.read_text(encoding="utf-8"))
    text, fold, table, labels = ABOUT[kind.name](said)
    pictures = [_picture(folder, path) for path in sorted((folder / "figures").glob(f"{stem}_desc-*.png"))]
    pictures.sort(key=lambda each: [*CAPTIONS.values()].index(each["caption"]))
    return Section(stem, text, table, labels, pictures, fold=fold if table else "")


def _picture(folder: Path, path: Path) -> dict[str, str]:
    desc = path.stem.rpartition("desc-")[2]
    return {"source": path.relative_to(folder).as_posix(), "caption": CAPTIONS[desc], "name": path.stem}


# What is said of a scan by its sidecar: a text, the line that its table is folded behind, the table, and its text columns
About = tuple[str, str, Table | None, int]


def _edit(said: Mapping[str, Any]) -> About:
    of = said["Edit"]
    names = [name for name, value in of["VolumesBefore"].items() if value is not None]
    rows = [["scan", *(_ml(of["VolumesBefore"][name]) for name in names)]]
    for target, after in zip(of["To"], of["VolumesAfter"]):
        rows.append([describe(target), *(_ml(after[name]) for name in names)])
    text = f"The scan: {describe(of['From'])}; method {of['method']}."
    return text, "Measured volumes", {"columns": ["", *map(in_words, names)], "rows": rows}, 1


def _restored(said: Mapping[str, Any]) -> About:
    of = said["Restoration"]
    text = f"What happened: {of['operator']}. {of['samples']} draws of {of['levels']} levels; {describe(of['covariates'])}."
    return text, "", None, 1


def _anomaly(said: Mapping[str, Any]) -> About:
    of = said["Anomaly"]
    found = sorted(of["Clusters"], key=lambda row: row["p"])
    unusual = sum(row["p"] <= UNUSUAL for row in found)
    text = (
        f"{len(found)} clusters beyond p = 0.001, of which {unusual} are larger than in healthy people (corrected p at most "
        f"{UNUSUAL}); by {of['HealthyPeople']} healthy people, {describe(of['covariates'])}."
    )
    rows = [[_place(row["centre_mm"]), _ml(row["ml"]), number(row["peak_z"]), number(row["p"])] for row in found]
    table = {"columns": ["centre, mm", "volume, ml", "largest z", "corrected p"], "rows": rows}
    return text, "Clusters", table if rows else None, 1


def _segmented(said: Mapping[str, Any]) -> About:
    rows = [[in_words(name), *(_ml(v[key]) for key in ("ml", "low", "high"))] for name, v in said["VolumesMl"].items()]
    table = {"columns": ["", "ml", "low", "high"], "rows": rows}
    return f"{said['Samples']} label maps were drawn.", f"Volumes: {said['VolumesAbout']}", table, 1


ABOUT: Mapping[str, Callable[[Mapping[str, Any]], About]] = {
    EDIT.name: _edit,
    RESTORE.name: _restored,
    ANOMALY.name: _anomaly,
    SEGMENT.name: _segmented,
}


def _atlas(folder: Path) -> list[Section]:
    """Templates with the table of cells, and films."""
    figures = folder / "figures"
    cells = read_table(folder / COHORTS)
    table = {"columns": [in_words(name) for name in cells], "rows": cells.to_numpy().tolist()}
    volumes = "Covariates of each cell, and volumes measured on its template (template) and on its volumes (mean, deviation)"
    found = [Section("Templates", "", table, 1, [_picture(folder, figures / "templates.png")], fold=volumes)]
    films = [_picture(folder, path) for path in sorted(figures.glob("*.gif"))]
    titles = [each["name"].removesuffix("_desc-film").partition("cohort-")[2] or "all cells" for each in films]
    return found + [Section(f"Film: {title}", pictures=[each]) for title, each in zip(titles, films)]


def _ml(value: float | None) -> str:
    return "n/a" if value is None else number(float(value))


def _place(centre: Sequence[float]) -> str:
    return ", ".join(f"{each:.0f}" for each in centre)
