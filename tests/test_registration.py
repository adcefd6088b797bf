"""Scans are brought into a template's space by their affine: against turns and shifts that are known."""

import json
import sys

import nibabel as nib
import numpy as np
import pytest
import yaml
from conftest import command_line, tiny_settings
from scipy import ndimage
from scipy.spatial.transform import Rotation

from ldm3d.config.data import RegistrationConfig
from ldm3d.config.read import load_config
from ldm3d.data import registration
from ldm3d.data.labels import load_labels
from ldm3d.data.nifti import read_volume
from ldm3d.data.placing import restore
from ldm3d.data.preparing import load_info, load_prepared, read_scan_table
from ldm3d.data.registration import register
from ldm3d.errors import InputError

SHAPE, SPACING = (40, 48, 40), 4.5


def head(size: float = 1.0):
    """A brain, cerebellum, ventricles and one lesion, (1, 40, 48, 40) of 4.5 mm, centred on world zero; its affine."""
    affine = np.diag([SPACING] * 3 + [1.0])
    affine[:3, 3] = -SPACING * (np.array(SHAPE) - 1) / 2
    x, y, z = (a / size for a in np.meshgrid(*[SPACING * (np.arange(n) - (n - 1) / 2) for n in SHAPE], indexing="ij"))

    def blob(centre, radii):
        return sum(((a - c) / r) ** 2 for a, c, r in zip((x, y, z), centre, radii)) < 1

    volume = 0.9 * blob((0, 0, 10), (55, 80, 45))
    for value, centre, radii in (
        (0.6, (0, -45, -38), (40, 25, 20)),
        (0.2, (0, 10, 15), (22, 35, 12)),
        (0.4, (-30, 40, 20), (15, 20, 15)),
    ):
        volume = np.where(blob(centre, radii), value, volume)
    return volume[None].astype(np.float32), affine


def turned(degrees=(25, -8, 5), shift_mm=(12, -30, 9)):
    """A rigid motion of the world, (4, 4)."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    motion[:3, 3] = shift_mm
    return motion


@pytest.fixture
def template(tmp_path):
    volume, affine = head()
    nib.save(nib.Nifti1Image(volume[0], affine), tmp_path / "template.nii.gz")
    return str(tmp_path / "template.nii.gz")


def off_by(found, motion):
    """Degrees and mm at the centre by which `found` does not undo the motion."""
    rest = found @ motion
    turn = np.cbrt(np.linalg.det(rest[:3, :3]))
    return np.degrees(Rotation.from_matrix(rest[:3, :3] / turn).magnitude()), np.linalg.norm(rest[:3, 3])


@pytest.mark.parametrize("degrees", [(0, 0, 0), (25, -8, 5), (-35, 10, -10)])
def test_a_known_motion_is_found(template, degrees):
    volume, affine = head()
    motion = turned(degrees)
    found = register(volume, motion @ affine, RegistrationConfig(to=template), True)
    angle, distance = off_by(found.matrix, motion)
    assert angle < 1 and distance < 1 and found.correlation > 0.97


def test_rigid_keeps_the_size_and_affine_does_not(template):
    """A brain that is a tenth smaller than the template: rigid leaves it so."""
    volume, affine = head(0.9)
    sizes = {}
    for kind in ("rigid", "affine"):
        found = register(volume, turned() @ affine, RegistrationConfig(to=template, kind=kind), True)
        sizes[kind] = np.cbrt(np.linalg.det(found.matrix[:3, :3]))
    assert off_by(register(volume, turned() @ affine, RegistrationConfig(to=template), True).matrix, turned())[0] < 1.5
    assert sizes["rigid"] == pytest.approx(1, abs=1e-6) and sizes["affine"] == pytest.approx(1 / 0.9, abs=0.03)


@pytest.fixture
def dataset(tmp_path, template):
    """Three heads in three poses with label maps, and a config that registers them."""
    volume, affine = head()
    rng, rows = np.random.default_rng(0), ["participant_id\tage\tsex\tventricular_volume_ml"]
    for i in range(3):
        pose = turned(rng.uniform(-25, 25, 3), rng.uniform(-20, 20, 3)) @ affine
        labels = (volume[0] > 0.8).astype(np.int16) * 2 + ((volume[0] > 0.1) & (volume[0] < 0.3)) * 4
        for top, kind, data in (("data", "T1w", 500 * volume[0]), ("labels", "dseg", labels)):
            folder = tmp_path / top / f"sub-{i:02d}/anat"
            folder.mkdir(parents=True)
            nib.save(nib.Nifti1Image(data.astype(np.float32), pose), folder / f"sub-{i:02d}_{kind}.nii.gz")
        rows.append(f"sub-{i:02d}\t{30 + i}\t{'FM'[i % 2]}\t{20 + i}")
    (tmp_path / "data/participants.tsv").write_text("\n".join(rows) + "\n")
    settings = tiny_settings(tmp_path)
    settings["data"] |= {"grid": {"shape": list(SHAPE), "spacing_mm": SPACING, "place": "world", "origin_mm": [0, 0, 0]}}
    settings["data"] |= {"registration": {"to": template}, "skull_stripped": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_prepared_scans_lie_on_the_template_and_find_their_way_back(dataset):
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    config = load_config(dataset / "config.yaml")
    target, _ = head()
    page = (config.prepared_folder / "report.html").read_text()
    assert "Registration to the template" in page and "0 of 3 are below 0.6" in page
    for row in read_scan_table(config).itertuples():
        prepared, info = load_prepared(config, row.key), load_info(config, row.key)
        assert np.corrcoef(prepared.ravel(), target.ravel())[0, 1] > 0.97
        assert info["registration"]["correlation"] > 0.9
        original, affine = read_volume(row.path)
        back, own = restore(prepared, info)
        np.testing.assert_allclose(own, affine, atol=1e-3)
        assert back.shape == original.shape and np.corrcoef(back.ravel(), original.ravel())[0, 1] > 0.97
        labels = dataset / "labels" / f"sub-{row.subject}/anat/sub-{row.subject}_dseg.nii.gz"
        _, shares = load_labels(config, row.key, labels, {"dark": [4], "bright": [2]})
        assert prepared[0][shares[2] > 0.9].mean() > 0.9 > 0.4 > prepared[0][shares[1] > 0.9].mean()


def test_unregistered_heads_do_not_lie_on_the_template(dataset):
    """The same without registration, so that the test above would see it."""
    command_line("prepare", dataset / "config.yaml", "--workers", 1, "--set", "data.registration=null")
    config = load_config(dataset / "config.yaml", ["data.registration=null"])
    target, _ = head()
    alike = [np.corrcoef(load_prepared(config, key).ravel(), target.ravel())[0, 1] for key in read_scan_table(config)["key"]]
    assert np.mean(alike) < 0.9


@pytest.mark.slow
def test_another_template_prepares_anew_and_the_same_one_does_not(dataset, capsys):
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    assert "0 scans prepared, 3 unchanged" in capsys.readouterr().out
    volume, affine = head(1.05)
    nib.save(nib.Nifti1Image(volume[0], affine), dataset / "template.nii.gz")
    registration._template.cache_clear()
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    assert "3 scans prepared" in capsys.readouterr().out


@pytest.mark.slow
def test_what_does_not_resemble_the_template_is_named(dataset, capsys):
    noise = np.random.default_rng(0).uniform(0, 500, SHAPE).astype(np.float32)
    path = dataset / "data/sub-01/anat/sub-01_T1w.nii.gz"
    nib.save(nib.Nifti1Image(noise, nib.load(path).affine), path)
    command_line("prepare", dataset / "config.yaml", "--workers", 1)
    config = load_config(dataset / "config.yaml")
    table = read_scan_table(config).set_index("subject")
    notes = {subject: json.dumps(load_info(config, table.loc[subject, "key"])["notes"]) for subject in ("01", "02")}
    assert "registration is doubtful" in notes["01"] and "doubtful" not in notes["02"]


def test_without_simple_itk_the_message_says_how_to_get_it(dataset, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    volume, affine = head()
    with pytest.raises(InputError, match=r"pip install 'ldm3d\[prepare\]'"):
        register(volume, affine, RegistrationConfig(to=str(dataset / "template.nii.gz")), True)
    assert "no such file" in fails("prepare", dataset / "config.yaml", "--set", "data.registration.to=gone.nii.gz").lower()


def with_a_skull(brain):
    """A brain (X, Y, Z) of 2 mm in a dark skull and a bright scalp, with a face and a neck."""
    skull, scalp = (ndimage.binary_dilation(brain > 0, iterations=n) for n in (4, 7))
    head = np.where(scalp, 1.3 * brain.max(), 0)
    head[:, 75:, 4:30], head[25:75, 30:70, :12] = 0.9 * brain.max(), 0.8 * brain.max()
    return np.where(brain > 0, brain, np.where(skull, 0.05 * brain.max(), head)).astype(np.float32)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (20, -5, 5)])
def test_a_whole_head_lies_where_its_brain_does(degrees):
    """MNI152 comes without its skull; a scalp that is compared with nothing pulls the head away."""
    brain, affine = registration._template("mni152")
    motion = turned(degrees)
    found = register(with_a_skull(brain[0])[None], motion @ affine, RegistrationConfig(), False)
    angle, distance = off_by(found.matrix, motion)
    assert angle < 1 and distance < 1.5 and found.correlation > registration.POOR
    settings = [registration.settings_of(RegistrationConfig(), stripped) for stripped in (True, False)]
    assert settings[0] != settings[1]  # what was prepared otherwise is prepared anew
