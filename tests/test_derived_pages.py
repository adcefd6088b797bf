"""The pages of folders of results: every picture that they show is there, and numbers are those of the sidecars."""

import re
from html import unescape

import numpy as np
import pytest

from ldm3d.applications.anomaly import ANOMALY
from ldm3d.applications.atlas_files import ATLAS
from ldm3d.applications.calibration import Calibration
from ldm3d.applications.edit_files import EDIT
from ldm3d.applications.restore_files import RESTORE
from ldm3d.applications.segment import SEGMENT
from ldm3d.data.derivative import as_json
from ldm3d.report.derived import CAPTIONS, OF_SCANS, SYNTHETIC, write_derived

GIVEN = {"age": 50, "sex": "F"}
SAID = {
    "edit": {
        "Edit": {
            "From": GIVEN,
            "To": [{"age": 60, "sex": "F"}],
            "method": "ode",
            "VolumesBefore": {"ventricular_volume_ml": 21.5, "brain_volume_ml": None},
            "VolumesAfter": [{"ventricular_volume_ml": 23.25, "brain_volume_ml": None}],
        }
    },
    "restore": {"Restoration": {"operator": "missing=z:10-12", "samples": 2, "levels": 4, "covariates": GIVEN}},
    "anomaly": {
        "Anomaly": {
            "covariates": {},
            "HealthyPeople": 45,
            "Clusters": [
                {"centre_mm": [9.4, -3.2, 1.0], "ml": 0.4, "peak_z": 4.5, "p": 0.5},
                {"centre_mm": [-20.2, 8.0, 31.0], "ml": 3.25, "peak_z": -9.5, "p": 0.022},
            ],
        }
    },
    "segment": {"Samples": 8, "VolumesAbout": "mean", "VolumesMl": {"ventricles": {"ml": 30.5, "low": 28.0, "high": 33.0}}},
}
PICTURES = {"edit": ["edited", "difference"], "restore": ["restored"], "anomaly": ["zscore"], "segment": []}


def folder_of(tmp_path, kind, subjects=("01", "02")):
    """As the commands leave it, with pictures that are empty files."""
    kind.begin(tmp_path, "0123456789abcdef")
    (tmp_path / "figures").mkdir()
    for subject in subjects:
        sidecar = tmp_path / f"sub-{subject}/ses-1/anat/sub-{subject}_ses-1_desc-{kind.mains[0]}_T1w.json"
        sidecar.parent.mkdir(parents=True)
        sidecar.write_text(as_json(SAID[kind.name]))
        for desc in PICTURES[kind.name]:
            (tmp_path / f"figures/sub-{subject}_ses-1_desc-{desc}.png").touch()
    return tmp_path


def pictures_of(page):
    return re.findall(r'src="([^"]+)"', page)


@pytest.mark.parametrize("kind", [EDIT, RESTORE, ANOMALY, SEGMENT], ids=lambda kind: kind.name)
def test_page_of_scans(kind, tmp_path):
    folder = folder_of(tmp_path, kind)
    page = unescape(write_derived(folder, kind).read_text())
    assert OF_SCANS in page and kind.readme in page and "0123456789abcdef" in page
    assert re.findall(r'<h2 id="s\d+">(.*)</h2>', page) == ["sub-01_ses-1", "sub-02_ses-1"]
    expected = [f"figures/sub-{s}_ses-1_desc-{desc}.png" for s in ("01", "02") for desc in PICTURES[kind.name]]
    assert pictures_of(page) == expected and all((folder / path).is_file() for path in expected)
    assert "report.html" in (folder / ".bidsignore").read_text().split()


def cells(page):
    """Of tables, by rows."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in rows]


def test_figures_of_scans(tmp_path):
    pages = {}
    for kind in (EDIT, RESTORE, ANOMALY, SEGMENT):
        folder = tmp_path / kind.name
        folder.mkdir()
        pages[kind.name] = unescape(write_derived(folder_of(folder, kind, ["01"]), kind).read_text())
    assert ["age 60, sex F", "23.25"] in cells(pages["edit"])  # what could not be measured has no column
    assert "The scan: age 50, sex F; method ode." in pages["edit"]
    assert "What happened: missing=z:10-12. 2 draws of 4 levels; age 50, sex F." in pages["restore"]
    assert "2 clusters beyond p = 0.001, of which 1 are larger than in healthy people" in pages["anomaly"]
    first = next(row for row in cells(pages["anomaly"]) if len(row) == 4)
    assert first == ["-20, 8, 31", "3.250", "-9.500", "0.022"]  # the least usual comes first
    assert ["ventricles", "30.50", "28.00", "33.00"] in cells(pages["segment"])
    # pictures come before tables
    assert pages["anomaly"].index("<img") < pages["anomaly"].index("<details>") < pages["anomaly"].index("0.022")


def test_clusters_as_a_calibration_tells_them(tmp_path, monkeypatch):
    """Its own rows, under its own keys: one voxel of 5 deviations in a brain of 8^3."""
    zeros = np.zeros((8, 8, 8))
    calibration = Calibration(zeros, zeros + 1, zeros == 0, np.array([1e-4, 1]), np.array([4.0, 0]), np.zeros(19), {})
    zeros[2, 3, 4] = -5
    (row,) = calibration.clusters(zeros)[1]
    found = {**row, "centre_mm": row["centre"], "ml": 0.1}  # which the files add
    monkeypatch.setitem(SAID["anomaly"]["Anomaly"], "Clusters", [found])
    page = unescape(write_derived(folder_of(tmp_path, ANOMALY, ["01"]), ANOMALY).read_text())
    assert ["2, 3, 4", "0.100", "-5.000", "0.050"] in cells(page)


def test_page_of_an_atlas(tmp_path):
    ATLAS.begin(tmp_path, "0123456789abcdef")
    figures = tmp_path / "figures"
    figures.mkdir()
    for name in ("templates.png", "tpl-synthetic_cohort-sexF_desc-film.gif", "tpl-synthetic_cohort-sexM_desc-film.gif"):
        (figures / name).touch()
    (tmp_path / "cohorts.tsv").write_text("cohort\tage\tventricular_volume_ml_template\nage20sexF\t20\t24.5\n")
    page = write_derived(tmp_path, ATLAS).read_text()
    assert SYNTHETIC in page and re.findall(r'<h2 id="s\d+">(.*)</h2>', page) == ["Templates", "Film: sexF", "Film: sexM"]
    assert pictures_of(page) == [f"figures/{path.name}" for path in sorted(figures.iterdir())]
    assert ["age20sexF", "20", "24.5"] in cells(page)


def test_every_picture_has_a_caption():
    drawn = {desc for each in PICTURES.values() for desc in each}
    assert len(set(CAPTIONS.values())) == len(CAPTIONS) and drawn <= {*CAPTIONS}
