"""Volumes of several contrasts (`data.channels`), of which some are missing: from a dataset to an evaluated model."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import command_line, tiny_settings
from in_process import train

from ldm3d.applications.placed import place
from ldm3d.base_model import take_autoencoder
from ldm3d.config.read import load_config
from ldm3d.data.coded import CodedVolumes
from ldm3d.data.conditions import ScanImages
from ldm3d.data.latents import check_latents
from ldm3d.data.nifti import read_volume
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.preparing import read_scan_table
from ldm3d.diffusion.objective import Denoising
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.experiment import latents_origin
from ldm3d.generation.series import ABSENT, BROKEN, FINISHED, Series
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.models.recomputing import decode_recomputed
from ldm3d.models.streaming import decode_streamed
from ldm3d.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*scans have no T2w.*", "ignore:.*not assessed.*", "ignore:.*measured.*")
LACKING = ("sub-0001", "sub-0002", "sub-0003", "sub-0006")  # a T2w: of the training, the test and the validation split
SHAPE = (16, 24, 16)


def coder(**options) -> Autoencoder:
    """Of two contrasts, with weights everywhere."""
    torch.manual_seed(0)
    network = Autoencoder(3, 4, (8, 8), blocks=1, contrasts=2, **options).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape))
    return network


# The autoencoder


@pytest.mark.parametrize("options", [{}, {"attention": True}, {"linear_path": False}])
def test_contrasts_never_mix_and_are_coded_as_if_alone(options):
    network, volumes = coder(**options), torch.rand(3, 2, *SHAPE)
    moments = network.encode(volumes)
    assert moments.shape == (3, 2 * 2 * 3, 4, 6, 4) and network.latent_shape(SHAPE) == (6, 4, 6, 4)
    first = [0, 1, 2, 6, 7, 8]  # means and log-variances of the first contrast
    other = volumes.clone()
    other[:, 1] = torch.rand(3, *SHAPE)
    assert torch.equal(network.encode(other)[:, first], moments[:, first])
    assert not torch.equal(network.encode(other), moments)
    other[:, 1] = torch.nan  # which a subject lacks
    missing = network.encode(other)
    assert torch.equal(missing[:, first], moments[:, first])
    assert missing[:, [3, 4, 5, 9, 10, 11]].isnan().all()
    assert network.lacking(missing).tolist() == [[False] * 3 + [True] * 3] * 3
    assert not network.lacking(moments).any()

    alone = Autoencoder(3, 4, (8, 8), blocks=1, **options).eval()
    alone.load_state_dict({**network.state_dict(), "latent_mean": torch.zeros(3), "latent_std": torch.ones(3)})
    for contrast in (0, 1):
        own = alone.encode(volumes[:, contrast : contrast + 1])
        torch.testing.assert_close(own[:, :3], moments[:, 3 * contrast :][:, :3])
        torch.testing.assert_close(own[:, 3:], moments[:, 6 + 3 * contrast :][:, :3])
        made = network.decode(network.sample(moments))[:, contrast : contrast + 1]
        torch.testing.assert_close(made, alone.decode(alone.sample(own)))


def test_a_scan_of_nan_itself_is_no_missing_contrast():
    network = coder()
    assert not network.lacking(network.encode(torch.full((1, 2, *SHAPE), torch.nan)))[:, :3].any()
    single = Autoencoder(3, 4, (8, 8), blocks=1)
    assert not single.lacking(torch.full((2, 6, 4, 6, 4), torch.nan)).any()


def test_a_volume_of_contrasts_decodes_in_parts_and_with_gradients():
    network = coder()
    z = torch.randn(2, *network.latent_shape(SHAPE))
    whole = network.decode(z)
    assert whole.shape == (2, 2, *SHAPE)
    torch.testing.assert_close(decode_streamed(network, z, chunk_bytes=4096), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_recomputed(network, z.requires_grad_()), whole)


def test_a_saved_autoencoder_keeps_its_contrasts_and_one_of_one_contrast_says_nothing_of_them(tmp_path):
    network = coder()
    network.save_pretrained(tmp_path / "two")
    again = LatentSpace.from_pretrained(tmp_path / "two")
    assert again.contrasts == 2 and again.in_channels == 2 and again.latent_channels == 6
    Autoencoder(3, 4, (8, 8)).save_pretrained(tmp_path / "one")
    assert "contrasts" not in json.loads((tmp_path / "one" / "config.json").read_text())["arguments"]


def test_the_linear_path_is_that_of_all_contrasts_as_volumes():
    network, alone = coder(), Autoencoder(3, 4, (8, 8), blocks=1)
    volumes = torch.rand(4, 2, *SHAPE)
    network.fit_linear_path(volumes)
    alone.fit_linear_path(volumes.flatten(0, 1)[:, None])
    torch.testing.assert_close(network.analysis.weight, alone.analysis.weight)
    torch.testing.assert_close(network.synthesis.weight, alone.synthesis.weight)
    assert network.through_linear_path(volumes).shape == volumes.shape


# The loss


@pytest.mark.parametrize("scales, weight", [((), "none"), ((), "min-snr"), ((0.5, 2.0, 0.3, 1.0), "noise")])
def test_what_is_missing_does_not_count(scales, weight):
    """The loss is that of the known channels alone, and nothing of the others reaches the network."""
    torch.manual_seed(0)
    x, e, u = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2), torch.tensor([0.2, 0.5, 0.8])
    lacking = torch.tensor([[False, False, True, True], [False, False, False, False], [False, False, True, True]])
    said = torch.randn(x.shape, requires_grad=True)
    objective = Denoising(make_process("flow"), "v", weight, "uniform", scales=scales)
    losses = objective.losses(lambda z, time: said, x, e, u, lacking=lacking)
    alone = Denoising(make_process("flow"), "v", weight, "uniform", scales=scales[:2])
    expected = alone.losses(lambda z, time: said[:, :2], x[:, :2], e[:, :2], u)
    torch.testing.assert_close(losses[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(losses[1], objective.losses(lambda z, time: said, x, e, u)[1])
    losses.sum().backward()
    assert (said.grad[lacking] == 0).all() and (said.grad[~lacking] != 0).all()


# From a dataset to a model


@pytest.fixture(scope="module")
def contrasts(tmp_path_factory) -> Path:
    """config.yaml, data/ and run/ of an experiment with T1w and T2w that is trained."""
    folder = tmp_path_factory.mktemp("contrasts")
    write_dataset(folder / "data", subjects=20, shape=(24, 28, 24), seed=3, workers=1)
    for path in sorted(folder.glob("data/sub-*/anat/*_T1w.nii.gz")):
        image = nib.load(path)
        voxels = image.get_fdata(dtype=np.float32)
        t2w = np.where(voxels > 0.05 * voxels.max(), voxels.max() - voxels, 0).astype(np.float32)
        if path.parents[1].name not in LACKING:
            nib.save(nib.Nifti1Image(t2w, image.affine), str(path).replace("T1w", "T2w"))
    settings = tiny_settings(folder)
    settings["data"]["channels"] = ["T1w", "T2w"]
    settings["autoencoder"]["latent_scaling"] = "voxels"
    settings["diffusion"]["mirror"] = True
    del settings["decoder"]["adversarial"]
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command_line("prepare", config, "--workers", 1)
    train("autoencoder", config)
    command_line("encode", config)
    train("diffusion", config)
    return folder


def test_latents_of_what_a_subject_lacks_are_nan_and_statistics_are_of_what_is_there(contrasts):
    config = load_config(contrasts / "config.yaml", ())
    scans, moments = read_scan_table(config), np.load(config.latents_folder / "moments.npy")
    lacks = np.array([f"sub-{s}" in LACKING for s in scans["subject"]])
    assert set(scans["split"][lacks]) == {"train", "validation", "test"}
    assert np.isnan(moments[lacks][:, [3, 4, 5, 9, 10, 11]]).all()
    assert np.isfinite(moments[lacks][:, [0, 1, 2, 6, 7, 8]]).all() and np.isfinite(moments[~lacks]).all()
    autoencoder = LatentSpace.from_pretrained(config.autoencoder_folder)
    train_rows = moments[(scans["split"] == "train").to_numpy()]
    mean, std = (figure(train_rows[:, :6], axis=(0, 2, 3, 4)) for figure in (np.nanmean, np.nanstd))
    np.testing.assert_allclose((autoencoder.latent_mean - mean) / std, 0, atol=0.02)  # the cache may be in half precision
    assert autoencoder.latent_std.isfinite().all() and (autoencoder.latent_std > 0).all()


def test_stage_1_sees_the_scan_in_the_place_of_what_is_missing(contrasts):
    config = load_config(contrasts / "config.yaml", ())
    scans = read_scan_table(config)
    coded = CodedVolumes.of(config, scans)
    for subject, key in zip(scans["subject"], scans["key"]):
        volume, filled = coded(key), coded.filled(key)
        assert volume.shape == (2, 24, 28, 24) and coded.complete(key) == (f"sub-{subject}" not in LACKING)
        if coded.complete(key):
            np.testing.assert_array_equal(filled, volume)
            assert np.corrcoef(volume[0][volume[0] > 0.1], volume[1][volume[0] > 0.1])[0, 1] < 0
        else:
            assert np.isnan(volume[1]).all()
            np.testing.assert_array_equal(filled, np.stack([volume[0]] * 2))


def test_a_training_with_missing_contrasts_skips_nothing_and_resumes_exactly(contrasts):
    run, weights = contrasts / "run/diffusion-training", contrasts / "run/model/unet/model.safetensors"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert not any(line.get("skipped_steps") for line in lines)
    once, last = weights.read_bytes(), sorted(run.glob("*00000008*"))
    assert last
    for path in last:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train("diffusion", contrasts / "config.yaml", "training.workers=1")
    assert weights.read_bytes() == once


def test_a_pipeline_makes_both_contrasts_and_a_dataset_has_a_file_of_each(contrasts, tmp_path):
    pipe = Pipeline.from_pretrained(contrasts / "run/model")
    assert pipe.suffixes == ("T1w", "T2w")
    assert json.loads((contrasts / "run/model/pipeline.json").read_text())["suffixes"] == ["T1w", "T2w"]
    image = pipe(age=70, seed=4).images[0]
    assert image.shape == (24, 28, 24, 2)
    out = tmp_path / "out"
    command_line("generate", contrasts / "run/model", "--num", 3, "--seed", 4, "--age", 70, "--out", out, "--no-check")
    for i in (1, 2, 3):
        for suffix in ("T1w", "T2w"):
            path = out / f"sub-syn{i:04d}" / "anat" / f"sub-syn{i:04d}_desc-synthetic_{suffix}.nii.gz"
            said = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
            assert said["synthetic"] is True and f"Synthetic {suffix}-like" in said["Description"]
            if i == 1:
                np.testing.assert_array_equal(
                    read_volume(path)[0][0], image.get_fdata(dtype=np.float32)[..., int(suffix == "T2w")]
                )
    table = pd.read_csv(out / "participants.tsv", sep="\t")
    assert list(table["participant_id"]) == ["sub-syn0001", "sub-syn0002", "sub-syn0003"]

    # Half of a volume is none: it is made again, to the bit
    path = out / "sub-syn0002/anat/sub-syn0002_desc-synthetic_T2w.nii.gz"
    before, kept = path.read_bytes(), (out / "sub-syn0001/anat/sub-syn0001_desc-synthetic_T2w.nii.gz").stat().st_mtime_ns
    path.unlink()
    command_line("generate", contrasts / "run/model", "--num", 3, "--seed", 4, "--age", 70, "--out", out, "--no-check")
    assert path.read_bytes() == before
    assert (out / "sub-syn0001/anat/sub-syn0001_desc-synthetic_T2w.nii.gz").stat().st_mtime_ns == kept


def test_a_guard_withholds_all_contrasts_of_a_volume(contrasts, tmp_path):
    pipe = Pipeline.from_pretrained(contrasts / "run/model")
    rows = pipe.parse([{"age": 70}, {"age": 30}])
    with Series(tmp_path / "out", pipe.origin, rows, pipe.sampling.to_dict(), guard={"audit": "a"}) as series:
        for i in (0, 1):
            assert series.state(i) == ABSENT
            series.write(i, np.full((2, 24, 28, 24), 0.1 * i, np.float32))
            assert series.state(i) == FINISHED and all(path.is_file() for path in series.paths(i))
        series.paths(1)[1].write_bytes(b"half")
        assert series.state(1) == BROKEN
        series.withhold(0, {"distance": 0.1})
        assert series.state(0) == FINISHED and not any(path.exists() for path in series.paths(0))
        assert series.finish() == 1  # the broken one is seen as missing
        series.write(1, np.zeros((2, 24, 28, 24), np.float32))
        assert series.finish() == 0 and series.count_withheld() == 1


@pytest.mark.slow
def test_evaluation_takes_whoever_lacks_nothing(contrasts, tmp_path):
    options = "--data", contrasts / "data", "--out", tmp_path / "page", "--num", 4, "--steps", 1, "--no-predict"
    command_line("evaluate", contrasts / "run/model", *options)
    found = json.loads((tmp_path / "page/metrics.json").read_text())
    config = load_config(contrasts / "config.yaml", ())
    scans = read_scan_table(config)
    scans = scans[scans["split"] == "test"].reset_index(drop=True)
    whole = ScanImages(config, scans).complete
    assert len(whole) > 0
    assert found["reconstruction"]["volumes"] == len(whole) and found["likeness"]
    assert ScanImages(config, scans).made(whole[0]).shape == (2, 24, 28, 24)


def test_a_model_of_contrasts_takes_no_single_scan(contrasts):
    pipe = Pipeline.from_pretrained(contrasts / "run/model")
    scan = next(contrasts.glob("data/sub-*/anat/*_T1w.nii.gz"))
    with pytest.raises(InputError, match=r"volumes of T1w and T2w, and .* is one image; take a model of T1w alone"):
        place(pipe, scan)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["data.channels=[T2w, T1w]"], "that of the scans \\(suffix T1w\\) first"),
        (["data.channels=[T1w]"], "list two or more contrasts"),
        (["data.channels=[T1w, T2w, T2w]"], "each once"),
        (["data.bids=null", "data.table=scans.csv"], "`channels` goes with `bids`"),
        (
            ["diffusion.process.kind=vdm", "diffusion.time_sampling.kind=uniform", "autoencoder.latent_scaling=unit"],
            "data.channels does not go with .*vdm",
        ),
        (
            ["diffusion.conditions=[{name: FLAIR, kind: image, suffix: FLAIR}]", "diffusion.mirror=false"],
            "keep label maps alone",
        ),
        (["autoencoder.adversarial={weight: 0.01, start: 2}"], "perceptual and adversarial losses"),
    ],
)
def test_what_does_not_go_together(contrasts, changes, message):
    with pytest.raises(InputError, match=message):
        load_config(contrasts / "config.yaml", changes)


def test_a_contrast_that_nobody_has(contrasts):
    config = load_config(contrasts / "config.yaml", ["data.channels=[T1w, FLAIR]"])
    with pytest.raises(InputError, match=r"data.channels FLAIR: no scan found in"):
        CodedVolumes.of(config, read_scan_table(config))
    config, scans = load_config(contrasts / "config.yaml", ()), read_scan_table(load_config(contrasts / "config.yaml", ()))
    scans["split"] = ["train" if f"sub-{s}" in LACKING else "test" for s in scans["subject"]]
    with pytest.raises(InputError, match=r"none of 4 scans of the training split has all of T1w, T2w"):
        CodedVolumes.of(config, scans)


def test_a_model_of_one_contrast_is_no_base(contrasts):
    config = load_config(contrasts / "config.yaml", ["diffusion.init_from=brains-4.5mm"])
    with pytest.raises(InputError, match=r"makes volumes of one contrast, and data.channels asks for T1w and T2w"):
        take_autoencoder(config)


def test_a_changed_contrast_makes_latents_stale(contrasts):
    config = load_config(contrasts / "config.yaml", ())
    check_latents(config.latents_folder, latents_origin(config))
    path = sorted(contrasts.glob("data/sub-*/anat/*_T2w.nii.gz"))[0]
    content = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(InputError, match=r"contrast T2w changed"):
            check_latents(config.latents_folder, latents_origin(config))
    finally:
        path.write_bytes(content)
