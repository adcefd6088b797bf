"""Images as conditions: what the config takes, what becomes of volumes, and a training from a trained model."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import command_line, tiny_settings

from ldm3d.base_model import first_unet, take_autoencoder
from ldm3d.conditions import ImageChannels
from ldm3d.config.conditions import Degradation, DegradedCondition, ImageCondition, LabelsCondition
from ldm3d.config.read import load_config
from ldm3d.data.degrade import degraded
from ldm3d.data.latents import read_latents
from ldm3d.data.samples import IMAGE, LatentSamples, Visits
from ldm3d.errors import InputError
from ldm3d.experiment import latents_origin
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.models.blocks import depth_to_space
from ldm3d.models.unet import LatentUNet
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator


def test_a_training_starts_with_the_answers_of_the_old_model(conditioned, experiment, train_here, monkeypatch):
    """To the bit, whatever the images show; also the average, and the normalisation of covariates."""
    from ldm3d.training import diffusion

    seen = {}
    monkeypatch.setattr(diffusion, "fit", lambda task, *_: seen.update(task=task))
    train_here("diffusion", conditioned / "config.yaml")
    task, old = seen["task"], Pipeline.from_pretrained(experiment / "run/model", "cpu", torch.float32)
    task.accelerator = Accelerator(cpu=True)  # that of the training ended with it
    assert [(c.mean, c.std) for c in task.schema] == [(c.mean, c.std) for c in old.schema]
    given = task.conditions_of([2, 3, 4])
    assert given.images.shape[1] == 3 + 2 + 64 and given.known.any()
    z, times = torch.randn(3, 3, *task.padded, generator=generator(1)), torch.tensor([10.0, 500.0, 990.0])
    for network in (task.trained["model"].network, task.trained["model"].average.network):
        with torch.no_grad():
            assert torch.equal(network(z, times, given), old.unet(z, times, given.covariates))
    batch = next(task.batches.loader(0, 1, 0, pin_memory=False))
    (_, loss, _) = next(task.losses(batch, 0))
    loss.backward()
    network = task.trained["model"].network
    assert network.conv_images.weight.grad.abs().sum() > 0
    mixing = network.mix_images.weight[:, :69].split([3, 2, 64], dim=1)  # each condition is looked at
    assert network.arguments["image_width"] == 32 and all(part.abs().sum() > 0 for part in mixing)


def test_what_is_given_is_what_the_files_hold(conditioned):
    config = load_config(conditioned / "config.yaml")
    moments, scans = read_latents(config.latents_folder, latents_origin(config))
    t2, labels = (np.load(config.latents_folder / f"condition-{name}.npy") for name in ("T2w", "labels"))
    first = int(np.flatnonzero(scans["subject"] == min(scans["subject"]))[0])
    assert np.isnan(t2[first]).all() and np.isnan(labels[first]).all() and np.isfinite(np.delete(t2, first, 0)).all()
    autoencoder = LatentSpace.from_pretrained(config.autoencoder_folder)
    row = next(i for i in range(len(scans)) if i != first)
    with torch.no_grad():
        shown = autoencoder.decode(torch.from_numpy(t2[row : row + 1]))[0, 0].numpy()
        scan = autoencoder.decode(torch.from_numpy(moments[row : row + 1]).chunk(2, 1)[0])[0, 0].numpy()
    assert np.corrcoef(shown.ravel(), scan.ravel())[0, 1] < -0.9  # the T2w here is the T1w, inverted
    assert labels[row].min() >= 0 and labels[row].sum(0).max() <= 1.001
    middle = tuple(n // 2 for n in labels.shape[2:])
    assert labels[row].sum(0)[middle] > 0.9 and labels[row].sum(0)[0, 0, 0] < 0.1


def test_a_changed_file_makes_the_cache_stale(conditioned):
    config = load_config(conditioned / "config.yaml")
    origin = latents_origin(config)
    path = sorted(conditioned.glob("labels/sub-*/*"))[3]
    before = path.read_bytes()
    image = nib.load(path)
    voxels = np.asarray(image.dataobj).copy()
    voxels[12, 14, 12] = 43
    nib.save(nib.Nifti1Image(voxels, image.affine), path)
    changed = latents_origin(config)
    path.write_bytes(before)
    assert [name for name in origin if origin[name] != changed[name]] == ["condition labels"]


def test_a_stopped_training_goes_on_to_the_same_bits(conditioned, train_here):
    config = conditioned / "config.yaml"
    steps = "training.steps=4"
    train_here("diffusion", config, steps, "training.checkpoint_every=2")
    weights = conditioned / "run/model/unet/model.safetensors"
    once = weights.read_bytes()
    last = sorted((conditioned / "run/diffusion-training").glob("*00000004*"))
    assert last
    for path in last:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_here("diffusion", config, steps, "training.checkpoint_every=2", "training.workers=1")
    assert weights.read_bytes() == once
    unet = LatentUNet.from_pretrained(conditioned / "run/model/unet")
    assert unet.image_channels == 69 and unet.conv_images.weight.abs().sum() > 0


def test_the_base_model_has_to_fit(conditioned, tmp_path):
    def wrong(*changes):
        with pytest.raises(InputError) as error:
            config = load_config(conditioned / "config.yaml", changes)
            take_autoencoder(config)
            first_unet(config, 69)
        return str(error.value)

    assert "its covariates are age (years)" in wrong("covariates=[]")
    assert "whose network has channels [16, 32]" in wrong("diffusion.network.channels=[16, 48]")
    assert "predicts v" in wrong("diffusion.target=noise")
    assert "latent_channels 3" in wrong("autoencoder.network.latent_channels=4")
    assert "shipped are" in wrong("diffusion.init_from=nothing-here")


def test_training_can_start_with_a_network_of_fewer_blocks(conditioned, experiment, tmp_path):
    deeper, small = "diffusion.network.blocks=[1, 2]", LatentUNet.from_pretrained(experiment / "run/model/unet")
    unet, _, _ = first_unet(load_config(conditioned / "config.yaml", [deeper]), 69)
    assert (len(unet.down[0]), len(unet.down[1]), len(unet.up[1]), unet.image_channels) == (1, 2, 2, 69)
    assert torch.equal(unet.up[1][0].residual.conv1.weight, small.up[1][0].residual.conv1.weight)

    shutil.copytree(experiment / "run/model", tmp_path / "model")
    small.with_blocks([1, 2]).save_pretrained(tmp_path / "model/unet")
    config = load_config(conditioned / "config.yaml", [f"diffusion.init_from={tmp_path / 'model'}"])
    with pytest.raises(InputError, match=r"of \[1, 2\] blocks cannot start one of \[1, 1\]: blocks can be added"):
        first_unet(config, 69)


@pytest.mark.parametrize(
    "conditions, message",
    [
        ([{"name": "a", "kind": "image"}], "either `suffix: T2w`"),
        ([{"name": "a", "kind": "image", "suffix": "T2w", "visit": "earlier"}], "either"),
        ([{"name": "a", "kind": "picture", "suffix": "T2w"}], "picture"),
        ([{"name": "a", "kind": "image", "suffix": "T2w", "tells": ["age"]}], "drop `tells`"),
        ([{"name": "a", "kind": "image", "visit": "other", "tells": ["sex"]}], "use age, ventricular_volume_ml"),
        ([{"name": "a b", "kind": "image", "suffix": "T2w"}], "a b"),
        ([{"name": "a", "kind": "labels", "groups": {}}], "at least one group"),
        ([{"name": "a", "kind": "labels", "groups": {"x": [4], "y": [4]}}], "listed twice"),
        ([{"name": "a", "kind": "labels", "groups": {"x": [0]}}], "background"),
        ([{"name": "a", "kind": "labels", "groups": {"x": [4]}, "detail": 3}], "must divide the 4 voxels"),
        ([{"name": "a", "kind": "degraded", "degradations": []}], "degradations"),
        ([{"name": "a", "kind": "degraded", "degradations": [{"operator": "noise", "strength": 2}]}], "within 0 to 1"),
        ([{"name": "a", "kind": "degraded", "degradations": [{"operator": "slices", "strength": 0.5}]}], "axes"),
        ([{"name": "a", "kind": "image", "suffix": "T2w"}] * 2, "two conditions"),
    ],
)
def test_a_wrong_condition_is_refused(conditions, message, tmp_path):
    settings = tiny_settings(tmp_path)
    settings["diffusion"]["conditions"] = conditions
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="conditions") as error:
        load_config(tmp_path / "config.yaml")
    assert message in str(error.value)


def test_images_leave_all_other_random_numbers_as_they_were(tmp_path):
    np.save(tmp_path / "moments.npy", np.zeros((3, 6, 4, 5, 4), np.float32))
    plain = LatentSamples(tmp_path, (0, 1, 2), torch.rand(3, 2, 2), (4, 6, 4))
    reader = lambda row, rng, mirrored: {f"{IMAGE}a": torch.rand(2, generator=rng)}  # noqa: E731
    with_image = LatentSamples(tmp_path, (0, 1, 2), plain.contexts, (4, 6, 4), (reader,))
    one, two = plain(1, generator(0)), with_image(1, generator(0))
    assert two.keys() - one.keys() == {f"{IMAGE}a", "drop_images"}
    assert all(torch.equal(one[name], two[name]) for name in one)


BALL = (torch.stack(torch.meshgrid(*[torch.arange(n) - n / 2 for n in (40, 48, 40)], indexing="ij")).norm(dim=0) < 16).float()[
    None
]


def worse(strength, operator="hole", seed=0, spacing=(4.5, 4.5, 4.5), volume=BALL, **more):
    return degraded(volume, spacing, [Degradation(operator=operator, strength=strength, **more)], generator(seed))[:2]


def test_holes_have_the_size_that_was_asked_and_lie_in_the_foreground():
    diameters = []
    for seed in range(20):
        volume, known = worse(40, seed=seed)
        hole = known == 0
        assert not volume[hole].any() and torch.equal(volume[~hole], BALL[~hole]) and BALL[hole].any()
        diameters.append(2 * (3 * hole.sum().item() * 4.5**3 / (4 * np.pi)) ** (1 / 3))
    assert 36 < np.mean(diameters) < 44 and np.std(diameters) > 0.5
    assert not torch.equal(worse(40, seed=1)[1], worse(40, seed=2)[1]) and torch.equal(worse(40)[1], worse(40)[1])


def test_slices_are_missing_along_their_axis():
    volume, known = worse(0.5, "slices", axes="z")
    kept = known[0, 0, 0].bool()
    assert torch.equal(known, kept.float().expand_as(known)) and 10 < kept.sum() < 30
    assert torch.equal(volume[..., kept], BALL[..., kept])


def test_lower_resolution_blurs_along_its_axis_alone():
    volume, known = worse(18, "resolution", axes="z")
    assert known.all()
    profile, across = volume[0, 20, 24], volume[0, :, 24, 20]
    assert (profile.diff().abs() > 0.02).sum() > 6 and profile.diff().abs().max() < 0.5
    assert across.diff().abs().max() > 0.9  # as sharp as before
    assert abs(volume.mean() / BALL.mean() - 1) < 0.03
    assert torch.equal(worse(2, "resolution")[0], BALL)  # finer than the grid: nothing is lost


def test_noise_is_rician():
    """In air the mean of the magnitude is sigma sqrt(pi / 2); in signal its deviation is sigma."""
    volume, _ = worse(0.1, "noise", volume=torch.zeros(1, 40, 40, 40))
    assert volume.mean().item() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.01)
    volume, _ = worse(0.1, "noise", volume=torch.ones(1, 40, 40, 40))
    assert volume.std().item() == pytest.approx(0.1, rel=0.02)


def test_bias_is_smooth_and_of_its_strength():
    fields = [worse(0.3, "bias", volume=torch.ones(1, 20, 24, 20), seed=seed)[0].log() for seed in range(30)]
    assert torch.stack(fields).std().item() == pytest.approx(0.3, rel=0.6)
    assert max(field.diff(dim=1).abs().max() / (field.max() - field.min()) for field in fields) < 0.3


def test_channels_say_what_is_known():
    torch.manual_seed(0)
    autoencoder = Autoencoder(latent_channels=3, downsampling=4, channels=[8, 16], blocks=1).eval()
    autoencoder.latent_mean.fill_(2.0)
    image = ImageCondition(name="T2w", kind="image", suffix="T2w")
    labels = LabelsCondition(name="labels", kind="labels", groups={"a": [1], "b": [2]})
    holed = DegradedCondition(name="holed", kind="degraded", degradations=[Degradation(operator="hole", strength=(9, 9))])
    channels = ImageChannels([image, labels, holed], autoencoder)
    assert channels.count == 3 + 2 + 64
    shares = torch.zeros(2, 2, 8, 8, 8)
    shares[0, 0, :4, :4, :2] = 1
    raw = {"labels": channels.encoded(labels, shares), "T2w": torch.full((2, 3, 2, 2, 2), 2.0)}
    raw["T2w"][1] = torch.nan
    images, known = channels.stacked(raw, {"T2w": torch.full((2, 1, 2, 2, 2), 0.25)})
    assert images[0, :3].eq(0).all() and known[0, :3].eq(0.25).all() and known[1, :3].eq(0).all()
    assert images[0, 3, 0, 0, 0] == 0.5 and images[0, 3:5].sum() == 0.5 and known[:, 3:5].eq(1).all()
    assert known[:, 5:].eq(0).all() and images.shape == known.shape == (2, 69, 2, 2, 2)
    _, dropped = channels.stacked(raw, {}, {"labels": torch.tensor([True, False]), "T2w": torch.tensor([False, True])})
    assert dropped[0, 3:5].eq(1).all() and dropped[1, 3:5].eq(0).all() and dropped[:, :3].eq(0).all()


def test_labels_are_shares_of_parts_of_a_block():
    autoencoder = Autoencoder(latent_channels=3, downsampling=4, channels=[8, 16], blocks=1).eval()
    labels = LabelsCondition(name="labels", kind="labels", groups={"a": [1], "b": [2]}, detail=2)
    channels, shares = ImageChannels([labels], autoencoder), torch.zeros(1, 2, 8, 8, 8)
    shares[0, 1, 0:2, 0:2, 0:1] = 1  # half of one part
    found = channels.encoded(labels, shares)
    assert found.shape == (1, channels.count, 2, 2, 2) and channels.count == 16
    assert found.sum() == 0.5 and (found != 0).sum() == 1
    assert depth_to_space(found, 2)[0, 1, 0, 0, 0] == 0.5


def test_a_visit_tells_its_own_age(tmp_path):
    """A channel that is the same everywhere, of the visit that is given, in training and in requests; NaN where unknown."""
    autoencoder = Autoencoder(latent_channels=3, downsampling=4, channels=[8, 16], blocks=1).eval()
    autoencoder.latent_mean.fill_(2.0)
    visit = ImageCondition(name="visit", kind="image", visit="other", tells=["age"])
    channels = ImageChannels([visit], autoencoder)
    assert channels.count == 4
    volumes, ages = torch.rand(2, 1, 8, 8, 8), torch.tensor([[1.5], [torch.nan]])
    with torch.no_grad():
        raw = channels.encoded(visit, volumes, ages)
        images, known = channels.stacked({"visit": raw}, {})
        torch.testing.assert_close(images[:, :3], autoencoder.normalise(channels.latents(volumes)))
        assert images[0, 3].eq(1.5).all() and known[0].eq(1).all() and known[1, :3].eq(1).all() and known[1, 3].eq(0).all()
        assert channels.encoded(visit, volumes)[:, 3].isnan().all()
    np.save(
        tmp_path / "moments.npy", np.arange(3, dtype=np.float32)[:, None, None, None, None] * np.ones((1, 6, 2, 2, 2), "f")
    )
    read = Visits("visit", tmp_path, ((1,), (0, 2), ()), torch.tensor([[0.1], [0.2], [0.3]]))
    of_first, of_last = read(0, generator(0))[f"{IMAGE}visit"], read(2, generator(0))[f"{IMAGE}visit"]
    assert of_first[:3].eq(1).all() and of_first[3].eq(0.2).all() and of_first.shape == (4, 2, 2, 2)
    assert of_last.isnan().all()


def test_a_degraded_volume_is_given_voxel_by_voxel(monkeypatch):
    """Nothing is encoded in a training step, no detail is lost, and a missing voxel is known to be missing."""
    autoencoder = Autoencoder(latent_channels=3, downsampling=4, channels=[8, 16], blocks=1).eval()
    monkeypatch.setattr(autoencoder, "encode", lambda x: pytest.fail("encoded"))
    hole = Degradation(operator="hole", strength=(9, 9))
    channels = ImageChannels([DegradedCondition(name="holed", kind="degraded", degradations=[hole])], autoencoder)
    volume, mask = torch.rand(2, 1, 8, 12, 8), (torch.rand(2, 1, 8, 12, 8) > 0.1).float()
    images, known = channels.stacked(
        {"holed": channels.encoded(channels.conditions[0], volume)}, {"holed": channels.measured(mask)}
    )
    torch.testing.assert_close(depth_to_space((images + 1) / 2, 4), volume)
    assert torch.equal(depth_to_space(known, 4), mask)


def test_the_other_contrast_is_made_from_the_scan(conditioned, tmp_path, train_here, monkeypatch):
    from ldm3d.training import diffusion

    shutil.copytree(conditioned / "run/prepared", tmp_path / "run/prepared")
    changes = [f"output={tmp_path / 'run'}", "diffusion.makes=T2w"]
    command_line("encode", conditioned / "config.yaml", *(part for change in changes for part in ("--set", change)))
    seen = {}
    monkeypatch.setattr(diffusion, "fit", lambda task, *_: seen.update(task=task))
    train_here("diffusion", conditioned / "config.yaml", *changes)
    task = seen["task"]
    task.accelerator = Accelerator(cpu=True)  # that of the training ended with it
    assert [each.name for each in task.config.given_conditions] == ["T1w", "labels", "holed"]
    row = task.split["train"][1]
    scan = LatentSpace.from_pretrained(task.config.autoencoder_folder).normalise(
        torch.from_numpy(np.load(task.config.latents_folder / "moments.npy")[row : row + 1]).chunk(2, 1)[0]
    )
    torch.testing.assert_close(task.conditions_of([row]).images[:, :3], scan)
    made, own = task.means([row]), task.conditions_of([row]).images[:, :3]
    shown = [task.autoencoder.decode(task.autoencoder.denormalise(z)).flatten() for z in (made[..., :6, :7, :6], own)]
    assert torch.corrcoef(torch.stack(shown))[0, 1] < -0.9  # the T2w here is the T1w, inverted
    first = int(np.flatnonzero(task.scans["subject"] == min(task.scans["subject"]))[0])
    assert first not in task.split["train"] + task.split["validation"]  # it has no T2w
    pipeline = task.pipeline(task.trained["model"].average.network)
    assert pipeline.suffix == "T2w" and pipeline.conditions[0].suffix == "T1w"
