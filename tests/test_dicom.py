"""Generated volumes as DICOM: the same voxels at the same places for other programs, valid, and marked as synthetic."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from conftest import command_line
from torture.generation import make_pipeline

from ldm3d.data.derivative import synthetic_path
from ldm3d.data.nifti import read_volume, write_volume
from ldm3d.dicom.classic import to_classic
from ldm3d.dicom.common import WHITE
from ldm3d.dicom.enhanced import to_dicom
from ldm3d.errors import InputError

MADE = {"synthetic": True, "model_hash": "abc", "seed": 1, "sample": 0, "covariates": {"age": 72.0, "sex": "F", "ml": None}}
STEP = 0.51 / WHITE  # half a stored value


def asymmetric(tilt: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A volume without any symmetry, and an affine with three spacings, turned about the x axis."""
    volume = np.random.default_rng(0).random((1, 8, 10, 6)).astype(np.float32)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine = turn @ affine
    affine[:3, 3] = [-7, -12, 5.5]
    return volume, affine


@pytest.fixture(params=[0.0, 0.3], ids=["straight", "oblique"])
def tilt(request):
    return request.param


@pytest.fixture(params=["enhanced", "classic"])
def written(request, tilt, tmp_path):
    """A volume, its affine and its files: one of Enhanced MR, or one a plane."""
    volume, affine = asymmetric(tilt)
    if request.param == "classic":
        images = to_classic(volume, affine, MADE, "syn0001")
    else:
        images = [to_dicom(volume, affine, MADE, "syn0001")]
    (tmp_path / "dicom").mkdir()
    for k, image in enumerate(images):
        image.save_as(tmp_path / f"dicom/{k:02d}.dcm", enforce_file_format=True)
    return volume, affine, sorted((tmp_path / "dicom").iterdir())


def test_simpleitk_reads_the_same_voxels_at_the_same_places(written):
    volume, affine, paths = written
    found = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(paths[0].parent))  # in the order that it finds in them
    assert {Path(name) for name in found} == set(paths)
    image = SimpleITK.ReadImage(found if len(found) > 1 else found[0])
    lps = np.diag([-1, -1, 1, 1]) @ affine
    for voxel in ((0, 0, 0), (7, 0, 0), (0, 9, 0), (0, 0, 5), (3, 4, 2), (6, 1, 5)):
        index = image.TransformPhysicalPointToIndex((lps @ [*voxel, 1])[:3])
        place = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(place, (lps @ [*voxel, 1])[:3], atol=1e-4)
        assert abs(image.GetPixel(index) / WHITE - volume[0][voxel]) < STEP


@pytest.mark.skipif(not shutil.which("dcm2niix"), reason="needs dcm2niix (Debian: apt-get install dcm2niix)")
def test_dcm2niix_gives_back_voxels_and_affine(written, tmp_path):
    volume, affine, paths = written
    command = ["dcm2niix", "-f", "back", "-o", str(tmp_path), str(paths[0].parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    back, found = read_volume(tmp_path / "back.nii")
    # Its own order of axes may differ: compare what lies at each place
    to_back = np.linalg.inv(found) @ affine
    for voxel in np.ndindex(volume.shape[1:]):
        index = tuple(np.round((to_back @ [*voxel, 1])[:3]).astype(int))
        np.testing.assert_allclose((found @ [*index, 1])[:3], (affine @ [*voxel, 1])[:3], atol=1e-3)
        assert abs(back[0][index] / WHITE - volume[0][voxel]) < STEP


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="needs dciodvfy (Debian: apt-get install dicom3tools)")
def test_dciodvfy_finds_no_errors(written):
    said = subprocess.run(["dciodvfy", str(written[2][0])], capture_output=True, text=True).stderr
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    # Releases before 2024 do not know Synthetic Data; there is no other way to say it
    assert [line for line in errors if "not a recognized standard attribute - (0x0008,0x001c)" not in line] == []


def test_it_says_that_it_is_synthetic(written):
    for path in written[2]:
        said = pydicom.dcmread(path)
        assert said[0x0008, 0x001C].value == "YES" and said.ContentQualification == "RESEARCH"
        assert said.BurnedInAnnotation == "NO" and said.ImageType[0] == "DERIVED"
        assert "SYNTHETIC" in str(said.PatientName) and "SYNTHETIC" in said.SeriesDescription
        assert "age 72" in said.ImageComments and said.PatientSex == "F" and said.PatientBirthDate == ""
        invented = (
            "RepetitionTime",
            "EchoTime",
            "EchoTrainLength",
            "FlipAngle",
            "MagneticFieldStrength",
            "AcquisitionDateTime",
        )
        assert not [name for name in invented if said.get(name) is not None]
        if "SharedFunctionalGroupsSequence" in said:
            assert said.SharedFunctionalGroupsSequence[0].MRImageFrameTypeSequence[0].FrameType[0] == "DERIVED"
            assert "ScanningSequence" not in said
        else:
            assert said.ScanningSequence == "RM"  # which a classic image must name: research mode, no sequence


def test_identifiers_follow_from_what_was_generated():
    volume, affine = asymmetric()

    def uids(made, subject="syn0001"):
        data = to_dicom(volume, affine, made, subject)
        return [data.SOPInstanceUID, data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID]

    first = uids(MADE)
    assert first == uids(json.loads(json.dumps(MADE))) and len(set(first)) == 4
    assert all(len(uid) <= 64 and pydicom.uid.UID(uid).is_valid for uid in first)
    images = to_classic(volume, affine, MADE, "syn0001")
    assert len({image.SOPInstanceUID for image in images} | set(first)) == len(images) + 4
    assert {image.StudyInstanceUID for image in images} == {first[2]} and images[0].SeriesInstanceUID not in first
    for other in (uids({**MADE, "seed": 2}), uids({**MADE, "sample": 1}), uids({**MADE, "covariates": {"age": 71.0}})):
        assert not set(other) & set(first)


def series(folder: Path, **changes) -> Path:
    volume, affine = asymmetric()
    for i in range(2):
        path = synthetic_path(folder, i, 2)
        write_volume(path, volume, affine, "SYNTHETIC")
        sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
        sidecar.write_text(json.dumps({**MADE, "sample": i, **changes}))
    return folder


def test_a_folder_is_converted_and_the_same_every_time(tmp_path, capsys):
    series(tmp_path / "bids")
    command_line("dicom", tmp_path / "bids", "--out", tmp_path / "dicom")
    assert "2 volumes" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in (tmp_path / "dicom").iterdir()}
    assert sorted(first) == ["sub-syn0001.dcm", "sub-syn0002.dcm"]
    command_line("dicom", tmp_path / "bids", "--out", tmp_path / "dicom")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "dicom").iterdir()}


def test_a_folder_becomes_classic_series(tmp_path, capsys):
    series(tmp_path / "bids")
    command_line("dicom", tmp_path / "bids", "--out", tmp_path / "dicom", "--classic")
    assert "2 volumes" in capsys.readouterr().out
    names = sorted(path.relative_to(tmp_path / "dicom").as_posix() for path in (tmp_path / "dicom").rglob("*.dcm"))
    assert names == [f"sub-syn000{i}/{k:04d}.dcm" for i in (1, 2) for k in range(1, 7)]
    assert {
        len({pydicom.dcmread(p).SeriesInstanceUID for p in (tmp_path / "dicom").glob(f"sub-syn000{i}/*")}) for i in (1, 2)
    } == {1}


def test_generate_writes_dicom_too(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "model")
    options = ("--num", 2, "--seed", 4, "--steps", 1, "--precision", "float32")
    command_line("generate", tmp_path / "model", *options, "--out", tmp_path / "bids", "--dicom", tmp_path / "dicom")
    assert "2 volumes written as DICOM" in capsys.readouterr().out
    volume = read_volume(tmp_path / "bids/sub-syn0002/anat/sub-syn0002_desc-synthetic_T1w.nii.gz")[0]
    pixels = pydicom.dcmread(tmp_path / "dicom/sub-syn0002.dcm").pixel_array  # (Z, rows to the back, columns to the left)
    np.testing.assert_allclose(pixels.transpose(2, 1, 0)[::-1, ::-1] / WHITE, volume[0], atol=STEP)


def test_what_is_not_synthetic_is_refused(tmp_path, fails):
    series(tmp_path / "real", synthetic=False)
    assert "does not say that this volume is synthetic" in fails("dicom", tmp_path / "real", "--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no volume" in fails("dicom", tmp_path / "empty", "--out", tmp_path / "out")


def test_what_dicom_cannot_say_is_refused():
    volume, affine = asymmetric()
    with pytest.raises(InputError, match="one"):
        to_dicom(np.concatenate([volume, volume]), affine, MADE, "syn0001")
    affine[0, 1] = 1.0
    with pytest.raises(InputError, match="shear"):
        to_dicom(volume, affine, MADE, "syn0001")
