"""An image of another contrast than the training's is noticed, and one of the same is not."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import command_line
from test_given import CONDITIONS, files, head, pipeline  # noqa: F401  # its fixtures

from ldm3d.contrast import Contrast
from ldm3d.errors import InputError
from ldm3d.pipeline import Pipeline

SPACING = (4.5, 4.5, 4.5)


def brain(seed: int, dark: bool = False, bias: float = 0.4):
    """A ball with a bright (or dark) middle, a bias field and noise, (1, 20, 24, 20)."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (20, 24, 20)], indexing="ij"))
    distance = np.linalg.norm(places + 0.05 * rng.standard_normal(3)[:, None, None, None], axis=0)
    volume = np.where(distance < 0.8, 0.5 + (0.3 if dark else -0.3) * (distance - 0.4), 0)
    volume = volume * np.exp(bias * np.tensordot(rng.standard_normal(3), places, 1) * 0.3)
    return (volume + 0.02 * np.abs(rng.standard_normal(volume.shape)))[None].astype(np.float32).clip(0, 1)


def test_another_contrast_is_warned_of():
    known = Contrast.fit([brain(seed) for seed in range(20)], SPACING)
    assert known.shape == (10, 12, 10) and known.least > 0.3
    assert not any(known.warning("T1w", brain(seed), SPACING) for seed in range(100, 120))
    said = [known.warning("T1w", brain(seed, dark=True), SPACING) for seed in range(100, 120)]
    assert all(said) and "T1w: the image does not look like" in said[0] and "another contrast" in said[0]
    assert known.warning("T1w", np.zeros((1, 20, 24, 20), np.float32), SPACING)
    assert Contrast.fit([brain(0), brain(1)], SPACING) is None  # nothing to compare with


def test_it_is_saved_with_the_model_and_heard_of(pipeline, head, tmp_path, capsys):  # noqa: F811
    """In a request a warning; in a dataset a line, and the session is kept."""
    given = [pipeline.given({"T2w": files(head, f"0{n}")["T2w"]}).images.of(0).volumes["T2w"].numpy() for n in (1, 2, 3)]
    model = Pipeline(
        *(pipeline.autoencoder, pipeline.unet, pipeline.schema, pipeline.grid, pipeline.process, pipeline.target),
        pipeline.sampling,
        conditions=CONDITIONS,
        contrasts={"T2w": Contrast.fit(given, pipeline.grid.spacing_mm)},
    )
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    again = Pipeline.from_pretrained(folder, "cpu", torch.float32)
    assert again.contrasts["T2w"].mean == model.contrasts["T2w"].mean
    again(1, conditions={"T2w": files(head)["T2w"]})  # as in the training: no warning, which would be an error here
    with pytest.warns(UserWarning, match="T2w: the image does not look like"):
        again(1, conditions={"T2w": files(head)["T1w"]})
    wrong = tmp_path / "bids/sub-09/anat/sub-09_T2w.nii.gz"
    wrong.parent.mkdir(parents=True)
    nib.save(nib.load(files(head)["T1w"]), wrong)
    command_line("generate", folder, "--bids", tmp_path / "bids", "--out", tmp_path / "out", "--device", "cpu")
    assert "1 of 1 sessions are odd, and are not left out:" in capsys.readouterr().out
    assert len(list(tmp_path.glob("out/sub-*/anat/*.nii.gz"))) == 1
    values = json.loads((folder / "pipeline.json").read_text())
    blocks = model.contrasts["T2w"].shape
    for shape, said in (([1, 1, 1], "has not the 1 blocks"), ([blocks[0] * blocks[1], blocks[2], 1], "is of another grid")):
        values["contrasts"]["T2w"]["shape"] = shape
        (folder / "pipeline.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=said):
            Pipeline.from_pretrained(folder)
