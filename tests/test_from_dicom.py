"""DICOM files become a BIDS dataset: which series is taken, what is told of people, what fails alone."""

import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import command_line, tiny_settings

from ldm3d.data.nifti import read_volume
from ldm3d.data.tables import read_table

SHAPE = (20, 24, 16)  # columns, rows, slices


def element(group: int, number: int, kind: str, value) -> bytes:
    """One data element, explicit VR, little endian."""
    data = value if isinstance(value, bytes) else str(value).encode()
    data += (b"\0" if kind in ("UI", "OB", "OW") else b" ") * (len(data) % 2)
    head = struct.pack("<HH", group, number) + kind.encode()
    long = kind in ("OB", "OW", "SQ", "UN")
    return head + (b"\0\0" + struct.pack("<I", len(data)) if long else struct.pack("<H", len(data))) + data


def write_dicom(folder: Path, description: str, volume: np.ndarray, series: int) -> None:
    """A series of slices, as a scanner would write them; the patient is called Doe^Jane."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = f"1.2.826.0.1.3680043.8.498.{series}"
    for z in range(volume.shape[2]):
        elements = [
            (0x0008, 0x0008, "CS", "ORIGINAL\\PRIMARY\\M\\NORM"),
            (0x0008, 0x0016, "UI", "1.2.840.10008.5.1.4.1.1.4"),
            (0x0008, 0x0018, "UI", f"{uid}.{z + 1}"),
            (0x0008, 0x0020, "DA", "20200601"),
            (0x0008, 0x0022, "DA", "20200601"),
            (0x0008, 0x0032, "TM", "101500"),
            (0x0008, 0x0060, "CS", "MR"),
            (0x0008, 0x0070, "LO", "SIEMENS"),
            (0x0008, 0x103E, "LO", description),
            (0x0010, 0x0010, "PN", "Doe^Jane"),
            (0x0010, 0x0020, "LO", "MRN123"),
            (0x0010, 0x0030, "DA", "19600601"),
            (0x0010, 0x0040, "CS", "F"),
            (0x0018, 0x0050, "DS", "2"),
            (0x0018, 0x0080, "DS", "2000"),
            (0x0018, 0x0081, "DS", "3"),
            (0x0020, 0x000D, "UI", "1.2.826.0.1.3680043.8.498.9"),
            (0x0020, 0x000E, "UI", uid),
            (0x0020, 0x0011, "IS", series),
            (0x0020, 0x0013, "IS", z + 1),
            (0x0020, 0x0032, "DS", f"-20\\-24\\{2 * z}"),
            (0x0020, 0x0037, "DS", "1\\0\\0\\0\\1\\0"),
            (0x0020, 0x0052, "UI", f"{uid}.0"),
            (0x0028, 0x0002, "US", struct.pack("<H", 1)),
            (0x0028, 0x0004, "CS", "MONOCHROME2"),
            (0x0028, 0x0010, "US", struct.pack("<H", volume.shape[1])),
            (0x0028, 0x0011, "US", struct.pack("<H", volume.shape[0])),
            (0x0028, 0x0030, "DS", "2\\2"),
            (0x0028, 0x0100, "US", struct.pack("<H", 16)),
            (0x0028, 0x0101, "US", struct.pack("<H", 16)),
            (0x0028, 0x0102, "US", struct.pack("<H", 15)),
            (0x0028, 0x0103, "US", struct.pack("<H", 0)),
            (0x7FE0, 0x0010, "OW", np.ascontiguousarray(volume[:, :, z].T.astype("<u2")).tobytes()),
        ]
        syntax = element(0x0002, 0x0002, "UI", "1.2.840.10008.5.1.4.1.1.4") + element(0x0002, 0x0003, "UI", f"{uid}.{z + 1}")
        syntax += element(0x0002, 0x0010, "UI", "1.2.840.10008.1.2.1")
        meta = element(0x0002, 0x0000, "UL", struct.pack("<I", len(syntax))) + syntax
        body = b"".join(element(*each) for each in elements)
        (folder / f"{series}-{z:03d}.dcm").write_bytes(b"\0" * 128 + b"DICM" + meta + body)


def volume(seed: int, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape)


STAND_IN = """#!{python}
import glob, json, os, sys
import nibabel as nib
import numpy as np
folder, source = sys.argv[sys.argv.index("-o") + 1], sys.argv[-1]
if not glob.glob(source + "/*"):
    sys.exit("Error: no DICOM images")
for number, (name, depth) in enumerate([("Localizer T1", 3), ("T2 FLAIR", 16), ("t1_mprage_sag", 16), ("MPRAGE repeat", 16)]):
    data = np.random.default_rng(number).integers(0, 1000, (20, 24, depth)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.eye(4)), f"{{folder}}/{{number}}.nii.gz")
    told = {{"SeriesNumber": number, "SeriesDescription": name, "PatientName": "Doe^Jane", "PatientSex": "F",
             "PatientBirthDate": "1960-06-01", "AcquisitionDateTime": "2020-06-01T10:15:00"}}
    json.dump(told, open(f"{{folder}}/{{number}}.json", "w"))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    """dcm2niix as a script: of every folder with files four series."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/dcm2niix"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_one_series_of_each_session_and_no_name(tmp_path, stand_in, capsys):
    for person in ("P 01", "P_02"):
        for visit in ("2019", "2021"):
            (tmp_path / f"dicom/{person}/{visit}").mkdir(parents=True)
            (tmp_path / f"dicom/{person}/{visit}/a.dcm").write_bytes(b"")
    (tmp_path / "dicom/P_02/2022").mkdir()
    out = tmp_path / "bids"
    command_line("import-dicom", tmp_path / "dicom", "--out", out, "--sessions")
    said = capsys.readouterr().out
    assert "1 of 5 folders were not converted:\n  P_02/2022: dcm2niix made nothing of it: Error: no DICOM images" in said
    assert "'t1_mprage_sag' is taken of 't1_mprage_sag', 'MPRAGE repeat'" in said and "everybody's age and sex" in said
    scans = sorted(str(path.relative_to(out)) for path in out.rglob("*.nii.gz"))
    assert scans[0] == "sub-P01/ses-2019/anat/sub-P01_ses-2019_T1w.nii.gz" and len(scans) == 4
    table = read_table(out / "participants.tsv")
    assert table["age"].tolist() == ["60.0"] * 4 and table["sex"].tolist() == ["F"] * 4
    assert not any(b"Doe" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    np.testing.assert_array_equal(read_volume(out / scans[0])[0][0], np.random.default_rng(2).integers(0, 1000, (20, 24, 16)))


def test_input_that_cannot_be_converted(tmp_path, stand_in, fails, monkeypatch):
    (tmp_path / "dicom/a").mkdir(parents=True)
    (tmp_path / "dicom/a/x.dcm").write_bytes(b"")
    out = tmp_path / "bids"
    said = fails("import-dicom", tmp_path / "dicom", "--out", out, "--series", "swi")
    assert "no series is called 'swi'; there are 'Localizer T1', 'T2 FLAIR'" in said and not out.exists()
    assert "--suffix FLAIR goes with --series" in fails("import-dicom", tmp_path / "dicom", "--out", out, "--suffix", "FLAIR")
    assert "no folder" in fails("import-dicom", tmp_path / "none", "--out", out)
    assert "has no folders" in fails("import-dicom", tmp_path / "dicom/a", "--out", out)
    assert "is not empty" in fails("import-dicom", tmp_path / "dicom", "--out", tmp_path)
    (tmp_path / "dicom/-a").mkdir()
    assert "become sub-a; rename them" in fails("import-dicom", tmp_path / "dicom", "--out", out)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = fails("import-dicom", tmp_path / "dicom", "--out", out)
    assert "no program dcm2niix on PATH" in said and "apt-get install dcm2niix" in said and "dcm2niix -z y" in said


@pytest.mark.skipif(shutil.which("dcm2niix") is None, reason="dcm2niix is not installed")
def test_with_dcm2niix_itself(tmp_path, capsys):
    """Slices that the test writes: the voxels come through, in millimetres, flipped as NIfTI has them."""
    scan = volume(0)
    write_dicom(tmp_path / "dicom/one", "T1_MPRAGE", scan, 2)
    write_dicom(tmp_path / "dicom/one", "T2_TSE", volume(1), 3)
    command_line("import-dicom", tmp_path / "dicom", "--out", tmp_path / "bids")
    assert "everybody's age and sex" in capsys.readouterr().out
    found, affine = read_volume(tmp_path / "bids/sub-one/anat/sub-one_T1w.nii.gz")
    assert np.allclose(np.linalg.norm(affine[:3, :3], axis=0), 2)
    np.testing.assert_array_equal(np.sort(found.ravel()), np.sort(scan.ravel()))
    # The first DICOM voxel lies at (-20, -24, 0) in LPS, so at (20, 24, 0) in RAS
    place = np.rint(np.linalg.solve(affine, [20, 24, 0, 1])[:3]).astype(int)
    assert found[0][tuple(place)] == scan[0, 0, 0]
    assert read_table(tmp_path / "bids/participants.tsv")["age"].tolist() == ["60.0"]


def test_a_dataset_that_is_dicom_says_so(tmp_path, fails):
    write_dicom(tmp_path / "data/one", "T1", volume(0), 1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_settings(tmp_path)))
    assert f"run `ldm3d import-dicom {tmp_path / 'data'} --out DATASET` first" in fails("prepare", tmp_path / "config.yaml")
