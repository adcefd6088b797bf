"""MONAI's networks behind our interfaces, and whole experiments with them."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch
import yaml
from conftest import SHAPE, command_line, tiny_settings
from in_process import train
from monai.transforms import DivisiblePad
from safetensors.torch import load_file

from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.errors import InputError
from ldm3d.models import monai as ours
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.models.pretrained import find_class, make_network
from ldm3d.models.unet import LatentUNet, UNet, cut_to, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.training.metrics import read_metrics

LIBRARIES = ("monai", "monai-generative")


def autoencoder(library="monai", **changes):
    arguments = {"latent_channels": 3, "channels": [4, 8, 8], "blocks": 1, "norm_num_groups": 2} | changes
    return make_network("Autoencoder", kind=library, **arguments)


def unet(library="monai", num_categories=(0, 2), **changes):
    arguments = {"channels": [8, 8], "blocks": 1, "attention": [False, True], "head_channels": [4], "norm_num_groups": 2}
    arguments |= {"in_channels": 3, "out_channels": 3, "num_categories": num_categories, "context_dim": 6} | changes
    return awake(make_network("UNet", kind=library, **arguments))


def awake(network):
    """With nothing left at zero, where MONAI's networks start."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return network.eval()


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


# Autoencoders


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("attention", [{}, {"attention": [False, False, True], "middle_attention": True}])
def test_autoencoder_is_the_library_s(library, attention, rng):
    network = awake(autoencoder(library, **attention))
    x = torch.rand(2, 1, 8, 12, 8, generator=rng)
    moments = network.encode(x)
    mean, sigma = network.network.encode(x)
    assert network.downsampling == 4
    assert moments.shape == (2, 6, 2, 3, 2) == (2, 6, *network.latent_shape((8, 12, 8))[1:])
    torch.testing.assert_close(moments, torch.cat([mean, 2 * sigma.log()], dim=1), rtol=1e-4, atol=1e-4)
    again, _ = network(x, torch.zeros_like(mean))
    torch.testing.assert_close(again, network.decode(mean))
    network, mean = network.double(), mean.double()  # the formula, not a CPU's choice of kernels for the last convolution
    torch.testing.assert_close(network.decode(mean), network.network.decode(mean), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_log_variance_starts_small_and_stays_in_range(library, rng):
    network = autoencoder(library)
    x = torch.rand(1, 1, 8, 8, 8, generator=rng)
    assert (network.encode(x)[:, 3:] + 6).abs().max() < 2
    with torch.no_grad():
        network.network.quant_conv_log_sigma.conv.bias.fill_(1e4)
    assert (network.encode(x)[:, 3:] == 20).all()


def test_latents_statistics_are_used(rng):
    network = autoencoder()
    network.latent_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    network.latent_std.fill_(0.5)
    x = torch.rand(1, 1, 8, 8, 8, generator=rng)
    z = network.encode_stage_2_inputs(x)
    torch.testing.assert_close(z, (network.encode(x)[:, :3] - torch.tensor([1.0, 2, 3])[:, None, None, None]) / 0.5)
    torch.testing.assert_close(network.decode_stage_2_outputs(z), network.decode(network.encode(x)[:, :3]))


def test_side_that_does_not_divide():
    with pytest.raises(InputError, match=r"\(8, 10, 8\) must be divisible by the downsampling 4"):
        autoencoder().encode(torch.zeros(1, 1, 8, 10, 8))


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_the_library_refuses_is_an_input_error(library):
    with pytest.raises(InputError, match=rf"AutoencoderKL of {library} with channels \[3, 4\]"):
        autoencoder(library, channels=[3, 4])
    with pytest.raises(InputError, match="library 'monay' is not one of monai, monai-generative"):
        make_network("Autoencoder", kind="monay", latent_channels=3, channels=[4])
    with pytest.raises(InputError, match="conditioning 'token' is not one of tokens, values"):
        unet(library, conditioning="token")


# U-Nets


@pytest.mark.parametrize("library", LIBRARIES)
def test_time_is_counted_in_steps_of_the_chain(library, rng):
    """Step k is the time (k + 1) / 1000; the data itself is asked for as step 0."""
    network = unet(library, num_categories=())
    x = torch.randn(2, 3, 4, 4, 4, generator=rng)
    for thousandths, step in ((981.0, 980), (1.0, 0), (0.0, 0), (1000.0, 999)):
        answer = network(x, torch.full((2,), thousandths))
        torch.testing.assert_close(answer, network.network(x, torch.full((2,), step)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(network(x, torch.full((2,), 900.0)), answer, atol=1e-3)


@pytest.mark.parametrize("library", LIBRARIES)
def test_tokens_tell_values_categories_and_open_ones_apart(library, rng):
    network = unet(library)
    x, t = torch.randn(1, 3, 4, 4, 4, generator=rng), torch.tensor([500.0])
    contexts = (
        [[0.3, 1], [1, 1]],
        [[0.4, 1], [1, 1]],
        [[0.3, 1], [0, 1]],
        [[0, 0], [1, 1]],
        [[0, 1], [1, 1]],
        [[0, 0], [0, 0]],
    )
    answers = [network(x, t, torch.tensor([context], dtype=torch.float32)) for context in contexts]
    for i, answer in enumerate(answers):
        assert all((answer - other).abs().max() > 1e-6 for other in answers[i + 1 :]), i
    torch.testing.assert_close(network(x, t), answers[-1])  # None leaves all open


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("concatenate", [False, True])
def test_values_are_one_token_and_constant_channels(library, concatenate, rng):
    network = unet(library, num_categories=(0, 2, 3), conditioning="values", concatenate=concatenate)
    x, t = torch.randn(2, 3, 4, 4, 4, generator=rng), torch.tensor([981.0, 1.0])
    context = torch.tensor([[[0.3, 1], [1, 1], [1, 1]], [[0.7, 1], [0, 1], [2, 1]]])
    values = torch.tensor([[0.3, 1, 0.5], [0.7, 0, 1]])  # the middle one of three categories is 0.5
    seen = torch.cat([x, values[..., None, None, None].expand(2, 3, 4, 4, 4)], dim=1) if concatenate else x
    torch.testing.assert_close(network(x, t, context), network.network(seen, t - 1, values[:, None]))


@pytest.mark.parametrize("library", LIBRARIES)
def test_half_precision(library, rng):
    """Whole networks in bfloat16, as a pipeline runs them on request, and under autocast, as training does."""
    attending = {"attention": [False, False, True], "middle_attention": True}
    x, z = torch.rand(1, 1, 8, 8, 8, generator=rng), torch.randn(1, 3, 4, 4, 4, generator=rng)
    context = torch.ones(1, 2, 2)
    ae, net = awake(autoencoder(library, **attending)), unet(library, upcast_attention=library == "monai-generative")
    exact = ae.encode(x), ae.decode(z), net(z, torch.tensor([500.0]), context)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ae.encode(x), ae.decode(z), net(z, torch.tensor([500.0]), context)
    ae, net = ae.bfloat16(), net.bfloat16()
    half = ae.encode(x.bfloat16()), ae.decode(z.bfloat16()), net(z.bfloat16(), torch.tensor([500.0]), context.bfloat16())
    for right, *others in zip(exact, mixed, half):
        for other in others:
            assert (other.float() - right).norm() < 0.05 * right.norm()


def test_a_projection_that_is_never_called_does_not_train():
    """Processes that train together would wait for its gradient."""
    network = autoencoder("monai-generative", middle_attention=True)
    _, moments = (out := network(torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 3, 2, 2, 2)))
    (out[0].sum() + moments.sum()).backward()
    assert {name.split(".")[-2] for name, p in network.named_parameters() if not p.requires_grad} == {"proj_attn"}
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("works", [False, True])
def test_xformers_is_called_where_it_works(works, monkeypatch):
    asked = []
    monkeypatch.setattr(ours, "xformers_works", lambda *head: asked.append(head) or works)
    network = unet("monai-generative")
    module = next(m for m in network.modules() if hasattr(m, "use_flash_attention"))
    ours._prefer_xformers(module, (torch.zeros(1, 4, 8),))
    assert module.use_flash_attention is works
    assert asked == [(torch.device("cpu"), torch.float32, 4)]
    assert not any(m._forward_pre_hooks for m in unet("monai-generative", flash_attention=False).modules())


def test_attention_can_be_run_dry():
    """On tensors without data, by which the memory of a decode is counted."""
    network = unet("monai-generative").to("meta")
    out = network(
        torch.empty(1, 3, 4, 4, 4, device="meta"), torch.empty(1, device="meta"), torch.empty(1, 2, 2, device="meta")
    )
    assert out.is_meta


def test_attention_does_not_call_xformers_on_a_cpu(rng):
    network = unet("monai-generative")
    network(torch.randn(1, 3, 4, 4, 4, generator=rng), torch.tensor([5.0]), torch.ones(1, 2, 2))
    assert not any(m.use_flash_attention for m in network.modules() if hasattr(m, "use_flash_attention"))


# Grids that cannot be halved


@pytest.mark.parametrize("shape", [(15, 18, 15), (5, 7, 8), (4, 4, 4)])
def test_padding_is_monai_s(shape, rng):
    x = torch.randn(2, 3, *shape, generator=rng)
    network = unet(channels=[8, 8, 8], attention=[False, False, True])
    padded = network.padded_shape(shape)
    theirs = torch.stack([DivisiblePad(k=4)(sample).as_tensor() for sample in x])
    torch.testing.assert_close(pad_to(x, padded), theirs, rtol=0, atol=0)
    torch.testing.assert_close(cut_to(theirs, shape), x, rtol=0, atol=0)
    network(theirs[:1], torch.tensor([3.0]))  # it takes this grid


def test_brain_latent_progression_s_padding():
    network = unet(channels=[8, 8, 8], attention=[False, False, True])
    assert network.padded_shape((15, 18, 15)) == (16, 20, 16)
    x = pad_to(torch.ones(1, 1, 15, 18, 15), (16, 20, 16))[0, 0]
    assert x[:15, 1:19, :15].all() and x.sum() == 15 * 18 * 15


def test_our_own_u_net_needs_no_padding(rng):
    network = UNet(3, 3, [], [8, 8, 8], 1, [False] * 3)
    assert network.padded_shape((15, 18, 15)) == (15, 18, 15)
    x = torch.randn(1, 3, 5, 6, 7, generator=rng)
    assert pad_to(x, (5, 6, 7)) is x
    assert cut_to(x, (5, 6, 7)).data_ptr() == x.data_ptr()


# Folders


@pytest.mark.parametrize("library", LIBRARIES)
def test_saved_networks_come_back(library, tmp_path, rng):
    networks = {
        "a": autoencoder(library, middle_attention=True),
        "u": unet(library),
        "v": unet(library, conditioning="values"),
    }
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        base = LatentSpace if name == "a" else LatentUNet
        again = base.from_pretrained(tmp_path / name)
        assert type(again) is type(network)
        assert again.arguments == network.arguments
        for key, value in network.state_dict().items():
            torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    with pytest.raises(InputError, match="holds weights of MonaiAutoencoder, not of LatentUNet"):
        LatentUNet.from_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="holds weights of MonaiAutoencoder, not of Autoencoder"):
        Autoencoder.from_pretrained(tmp_path / "a")
    description = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(description | {"class": "Elsewhere"}))
    with pytest.raises(InputError, match="holds weights of Elsewhere, not of LatentSpace"):
        LatentSpace.from_pretrained(tmp_path / "a")


def test_classes_are_found_by_name():
    assert find_class("UNet") is UNet
    assert find_class("MonaiUNet") is ours.MonaiUNet


# Whole experiments

AUTOENCODER = {"latent_channels": 3, "channels": [4, 8, 8], "blocks": 1, "norm_num_groups": 2, "middle_attention": True}
UNET = {
    "channels": [8, 16],
    "blocks": 1,
    "attention": [False, True],
    "head_channels": 8,
    "context_dim": 8,
    "norm_num_groups": 4,
}
PAIRS = [("monai", "monai-generative"), ("monai-generative", "monai")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "data", subjects=14, shape=SHAPE, seed=3, workers=1)
    return folder


def settings_of(data, folder, kinds) -> dict:
    settings = tiny_settings(data) | {"output": str(folder)}
    settings["autoencoder"] |= {"network": {"kind": kinds[0], **AUTOENCODER}}
    settings["autoencoder"]["training"] |= {"steps": 4, "optimizer": "adamw"}
    settings["diffusion"] |= {"network": {"kind": kinds[1], **UNET}}
    settings["diffusion"]["training"] |= {"steps": 4, "checkpoint_every": 2}
    return settings


@pytest.fixture(scope="module", params=[PAIRS[0], pytest.param(PAIRS[1], marks=pytest.mark.slow)], ids="-then-".join)
def trained(request, data, tmp_path_factory):
    """Folder of an experiment that has been through every command; latents of 6 x 7 x 6, which the U-Net cannot halve."""
    folder = tmp_path_factory.mktemp("monai")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings_of(data, folder, request.param)))
    command_line("prepare", config, "--workers", 1)
    train("autoencoder", config)
    command_line("encode", config)
    train("diffusion", config)
    return folder


def test_an_experiment_with_monai_s_networks(trained, data, tmp_path):
    pipeline = Pipeline.from_pretrained(trained / "model", device="cpu")
    assert type(pipeline.autoencoder) is ours.MonaiAutoencoder and type(pipeline.unet) is ours.MonaiUNet
    assert pipeline.autoencoder.arguments["library"] != pipeline.unet.arguments["library"]
    assert not pipeline.autoencoder.latent_mean.eq(0).any()
    command_line("generate", trained / "model", "--out", tmp_path / "out", "--age", 72, "--sex", "F", "--steps", 2)
    image = nibabel.load(next((tmp_path / "out").rglob("*.nii.gz")))
    assert image.shape == SHAPE
    assert np.isfinite(np.asarray(image.dataobj)).all() and np.asarray(image.dataobj).std() > 0
    command_line(
        *("evaluate", trained / "model", "--data", data / "data", "--out", tmp_path / "report"), *("--num", 3, "--steps", 1)
    )
    assert (tmp_path / "report/report.html").is_file()


@pytest.mark.filterwarnings("ignore:age")  # beyond what a few phantoms held
def test_covariates_and_seed_make_the_volume(trained):
    pipeline = Pipeline.from_pretrained(trained / "model", device="cpu")

    def latent(number=0, **asked):
        return pipeline.latents(pipeline.parse([asked]), pipeline.sampling, [number])

    assert latent(age=30).shape == (1, 3, 6, 7, 6)
    together = pipeline.latents(pipeline.parse([{"age": 30}, {"age": 80}]), pipeline.sampling, [0, 1])
    torch.testing.assert_close(together, torch.cat([latent(0, age=30), latent(1, age=80)]), rtol=1e-4, atol=1e-4)
    assert not torch.equal(latent(age=30), latent(age=80))
    assert not torch.equal(latent(age=30), latent(1, age=30))


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(trained, tmp_path):
    """The stage that runs on MONAI core: the first one of one pair, the second one of the other."""
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    stage = next(stage for stage in ("autoencoder", "diffusion") if settings[stage]["network"]["kind"] == "monai")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"output": str(tmp_path)}))
    for name in ("prepared", "autoencoder", "latents"):
        if name == "prepared" or stage == "diffusion":
            shutil.copytree(trained / name, tmp_path / name)
    train(stage, config, "training.steps=2")
    train(stage, config)
    name = f"{stage}-training/checkpoints/step-00000004/tensors.safetensors"
    whole, resumed = load_file(trained / name), load_file(tmp_path / name)
    assert whole.keys() == resumed.keys()
    for key in whole:
        torch.testing.assert_close(whole[key], resumed[key], rtol=0, atol=0, msg=key)
    losses = [[row["loss"] for row in read_metrics(f / f"{stage}-training/metrics.jsonl")] for f in (trained, tmp_path)]
    assert losses[0] == losses[1]
