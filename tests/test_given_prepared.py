"""Images of a request lose skull and bias field as the training's scans did; an answer on their voxels has them back."""

import os
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from test_given import CONDITIONS, ball, pipeline  # noqa: F401 (a fixture)
from test_placed import THRESHOLD

from ldm3d.config.conditions import ImageCondition
from ldm3d.config.data import BrainExtractionConfig
from ldm3d.data.bias import BiasField
from ldm3d.data.removed import Removed, remove_beside
from ldm3d.description import Preparation
from ldm3d.errors import InputError
from ldm3d.generation.given_scans import place

TOOL = BrainExtractionConfig(command="threshold {scan} {mask}")
PREPARED = Preparation(brain_extraction=TOOL, bias_correction="n4")
FACTOR = 1.25


@pytest.fixture
def heads(tmp_path, monkeypatch):
    """A brain of 400 to 700 in a skull of 300, its T2w, and a mask with a hole; the tool keeps what is above 400."""
    program = tmp_path / "threshold"
    program.write_text(THRESHOLD.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    field = BiasField(np.full((4, 4, 4), np.log(FACTOR), np.float16), np.diag([100.0, 100, 100, 1]))
    monkeypatch.setattr("ldm3d.data.bias.estimate_field", lambda *_: field)
    voxels, _, affine = ball(radius=45.0)
    brain = ndimage.binary_fill_holes(voxels > 0)
    scan = np.where(brain, 450 + 0.3 * voxels, 0)
    skull = ndimage.binary_dilation(brain, iterations=3) & ~brain
    scan = np.where(skull, 300, scan).astype(np.float32)
    other = np.where(brain, 900 - scan, np.where(skull, 800, 0)).astype(np.float32)
    measured = np.ones(scan.shape, np.uint8)
    measured[18:22, 20:24, 16:20] = 0
    images = {name: nib.Nifti1Image(data, affine) for name, data in (("T1w", scan), ("T2w", other), ("mask", measured))}
    return images, brain, program


def test_what_is_placed_has_neither_skull_nor_bias_field(pipeline, heads):  # noqa: F811
    images, brain, _ = heads
    given = place(CONDITIONS, {"holed": (images["T1w"], images["mask"])}, pipeline.grid, PREPARED, True)
    own = given.own["holed"]
    scan = np.asarray(images["T1w"].dataobj)
    np.testing.assert_array_equal(own.removed.kept[0], brain)
    whole = place(CONDITIONS, {"holed": (images["T1w"], images["mask"])}, pipeline.grid, PREPARED, True, has_no_skull=True)
    assert 0 < (given.volumes["holed"] > 0).sum() < (whole.volumes["holed"] > 0).sum()
    corrected = scan / own.removed.field.on(own.affine, scan.shape)[0]
    assert own.info["high"] == pytest.approx(np.percentile(corrected[brain], 99.8), rel=0.05)
    assert own.info["high"] < 0.95 * whole.own["holed"].info["high"] or corrected[brain].max() < scan[brain].max()
    assert given.measured["holed"].sum() < given.measured["holed"].numel()


def test_another_contrast_of_the_session_loses_the_same(pipeline, heads):  # noqa: F811
    """Its own skull is brighter than its brain: a tool would keep it."""
    images, brain, _ = heads
    conditions = (ImageCondition(name="T1w", kind="image", suffix="T1w"), *CONDITIONS)
    given = place(conditions, {"T2w": images["T2w"], "T1w": images["T1w"]}, pipeline.grid, PREPARED, True)
    np.testing.assert_array_equal(given.own["T2w"].removed.kept[0], brain)
    kept, affine = np.asarray(images["T2w"].dataobj)[None], images["T2w"].affine
    seen, removed = remove_beside(kept, affine, Removed(brain[None]), affine, True)
    np.testing.assert_allclose(seen[0], np.where(brain, kept[0] / removed.field.on(affine, kept.shape[1:])[0], 0), rtol=1e-5)
    np.testing.assert_array_equal(removed.kept[0], brain)
    plain, nothing = remove_beside(kept, affine, Removed(), affine, False)
    assert plain is kept and nothing.kept is None and nothing.field is None


def test_an_answer_on_the_scan_s_voxels_has_its_skull_and_its_bias_field(pipeline, heads):  # noqa: F811
    images, brain, program = heads
    pipeline = pipeline.decoding("auto")
    pipeline.preparation, pipeline.skull_stripped = PREPARED, True
    asked = {"holed": (images["T1w"], images["mask"])}
    scan, measured = np.asarray(images["T1w"].dataobj), np.asarray(images["mask"].dataobj) > 0
    answer = pipeline(1, conditions=asked, like="holed").images[0].get_fdata()
    np.testing.assert_allclose(answer[measured], scan[measured], rtol=1e-5)
    contrast = pipeline(1, conditions={"T2w": images["T1w"]}, like="T2w").images[0].get_fdata()
    assert contrast[~brain].max() == 0 < contrast[brain].max() <= 1 + 1e-6
    program.unlink()
    with pytest.raises(InputError, match="no such program on PATH"):
        pipeline(1, conditions=asked)
    pipeline(1, conditions=asked, stripped=True)
