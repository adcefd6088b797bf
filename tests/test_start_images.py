"""A Gaussian that knows images: what a linear formula tells is found again, and without images it is the one without them."""

import shutil

import pytest
import torch
import yaml
from accelerate import Accelerator

from ldm3d.config.read import load_config
from ldm3d.diffusion.denoiser import NetworkDenoiser
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator
from ldm3d.reading import Reading
from ldm3d.start import GaussianStart

SHAPE, COUNT, NOISE = (2, 4, 5, 4), 240, 0.3
PROCESS = make_process("flow")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KERNEL = 0.3 * random(2, 3, 3, 3, 3, seed=1)
USUAL = random(3, *SHAPE[1:], seed=2)
IMAGES = USUAL + random(COUNT, 3, *SHAPE[1:], seed=3)
MEAN = random(*SHAPE, seed=4)
LATENTS = MEAN + torch.nn.functional.conv3d(IMAGES - USUAL, KERNEL, padding=1) + NOISE * random(COUNT, *SHAPE, seed=5)
CONTEXT = torch.ones(COUNT, 1, 2)


def given(rows, known=1.0, images=IMAGES):
    rows = list(rows)
    return Conditions(CONTEXT[rows], images[rows], torch.full((len(rows), 3, *SHAPE[1:]), known))


@pytest.fixture(scope="module")
def starts():
    """(without images, with them), fitted to the same latents."""
    plain = GaussianStart.fit(LATENTS, CONTEXT, [0], components=4, until=2.0, residual=True)
    return plain, plain.with_images(LATENTS, CONTEXT, given)


def test_the_kernel_is_found_again():
    reading = Reading.fit(LATENTS, given)
    assert (reading.kernel - KERNEL).abs().max() < 0.03 < 0.5 < KERNEL.abs().max()
    assert (reading.usual - IMAGES.mean(dim=0)).abs().max() < 1e-5
    assert reading(given([0], known=0.0)).eq(0).all()
    holed = given([0])
    holed.known[:, :, :, :2] = 0
    holed.images[:, :, :, :2] = torch.nan  # what is not there counts as usual
    assert reading(holed).isfinite().all()


def test_its_error_is_that_of_the_exact_answer(starts):
    """Given c, x is Gaussian with variance NOISE^2: E[x | z, c] is known, and so is its error; the other is far off."""
    plain, seeing = starts
    rows, t = range(40), 0.5
    x = LATENTS[rows]
    z = PROCESS.add_noise(x, random(40, *SHAPE, seed=6), t)
    shift = MEAN + torch.nn.functional.conv3d(IMAGES[rows] - USUAL, KERNEL, padding=1)
    exact = shift + 0.5 * NOISE**2 / (0.25 * NOISE**2 + 0.25) * (z - 0.5 * shift)
    errors = [(each - x).square().mean().sqrt() for each in (exact, *(s.under(given(rows), PROCESS)(z, t).x for s in starts))]
    assert errors[2] < 1.05 * errors[0] and errors[1] > 1.5 * errors[0]
    left = seeing.under(given(rows), PROCESS)(z, t).left
    torch.testing.assert_close(left.mean(), errors[0], rtol=0.1, atol=0)
    assert plain.under(given(rows), PROCESS)(z, t).left.mean() > 1.5 * left.mean()


def test_without_images_it_is_the_other_to_the_bit_and_rows_do_not_mix(starts):
    plain, seeing = starts
    z, times = random(3, *SHAPE, seed=7), torch.tensor([0.2, 0.6, 1.0])
    mixed = given([0, 1, 2])
    mixed.known[1], mixed.images[1] = 0, torch.nan
    found = seeing.under(mixed, PROCESS)(z, times)
    alone = plain.under(Conditions(CONTEXT[1:2]), PROCESS)(z[1:2], times[1:2])
    assert torch.equal(found.x[1:2], alone.x) and torch.equal(found.left[1:2], alone.left)
    others = given([0, 5, 6])
    others.known[1] = 0
    assert torch.equal(seeing.under(others, PROCESS)(z, times).x[0], found.x[0])
    assert not torch.equal(seeing.under(others, PROCESS)(z, times).x[2], found.x[2])
    covariates = Conditions(CONTEXT[:3])
    assert torch.equal(seeing.under(covariates, PROCESS)(z, 0.4).x, plain.under(covariates, PROCESS)(z, 0.4).x)


def test_it_is_the_same_from_its_folder(starts, tmp_path):
    _, start = starts
    start.save_pretrained(tmp_path, torch.bfloat16)
    again, z = GaussianStart.from_pretrained(tmp_path), random(4, *SHAPE, seed=8)
    assert again.image_channels == 3 and torch.equal(again.seeing.directions, start.seeing.directions)
    one, two = (s.under(given(range(4)), PROCESS)(z, 0.7).x for s in (start, again))
    torch.testing.assert_close(one, two, rtol=0, atol=0.05)


def test_a_start_without_images_to_look_at_is_refused(starts):
    with pytest.raises(InputError, match="drop start"):
        starts[0].with_images(LATENTS, CONTEXT, lambda rows: given(rows, known=0.0))


@pytest.fixture(scope="module")
def residual_model(experiment, tmp_path_factory):
    """A model whose network has learned what its Gaussian leaves: random weights."""
    pipeline = Pipeline.from_pretrained(experiment / "run/model", "cpu", torch.float32)
    channels = pipeline.autoencoder.latent_channels
    shape = channels, *pipeline.unet.padded_shape(pipeline.autoencoder.latent_shape(pipeline.grid.shape)[1:])
    context = torch.ones(40, len(pipeline.schema), 2)
    latents = random(40, *shape, seed=9)
    pipeline.start = GaussianStart.fit(latents, context, pipeline.schema.num_categories, 4, 2.0, residual=True)
    pipeline.scales = (1.5,) * channels
    torch.manual_seed(0)
    unet = UNet(**{**pipeline.unet.arguments, "in_channels": 2 * channels})
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline.unet = unet.eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("residual") / "model"
    pipeline.save_pretrained(folder)
    return folder


def task_of(conditioned, folder, model, start, train_here, monkeypatch):
    """The training of a model with images that starts from a residual one, before its first step."""
    from ldm3d.training import diffusion

    shutil.copytree(conditioned / "run", folder / "run", ignore=shutil.ignore_patterns("diffusion-training", "model"))
    settings = yaml.safe_load((conditioned / "config.yaml").read_text())
    settings["output"], settings["diffusion"]["init_from"] = str(folder / "run"), str(model)
    settings["diffusion"]["start"] = start
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    seen = {}
    monkeypatch.setattr(diffusion, "fit", lambda task, *_: seen.update(task=task))
    train_here("diffusion", folder / "config.yaml")
    seen["task"].accelerator = Accelerator(cpu=True)
    return seen["task"]


@pytest.mark.parametrize("images", [False, True])
def test_a_training_starts_with_the_answers_of_a_residual_model(
    images, conditioned, residual_model, tmp_path, train_here, monkeypatch
):
    """To the bit, at every time: whatever the images show, or, where the Gaussian knows them, with all of them open."""
    start = {"components": 4, "residual": True, **({"images": True} if images else {})}
    task = task_of(conditioned, tmp_path, residual_model, start, train_here, monkeypatch)
    old = Pipeline.from_pretrained(residual_model, "cpu", torch.float32)
    rows = [2, 3, 4]
    shown = task.conditions_of(rows)
    assert shown.known.any()
    asked = shown.open(covariates=[], images=True) if images else shown
    z = torch.randn(3, 3, *task.padded, generator=generator(1))
    network = task.trained["model"].average.network
    new = NetworkDenoiser(network, task.objective.process, "v", task.scales, task.estimate).given(asked)
    before = NetworkDenoiser(old.unet, old.process, "v", old.scales, old.start).given(Conditions(asked.covariates))
    with torch.no_grad():
        for t in (0.1, 0.6, 0.99):
            assert torch.equal(new(z, t), before(z, t))
        seen = NetworkDenoiser(network, task.objective.process, "v", task.scales, task.estimate).given(shown)(z, 0.6)
    assert torch.equal(seen, before(z, 0.6)) != images
    assert task.objective.share == 1  # every level of noise
    batch = next(task.batches.loader(0, 1, 0, pin_memory=False))
    (_, loss, _) = next(task.losses(batch, 0))
    loss.backward()
    assert loss.isfinite() and task.trained["model"].network.conv_images.weight.grad.abs().sum() > 0
    if images:
        pipeline = task.pipeline(network)
        pipeline.save_pretrained(tmp_path / "saved")
        assert "beside a Gaussian that knows the images" in repr(Pipeline.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize(
    "start, message",
    [({"components": 4}, "set start.residual to true"), ({"images": True, "residual": True}, None)],
)
def test_a_start_beside_images_has_to_be_seen_by_the_network(start, message, conditioned, tmp_path):
    settings = yaml.safe_load((conditioned / "config.yaml").read_text())
    settings["diffusion"]["start"] = start
    if message is None:
        del settings["diffusion"]["conditions"]
        message = "there are no `conditions`"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "config.yaml")
