"""NIfTI: what is written is read again, and every kind of bad file is refused with a sentence that says why."""

import gzip
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from ldm3d.data.nifti import pack_volume, read_volume, to_image, unpack_volume, write_volume
from ldm3d.errors import InputError

VOLUME = np.random.default_rng(0).random((1, 8, 9, 10)).astype(np.float32)
ARRAY = VOLUME[0]  # as a file holds it
AFFINE = np.array([[0, 0, 2.0, -5], [-1.5, 0, 0, 7], [0, 1, 0, -9], [0, 0, 0, 1]])  # each axis its own way and size


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def tamper(path, **fields):
    """A file whose header says something else than what is in it."""
    content = bytearray(nib.Nifti1Image(ARRAY, AFFINE).to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def tamper_mgh(path, **fields):
    """As `tamper`, of FreeSurfer's format."""
    image = nib.MGHImage(ARRAY, AFFINE)
    content = bytearray(image.to_bytes())
    for name, value in fields.items():
        image.header[name] = value
    content[:90] = image.header.binaryblock[:90]  # all fields but the footer's
    path.write_bytes(gzip.compress(content) if path.name.endswith(".mgz") else content)
    return path


def save_forms(path, sform, qform):
    image = nib.Nifti1Image(ARRAY, None)
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nib.save(image, path)
    return path


def with_value_outside(value):
    """A block of voxels with values, touching no face, and another value around it."""
    return np.where(np.pad(np.ones((4, 5, 6), bool), 2), ARRAY, np.float32(value))


# Out and in again


def test_write_then_read(tmp_path):
    path = tmp_path / "new" / "brain.nii.gz"
    write_volume(path, VOLUME, AFFINE, "synthetic, by a test")
    volume, affine = read_volume(path)
    np.testing.assert_array_equal(volume, VOLUME)
    np.testing.assert_array_equal(affine, AFFINE)
    assert volume.dtype == np.float32
    header = nib.load(path).header
    assert header["qform_code"] == header["sform_code"] == 1
    np.testing.assert_allclose(header.get_qform(), AFFINE, atol=1e-5)
    assert header.get_xyzt_units()[0] == "mm"
    assert header["descrip"].item() == b"synthetic, by a test"
    assert [file.name for file in path.parent.iterdir()] == ["brain.nii.gz"]


def test_channels_are_the_last_axis_of_a_file():
    volume = np.concatenate([VOLUME, 1 - VOLUME])  # (2, X, Y, Z)
    image = to_image(volume, AFFINE)
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.moveaxis(volume, 0, -1))
    assert to_image(VOLUME, AFFINE).shape == VOLUME.shape[1:], "one channel makes a 3D image"
    for each in (VOLUME, volume):
        np.testing.assert_array_equal(unpack_volume(pack_volume(each, AFFINE)), each)


def test_same_volume_gives_same_bytes(tmp_path):
    for name in "ab":
        write_volume(tmp_path / f"{name}.nii.gz", VOLUME, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_types_on_disk(tmp_path):
    path = tmp_path / "x.nii.gz"
    for given, kept in (
        (VOLUME.astype(np.float64), np.float32),
        (VOLUME > 0.5, np.uint8),
        (np.arange(8).reshape(1, 2, 2, 2), np.int32),
        (np.arange(8, dtype=np.int16).reshape(1, 2, 2, 2), np.int16),
    ):
        write_volume(path, given, AFFINE)
        assert nib.load(path).get_data_dtype() == kept
    write_volume(path, VOLUME, AFFINE, dtype=np.uint8)
    np.testing.assert_allclose(read_volume(path)[0], VOLUME, atol=1 / 250)


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    write_volume(tmp_path / "x.nii.gz", VOLUME, AFFINE)
    before = (tmp_path / "x.nii.gz").read_bytes()

    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_volume(tmp_path / "x.nii.gz", VOLUME * 2, AFFINE)
    assert [file.name for file in tmp_path.iterdir()] == ["x.nii.gz"]
    assert (tmp_path / "x.nii.gz").read_bytes() == before


def test_wrong_calls_are_named(tmp_path):
    with pytest.raises(ValueError, match="81 bytes"):
        to_image(VOLUME, AFFINE, "x" * 81)
    with pytest.raises(ValueError, match=r"\(8, 9, 10\)"):
        to_image(ARRAY, AFFINE)
    with pytest.raises(ValueError, match=r"as \.nii\.gz"):
        write_volume(tmp_path / "x.nii", VOLUME, AFFINE)
    assert to_image(VOLUME, AFFINE, "é" * 40).header["descrip"].item().decode() == "é" * 40


def test_one_frame_scale_factor_and_microns(tmp_path):
    assert read_volume(save(tmp_path / "frame.nii.gz", ARRAY[..., None]))[0].shape == VOLUME.shape
    scaled, _ = read_volume(tamper(tmp_path / "scaled.nii", scl_slope=3, scl_inter=-1))
    np.testing.assert_allclose(scaled, VOLUME * 3 - 1, rtol=1e-5, atol=1e-6)
    save(tmp_path / "microns.nii", ARRAY, AFFINE * [[1000], [1000], [1000], [1]])
    image = nib.load(tmp_path / "microns.nii")
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "microns.nii.gz")
    np.testing.assert_allclose(read_volume(tmp_path / "microns.nii.gz")[1], AFFINE)


def test_unknown_orientation_is_said(tmp_path):
    with pytest.warns(UserWarning, match="does not say how the head lies"):
        read_volume(tamper(tmp_path / "x.nii", sform_code=0, qform_code=0))


def test_nan_around_the_head_is_background_and_nan_within_it_is_none(tmp_path):
    around = with_value_outside(np.nan)
    with pytest.warns(UserWarning, match="NaN in 83% of its voxels, around the head"):
        volume, _ = read_volume(save(tmp_path / "x.nii.gz", around))
    np.testing.assert_array_equal(volume[0], np.nan_to_num(around))
    around[4, 4, 5] = np.nan
    with pytest.raises(InputError, match="1 of 720 voxels are NaN or infinite and not the background"):
        read_volume(save(tmp_path / "y.nii.gz", around))


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
@pytest.mark.parametrize("kind", ["mgz", "mgh"])
def test_freesurfer_files_are_read_where_they_lie(kind, dtype, tmp_path):
    array = (ARRAY * 100).astype(dtype)
    nib.save(nib.MGHImage(array, AFFINE.astype(np.float32)), tmp_path / f"brain.{kind}")
    volume, affine = read_volume(tmp_path / f"brain.{kind}")
    np.testing.assert_array_equal(volume[0], array)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    assert volume.dtype == np.float32


def test_freesurfer_file_without_orientation_is_coronal(tmp_path):
    content = bytearray(nib.MGHImage(ARRAY, AFFINE).to_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "x.mgh").write_bytes(content)
    with pytest.warns(UserWarning, match="taken as coronal"):
        _, affine = read_volume(tmp_path / "x.mgh")
    np.testing.assert_array_equal(np.sign(np.round(affine[:3, :3])), [[-1, 0, 0], [0, 0, 1], [0, -1, 0]])


@pytest.mark.parametrize(
    "sform, qform, message",
    [
        (np.diag([0.2, 0.2, 0.2, 1]), np.diag([1.0, 1, 1, 1]), "voxels of 0.2 x 0.2 x 0.2 mm by the sform, of 1 x 1 x 1 mm"),
        (np.diag([1.0, 1, 1, 1]), np.eye(4)[[1, 2, 0, 3]], "axes that run in other directions"),
    ],
)
def test_sform_and_qform_that_disagree_are_named(sform, qform, message, tmp_path):
    with pytest.warns(UserWarning, match=message):
        _, affine = read_volume(save_forms(tmp_path / "x.nii", sform, qform))
    np.testing.assert_allclose(affine, sform)


def test_forms_that_agree_but_for_rounding_and_place_are_not(tmp_path, recwarn):
    moved = AFFINE + np.array([[1e-3, 0, 0, 20]] + [[0] * 4] * 3)
    read_volume(save_forms(tmp_path / "x.nii", moved, AFFINE))
    assert not recwarn


# Bad files


def truncated(path):
    save(path, ARRAY)
    path.write_bytes(path.read_bytes()[:800])


BAD_FILES = {
    "missing.nii.gz": (lambda path: None, "no such file"),
    "folder.nii.gz": (lambda path: path.mkdir(), "is a folder"),
    "empty.nii.gz": (lambda path: path.touch(), "cannot be read as NIfTI"),
    "text.nii.gz": (lambda path: path.write_text("participant_id\tage\n"), "Not a gzipped file"),
    "text.nii": (lambda path: path.write_text("participant_id\tage\n" * 40), "cannot be read as NIfTI"),
    "magic.nii": (lambda path: tamper(path, magic=b"xxx"), "cannot be read as NIfTI"),
    "voxel-type.nii": (lambda path: tamper(path, datatype=77), "cannot be read as NIfTI"),
    "cut-short.nii": (truncated, "2,880 bytes of voxels, more than a file of 800 bytes can hold"),
    "cut-short.nii.gz": (truncated, "cut short or damaged"),
    "brain.dcm": (lambda path: save(path.with_suffix(".nii"), ARRAY).rename(path), "neither NIfTI nor .mgz by its name"),
    "nifti.mgz": (lambda path: path.write_bytes(nib.Nifti1Image(ARRAY, AFFINE).to_bytes()), "read as FreeSurfer's MGH"),
    "no-mgh.mgh": (lambda path: path.write_bytes(nib.Nifti1Image(ARRAY, AFFINE).to_bytes()), "its version is"),
    "empty.mgh": (lambda path: path.touch(), "ends after 0 of 284 bytes"),
    "type.mgh": (lambda path: tamper_mgh(path, type=7), "voxels of type 7; mri_convert"),
    "claims.mgz": (lambda path: tamper_mgh(path, dims=[600] * 3 + [1]), "bytes of voxels, more than a file of"),
    "frames.mgh": (lambda path: tamper_mgh(path, dims=[8, 9, 5, 2]), "2 volumes in one file"),
    "flat.mgh": (lambda path: tamper_mgh(path, delta=[1, 0, 1]), "affine is singular"),
    "mirrored.nii": (
        lambda path: save_forms(path, AFFINE, AFFINE @ np.diag([-1.0, 1, 1, 1])),
        "left and right cannot be told",
    ),
    "all-nan.nii.gz": (lambda path: save(path, ARRAY * np.nan), "720 of 720 voxels are NaN"),
    "inf-outside.nii.gz": (lambda path: save(path, with_value_outside(np.inf)), "of 720 voxels are NaN or infinite"),
    "series.nii.gz": (lambda path: save(path, np.stack([ARRAY] * 3, -1)), "3 volumes in one file"),
    "slice.nii.gz": (lambda path: save(path, ARRAY[0]), r"shape \(9, 10\); a volume has three axes"),
    "no-voxels.nii": (lambda path: tamper(path, dim=[3, 0, 9, 10, 1, 1, 1, 1]), r"\(0, 9, 10\), so no voxels"),
    "negative.nii": (lambda path: tamper(path, dim=[3, -5, 9, 10, 1, 1, 1, 1]), "so no voxels"),
    "constant.nii.gz": (lambda path: save(path, ARRAY * 0 + 7), "every voxel is 7"),
    "nan.nii.gz": (lambda path: save(path, np.where(ARRAY > 0.9, np.nan, ARRAY)), "of 720 voxels are NaN"),
    "overflow.nii.gz": (lambda path: save(path, ARRAY.astype(np.float64) * 1e300), "NaN or infinite"),
    "complex.nii.gz": (lambda path: save(path, ARRAY.astype(np.complex64)), "complex voxels"),
    "colour.nii.gz": (
        lambda path: save(path, np.zeros((5, 5, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "colour voxels",
    ),
    "singular.nii": (lambda path: tamper(path, srow_x=[0, 0, 0, 0]), "affine is singular"),
    "nan-affine.nii": (lambda path: tamper(path, srow_x=[np.nan, 0, 0, 0]), "affine holds NaN"),
    "zero-size.nii": (
        lambda path: tamper(path, sform_code=0, qform_code=1, pixdim=[1, 0, 2, 2, 0, 0, 0, 0]),
        "voxel sizes are 0 x 2 x 2 mm",
    ),
    "units.nii": (lambda path: tamper(path, xyzt_units=3), "no head fits that"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_reason(name, tmp_path):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        read_volume(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("side, message", [(10_000, "1,000,000,000,000 voxels"), (600, "bytes of voxels, more than")])
def test_absurd_size_fails_before_memory_is_taken(name, side, message, tmp_path):
    path = tamper(tmp_path / name, dim=[3, side, side, side, 1, 1, 1, 1])
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        read_volume(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
