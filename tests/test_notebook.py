"""`pipe.explore()`: the widget shows the volumes that the pipeline makes. A front end is not needed for that."""

import numpy as np
import pytest
import torch
from torture.generation import make_pipeline

from ldm3d.data.nifti import from_image, unpack_volume
from ldm3d.pipeline import Pipeline


@pytest.fixture
def pipeline(tmp_path) -> Pipeline:
    make_pipeline().save_pretrained(tmp_path)
    return Pipeline.from_pretrained(tmp_path, "cpu", torch.float32)


def volume_of(explorer) -> np.ndarray:
    return unpack_volume(explorer.shown)


def test_the_brain_follows_the_sliders(pipeline):
    explorer = pipeline.explore(preview_steps=1)
    assert explorer.asked() == {"age": 50, "sex": "F"}
    before = volume_of(explorer)
    explorer.controls["age"].value = 80
    np.testing.assert_allclose(volume_of(explorer), from_image(pipeline(age=80, sex="F", steps=1).images[0]), atol=1e-4)
    assert not np.array_equal(volume_of(explorer), before)

    explorer.full.click()
    assert np.array_equal(volume_of(explorer), from_image(pipeline(age=80, sex="F").images[0]))
    explorer.opened["age"].value, explorer.controls["sex"].value = True, "(open)"
    explorer.full.click()
    assert np.array_equal(volume_of(explorer), from_image(pipeline().images[0]))

    explorer.another.click()
    assert explorer.seed.value != 0 and not np.array_equal(volume_of(explorer), before)
    assert "SYNTHETIC" in explorer._said.value and "preview" in explorer._said.value
    assert explorer._viewer.opts.show_all_orientation_markers and explorer._viewer.opts.multiplanar_pad_pixels >= 10
    assert [volume.name for volume in explorer._viewer.volumes] == ["synthetic.nii.gz"]
