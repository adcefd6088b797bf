"""Volumes from images: known voxels stay, nothing shows where they end, answers lie where they were asked for."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import command_line

from ldm3d.cli.generation import named_files
from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Degradation, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.conditions import as_t1w
from ldm3d.data.seam import seamless
from ldm3d.description import Preparation, Sampling
from ldm3d.diffusion.guidance import apart, classifier_free
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.generation.dataset import find_sessions, images_of
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import place
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline

SIDE = 16
CONDITIONS = (
    ImageCondition(name="T2w", kind="image", suffix="T2w"),
    LabelsCondition(name="labels", kind="labels", groups={"inner": [4], "outer": [3]}),
    DegradedCondition(name="holed", kind="degraded", degradations=[Degradation(operator="hole", strength=(20, 40))]),
)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Random weights: of no use, but they look at every image."""
    torch.manual_seed(0)
    schema = CovariateSchema((Covariate("age", "continuous", unit="years", mean=50, std=20),))
    autoencoder = Autoencoder(2, 4, (4, 8), blocks=1)
    count = ImageChannels(CONDITIONS, autoencoder).count
    unet = UNet(2, 2, [0], (16, 16), 1, (False, True), head_channels=16, context_dim=16, image_channels=count)
    for network in (autoencoder, unet):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        network.eval().requires_grad_(False)
    grid = Grid.centred((SIDE,) * 3, (10.0,) * 3)
    sampling = Sampling(sampler="euler", steps=2)
    return Pipeline(autoencoder, unet, schema, grid, make_process("flow"), "v", sampling, conditions=CONDITIONS)


def ball(shape=(40, 44, 36), mm=4.0, radius=60.0, shift=(0.0, 0.0, 0.0)):
    """A head of 4 mm, brighter inside; its affine is flipped and shifted."""
    affine = np.diag([-mm, mm, mm, 1.0])
    affine[:3, 3] = [mm * shape[0] / 2 + 5, -mm * shape[1] / 2, -mm * shape[2] / 2]
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(float)
    middle = (np.array(shape) - 1) / 2 + np.array(shift)
    distance = np.linalg.norm((places - middle[:, None, None, None]) * mm, axis=0)
    voxels = np.where(distance < radius, 400 + 300 * np.cos(distance / 15), 0).astype(np.float32)
    labels = np.where(distance < radius / 2, 4, np.where(distance < radius, 3, 0)).astype(np.int16)
    return voxels, labels, affine


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A scan with all that belongs to it, as files of a BIDS dataset of three subjects; the third has no mask."""
    folder = tmp_path_factory.mktemp("bids")
    for n in (1, 2, 3):
        voxels, labels, affine = ball(radius=50.0 + 5 * n)
        measured = np.ones(voxels.shape, np.uint8)
        measured[15:24, 18:27, 14:22] = 0
        anat = folder / f"sub-0{n}" / "anat"
        anat.mkdir(parents=True)
        files = {"T1w": voxels, "T2w": voxels.max() - voxels * (voxels > 0), "dseg": labels, "desc-measured_mask": measured}
        for suffix, data in files.items():
            if (n, suffix) != (3, "desc-measured_mask"):
                nib.save(nib.Nifti1Image(data, affine), anat / f"sub-0{n}_{suffix}.nii.gz")
    (folder / "participants.tsv").write_text("participant_id\tage\nsub-01\t40\nsub-02\t70\nsub-03\t55\n")
    (folder / "dataset_description.json").write_text('{"Name": "heads", "BIDSVersion": "1.10.0"}')
    return folder


def files(head, subject="01"):
    anat = head / f"sub-{subject}" / "anat" / f"sub-{subject}"
    return {name: f"{anat}_{name}.nii.gz" for name in ("T1w", "T2w", "dseg", "desc-measured_mask")}


def test_a_seam_keeps_what_is_known_and_does_not_show():
    """Made and known differ by a smooth field: the answer is the known image to a percent, and no step is at the border."""
    places = np.stack(np.meshgrid(*[np.linspace(0, 1, 30)] * 3, indexing="ij"))
    known = np.sin(6 * places[0])[None] + places[1]
    made = known + 0.3 + 0.2 * places[2]
    measured = np.linalg.norm(places - 0.5, axis=0) > 0.25
    whole = seamless(made, known, measured)
    np.testing.assert_array_equal(whole[0][measured], known[0][measured].astype(np.float32))
    assert np.abs(whole - known).max() < 0.01 < 0.3 < np.abs(np.where(measured, known, made) - known).max()
    # Independent detail in the hole stays: it is only moved
    detail = made + 0.1 * np.sin(40 * places[1])
    inside = np.linalg.norm(places - 0.5, axis=0) < 0.15
    again = seamless(detail, known, measured)
    assert np.corrcoef((again - known)[0][inside], np.sin(40 * places[1])[inside])[0, 1] > 0.95


def test_the_step_of_the_gradient_at_a_seam_is_that_of_the_image():
    rng = np.random.default_rng(0)
    places = np.stack(np.meshgrid(*[np.linspace(0, 1, 40)] * 3, indexing="ij"))
    known = np.cos(5 * places[0] + 3 * places[1])[None]
    made = known + 0.2 + 0.02 * rng.standard_normal(known.shape)
    measured = np.ones(known.shape[1:], bool)
    measured[:, :, 18:22] = False  # missing slices

    def step(volume):
        """Second difference across the first seam, relative to that elsewhere in the made part."""
        return np.abs(np.diff(volume[0], n=2, axis=2))[:, :, 16:18].mean()

    pasted = np.where(measured, known, made)
    assert step(seamless(made, known, measured)) < 0.04 < 0.1 < step(pasted)


def test_nothing_missing_and_everything_missing():
    made, known = np.zeros((1, 4, 4, 4)), np.ones((1, 4, 4, 4))
    assert (seamless(made, known, np.ones((4, 4, 4), bool)) == 1).all()
    assert (seamless(made, known, np.zeros((4, 4, 4), bool)) == 0).all()


def test_what_was_measured_is_in_the_answer_exactly(pipeline, head):
    """On the scan's own voxels, in its own intensities; the hole is filled, and differs between samples."""
    of = files(head)
    scan, mask = nib.load(of["T1w"]).get_fdata(), nib.load(of["desc-measured_mask"]).get_fdata() > 0
    result = pipeline(3, conditions={"holed": (of["T1w"], of["desc-measured_mask"])}, like="holed")
    volumes = [image.get_fdata() for image in result.images]
    for image, volume in zip(result.images, volumes):
        np.testing.assert_allclose(image.affine, nib.load(of["T1w"]).affine)
        np.testing.assert_allclose(volume[mask], scan[mask], rtol=1e-5)
    assert np.abs(volumes[0] - volumes[1])[~mask].max() > 1
    on_grid = pipeline(1, conditions={"holed": (of["T1w"], of["desc-measured_mask"])}).images[0]
    assert on_grid.shape == (SIDE,) * 3
    given = place(CONDITIONS, {"holed": (of["T1w"], of["desc-measured_mask"])}, pipeline.grid, Preparation(), False)
    there = given.measured["holed"][0].numpy() > 0.5
    assert 0 < (~there).sum() < 150
    np.testing.assert_allclose(on_grid.get_fdata()[there], given.volumes["holed"][0].numpy()[there], atol=1e-6)


def test_known_latents_stay_on_the_way(pipeline, head):
    image = nib.load(files(head)["T1w"])
    mask = np.ones(image.shape, np.uint8)
    mask[3:6, 3:6, 3:6] = 0  # in one corner block of 4 x 4 x 4
    conditioned = pipeline.given({"holed": (image, nib.Nifti1Image(mask, image.affine))})
    z = conditioned.latents(conditioned.parse([{}] * 2), pipeline.sampling, [0, 1])
    _, _, stays, where = conditioned.images.encoded([0, 1], conditioned.channels, conditioned.device)
    kept = where.expand_as(z) == 1
    assert 0.5 < kept.float().mean() < 1
    torch.testing.assert_close(z[kept], stays[kept], rtol=1e-4, atol=1e-4)
    assert (z - stays)[~kept].abs().max() > 0.01


def test_images_change_the_answer_and_batches_do_not(pipeline, head):
    of = files(head)
    both = {"T2w": of["T2w"], "labels": of["dseg"]}
    one, two = (pipeline(1, conditions={name: both[name]}).images[0].get_fdata() for name in both)
    assert np.abs(one - two).max() > 1e-4
    alone = pipeline(1, conditions=both, seed=3).images[0].get_fdata()
    among = pipeline(5, conditions=both, seed=3, batch_size=2).images[0].get_fdata()
    np.testing.assert_array_equal(alone, among)
    in_memory = {name: nib.load(path) for name, path in both.items()}
    np.testing.assert_array_equal(pipeline(1, conditions=in_memory, seed=3).images[0].get_fdata(), alone)
    guided = pipeline(1, conditions=both, seed=3, image_guidance=3.0).images[0].get_fdata()
    assert np.abs(guided - alone).max() > 1e-4


def test_labels_lie_where_the_scan_lies(pipeline, head):
    of = files(head)
    given = place(CONDITIONS, {"T2w": of["T2w"], "labels": of["dseg"]}, pipeline.grid, Preparation(), False)
    inner, image = given.volumes["labels"][0].numpy(), given.volumes["T2w"][0].numpy()
    for axis in range(3):  # both lie in the middle of the head
        line = inner.sum(tuple({0, 1, 2} - {axis}))
        assert abs((line * np.arange(SIDE)).sum() / line.sum() - (SIDE - 1) / 2) < 0.6
    assert image.shape == inner.shape and given.volumes["labels"].sum(0).max() <= 1.001


def test_labels_alone_lie_where_they_do_beside_a_scan(pipeline, head):
    of = files(head)
    alone, beside = (
        place(CONDITIONS, {"labels": of["dseg"], **more}, pipeline.grid, Preparation(), False).volumes["labels"]
        for more in ({}, {"T2w": of["T2w"]})
    )
    torch.testing.assert_close(alone, beside, rtol=0, atol=0.35)
    assert (alone - beside).abs().mean() < 0.02
    assert as_t1w(np.array([0, 2, 4, 3])).tolist() == pytest.approx([0, 1, 0.2, 0.65])


def test_guidance_weighs_covariates_and_images_apart():
    """Against the formula, with a denoiser that is a sum of what it is told."""
    covariates, images = torch.tensor([[[2.0, 1.0]]]), torch.full((1, 1, 1, 1, 1), 5.0)
    asked = Conditions(covariates, images, torch.ones_like(images))

    def denoise(z, t, c):
        told = (c.covariates[:, 0, 0] * c.covariates[:, 0, 1]).reshape(-1, 1, 1, 1, 1) + (c.images * c.known)
        return z + told

    z = torch.full((1, 1, 1, 1, 1), 1.0)
    opened = asked.open(images=False), asked.open()
    assert apart(denoise, asked, *opened, 3.0, 2.0)(z, 0.5).item() == 1 + 3 * 2 + 2 * 5
    assert apart(denoise, asked, *opened, 3.0, 1.0)(z, 0.5).item() == 1 + 3 * 2 + 5
    assert apart(denoise, asked, *opened, 1.0, 1.0)(z, 0.5).item() == 1 + 2 + 5
    assert apart(denoise, asked, *opened, 3.0, 2.0, interval=(0.6, 1.0))(z, 0.5).item() == 1 + 2 + 5
    assert classifier_free(denoise, asked, asked.open(), 2.0)(z, 0.5).item() == 1 + 2 * 7


def test_a_visit_comes_with_its_age(head):
    """The answer follows the age of the scan that is given; without one it is left open; another covariate is refused."""
    torch.manual_seed(1)
    conditions = (ImageCondition(name="visit", kind="image", visit="other", tells=["age"]),)
    schema = CovariateSchema((Covariate("age", "continuous", unit="years", mean=50, std=20),))
    autoencoder = Autoencoder(2, 4, (4, 8), blocks=1)
    unet = UNet(2, 2, [0], (16, 16), 1, (False, True), head_channels=16, context_dim=16, image_channels=3)
    for parameter in [*autoencoder.parameters(), *unet.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    grid, sampling = Grid.centred((SIDE,) * 3, (10.0,) * 3), Sampling(sampler="euler", steps=2)
    model = Pipeline(autoencoder, unet, schema, grid, make_process("flow"), "v", sampling, conditions=conditions)
    scan = files(head)["T1w"]

    def of(told):
        return model(1, age=70, conditions={"visit": (scan, told) if told else scan}).images[0].get_fdata()

    assert np.abs(of({"age": 40}) - of({"age": 65})).max() > 1e-5
    assert np.abs(of({"age": 50}) - of(None)).max() > 1e-6  # the mean age is not the same as an unknown one
    with pytest.raises(InputError, match="it tells age, not sex"):
        of({"sex": "F"})
    sessions = find_sessions(head, conditions, "T1w", ["age"])
    assert [session["visit"][1] for session in sessions.files][:2] == [{"age": "40"}, {"age": "70"}]
    images = images_of(sessions, model, head, 1, None)
    assert images.of(0).told["visit"].item() == pytest.approx(-0.5)
    assert named_files(["visit=a.nii"], [], ["visit.age=63"]) == {"visit": (Path("a.nii"), {"age": "63"})}
    with pytest.raises(InputError, match="write NAME"):
        named_files(["visit=a.nii"], [], ["T1w.age=63"])


@pytest.mark.parametrize(
    "images, like, message",
    [
        ({"T1w": "T1w"}, None, "unknown condition 'T1w'"),
        ({"T2w": "nothing"}, None, "no such file"),
        ({"T2w": "T2w", "labels": "other"}, None, "of different subjects: T2w of sub-01, labels of sub-02"),
        ({"holed": "T1w"}, None, "--measured holed=MASK.nii.gz"),
        ({"T2w": ("T2w", "mask")}, None, "leave it out"),
        ({"labels": "T1w"}, None, "give a label map of that kind"),
        ({"T2w": "T2w"}, "labels", "Name one of them"),
        ({}, "T2w", "given are: none"),
        ({"T2w": "empty"}, None, "no image in it"),
        ({"T2w": "flat"}, None, "give one volume"),
        ({"T2w": "T2w", "labels": "far"}, None, "none of its labels lies on the grid"),
        ({"T2w": "T2w", "holed": ("far T1w", "mask")}, None, "holed: "),
        ({"T2w": "cut off"}, None, "cut off.nii.gz"),
        ({"labels": "strangers"}, None, "it holds labels 998, 999"),
    ],
)
def test_bad_images_end_in_one_clear_message(images, like, message, pipeline, head, tmp_path):
    of = files(head)
    paths = {"nothing": str(tmp_path / "x.nii"), "other": files(head, "02")["dseg"], "mask": of["desc-measured_mask"]}
    voxels, labels, affine = ball()
    far = affine.copy()
    far[:3, 3] += 3000
    made = {"empty": (0 * voxels, affine), "flat": (voxels[None], affine), "far": (labels, far), "far T1w": (voxels, far)}
    made |= {"strangers": (np.where(labels > 0, labels + 995, 0).astype(np.int16), affine), "cut off": (voxels, affine)}
    for name, (data, of_data) in made.items():
        paths[name] = str(tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(data, of_data), paths[name])

    whole = (tmp_path / "cut off.nii.gz").read_bytes()
    (tmp_path / "cut off.nii.gz").write_bytes(whole[: len(whole) // 2])

    def path(name):
        return tuple(map(path, name)) if isinstance(name, tuple) else paths.get(name) or of.get(name, name)

    with pytest.raises(InputError) as error:
        pipeline(1, conditions={name: path(image) for name, image in images.items()}, like=like)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def model(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline.save_pretrained(folder)
    return folder


def test_a_saved_model_knows_its_conditions(model, pipeline, head):
    again = Pipeline.from_pretrained(model, "cpu", torch.float32)
    assert again.conditions == CONDITIONS and "hole" in str(again)
    assert "derivatives" not in (model / "pipeline.json").read_text()
    of = files(head)
    asked = {"T2w": of["T2w"]}
    one, two = (p(1, conditions=asked).images[0].get_fdata() for p in (pipeline, again))
    np.testing.assert_array_equal(one, two)


def test_a_dataset_goes_on_with_the_rest_and_can_be_stopped(model, head, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["generate", model, "--out", out, "--bids", head, "--num", 2, "--device", "cpu"]
    command_line(*command)
    said = capsys.readouterr().out
    assert "1 of 3 sessions are left out" in said and "sub-03: no holed" in said
    sidecars = [json.loads(path.read_text()) for path in sorted(out.glob("sub-*/anat/*.json"))]
    assert [each["covariates"]["age"] for each in sidecars] == [40, 40, 70, 70]
    assert all("bids:source:sub-01/anat/sub-01_T2w.nii.gz" in each["Sources"] for each in sidecars[:2])
    assert all(each["synthetic"] for each in sidecars)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetLinks"] == {"source": head.resolve().as_uri()}
    assert "source" in (out / "participants.tsv").read_text().splitlines()[0]
    volumes = sorted(out.glob("sub-*/anat/*.nii.gz"))
    before = [path.read_bytes() for path in volumes]
    volumes[2].unlink()
    command_line(*command)
    assert "3 kept" in capsys.readouterr().out
    assert [path.read_bytes() for path in volumes] == before


def test_a_dataset_goes_on_where_an_image_cannot_be_used(model, head, tmp_path, capsys):
    shutil.copytree(head, tmp_path / "bids")
    path = tmp_path / "bids/sub-02/anat/sub-02_T2w.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.float32), image.affine), path)
    command_line("generate", model, "--out", tmp_path / "out", "--bids", tmp_path / "bids", "--device", "cpu")
    said = capsys.readouterr().out
    assert "1 of 2 sessions cannot be used" in said and "sub-02: T2w" in said and "there is no image in it" in said
    assert len(list(tmp_path.glob("out/sub-*/anat/*.nii.gz"))) == 1


def test_an_image_that_was_never_left_open_is_needed(pipeline, head):
    needed = pipeline.decoding("auto")
    needed.conditions = (CONDITIONS[0].model_copy(update={"drop": 0.0}), *CONDITIONS[1:])
    for conditions in (None, {"labels": files(head)["dseg"]}):
        with pytest.raises(InputError, match="T2w is missing"):
            needed(1, conditions=conditions)
    needed(1, conditions={"T2w": files(head)["T2w"]})


def test_the_command_refuses_what_does_not_go_together(model, head, tmp_path, fails):
    of, out = files(head), ["--out", tmp_path / "out", "--device", "cpu"]
    assert "goes with" not in fails("generate", model, *out, "--condition", "T2w")
    assert "write NAME=FILE" in fails("generate", model, *out, "--condition", "T2w")
    assert "there is no such --condition" in fails(
        "generate", model, *out, "--condition", f"T2w={of['T2w']}", "--measured", "a=b"
    )
    assert "go with images" in fails("generate", model, *out, "--like", "T2w")
    assert "unknown condition 'T3w'" in fails("generate", model, *out, "--condition", f"T3w={of['T2w']}")
    assert "no folder" in fails("generate", model, *out, "--bids", tmp_path / "nothing")
    assert "no image that this model takes" in fails("generate", model, *out, "--bids", tmp_path)
    command_line("generate", model, *out, "--condition", f"T2w={of['T2w']}", "--like", "T2w")
    (written,) = tmp_path.glob("out/sub-*/anat/*.nii.gz")
    assert nib.load(written).shape == nib.load(of["T2w"]).shape


def test_a_series_of_other_images_is_another_series(model, head, tmp_path, fails):
    out = ["--out", tmp_path / "out", "--device", "cpu"]
    command_line("generate", model, *out, "--condition", f"T2w={files(head)['T2w']}")
    assert "images.given" in fails("generate", model, *out, "--condition", f"T2w={files(head, '02')['T2w']}")


def test_images_of_a_series_are_placed_when_they_are_asked_for(pipeline, head):
    asked = []

    def one(number):
        asked.append(number)
        return place(CONDITIONS, {"T2w": files(head, f"0{number + 1}")["T2w"]}, pipeline.grid, Preparation(), False)

    series = pipeline.given(Images(CONDITIONS, one, {"test": 1}, None))
    volumes = series.volumes(series.parse([{}] * 2), pipeline.sampling, 1)
    first, second = list(volumes)
    assert sorted(set(asked)) == [0, 1] and np.abs(first - second).max() > 1e-4
