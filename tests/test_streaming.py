"""Streamed decoding against the whole one: no plane may differ, whatever the chunks, and no seam may show."""

import pytest
import torch
from generative.networks.nets import AutoencoderKL as GenerativeAutoencoderKL
from monai.networks.nets import AutoencoderKL
from torch import nn

from ldm3d.errors import InputError
from ldm3d.models import planes, streaming
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.monai import MonaiAutoencoder
from ldm3d.models.streaming import decode_streamed
from ldm3d.pipeline import Pipeline

CHANNELS = {1: [6], 2: [6], 4: [4, 8], 8: [3, 6, 8]}
CHUNKS = (1, 2500, 6000, 10**9)  # bytes: from one plane at a time to all at once


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows as small as the chunks ask for; at these sizes they would all wait for the whole volume."""
    monkeypatch.setattr(planes, "ONEDNN_SIZE", 0)


def randomised(network, std=0.2):
    """Every parameter: a convolution that starts as zero, or a norm that changes nothing, would hide mistakes."""
    g = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std, generator=g)
    return network.eval().requires_grad_(False)


def latents(channels, *shape, n=1):
    return torch.randn(n, channels, *shape, generator=torch.Generator().manual_seed(2))


def differences(network, z, chunks=CHUNKS):
    """The largest difference to the whole decode, relative to its deviation, for each size of chunks."""
    whole = network.decode(z).float()
    assert whole.std() > 0.01, "a constant volume would hide mistakes"
    return [((decode_streamed(network, z, size) - whole).abs().max() / whole.std()).item() for size in chunks]


# Our own


@pytest.mark.parametrize("downsampling", [1, 2, 4, 8])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("linear_path", [False, True])
def test_our_decoder(downsampling, attention, linear_path):
    network = Autoencoder(3, downsampling, CHANNELS[downsampling], 2, attention, linear_path, in_channels=2)
    randomised(network)
    assert max(differences(network, latents(3, 5, 3, 4))) < 1e-5


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_few_planes_and_a_batch(planes):
    """Fewer planes than a convolution reaches; and two volumes at a time, which are not contiguous along X."""
    network = randomised(Autoencoder(3, 4, CHANNELS[4], 1))
    assert max(differences(network, latents(3, planes, 3, 2, n=2))) < 1e-5


@pytest.mark.parametrize("kind", ["ours", "monai"])
def test_half_precision(kind):
    network = randomised(Autoencoder(3, 4, CHANNELS[4], 2)) if kind == "ours" else monai_network("monai", (4, 8))
    network.bfloat16()
    z = latents(3, 6, 3, 4).bfloat16()
    exact = decode_streamed(network.float(), z.float())
    whole, streamed = network.bfloat16().decode(z).float(), decode_streamed(network, z, 2500)
    assert streamed.dtype == torch.float32
    # As far from float32 as the whole decode in half precision is, not further
    assert (streamed - exact).square().mean() < 1.2 * (whole - exact).square().mean()


# MONAI's, whose group normalisation looks at the whole volume

CONFIGURATIONS = {
    "plain": {"channels": (4, 8)},
    "three levels, two blocks": {"channels": (4, 8, 4), "num_res_blocks": (1, 2, 2)},
    "attention at a level": {"channels": (4, 8), "attention_levels": (False, True)},
    "attention in the middle": {"channels": (4, 4), "with_decoder_nonlocal_attn": True},
    "transposed convolution": {"channels": (8, 4), "use_convtranspose": True},
}


def monai_network(library, channels, **options):
    settings = {
        "spatial_dims": 3,
        "in_channels": 2,
        "out_channels": 2,
        "latent_channels": 3,
        "num_res_blocks": (1,) * len(channels),
        "attention_levels": (False,) * len(channels),
        "norm_num_groups": 2,
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
        **options,
    }
    if library == "monai":
        return randomised(AutoencoderKL(channels=channels, **settings))
    return randomised(GenerativeAutoencoderKL(num_channels=channels, **settings))


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("library", ["monai", "monai-generative"])
def test_decoders_of_both_libraries(library, name):
    network = monai_network(library, **CONFIGURATIONS[name])
    assert max(differences(network, latents(3, 5, 3, 4))) < 1e-5


@pytest.mark.parametrize("planes", [1, 2])
def test_few_planes_and_a_batch_of_monai(planes):
    network = monai_network("monai", (4, 8))
    assert max(differences(network, latents(3, planes, 3, 2, n=2))) < 1e-5


def test_double_precision():
    network = monai_network("monai", (4, 8)).double()
    z = latents(3, 5, 3, 4).double()
    torch.testing.assert_close(decode_streamed(network, z, 2500), network.decode(z).float(), rtol=1e-6, atol=1e-6)


def test_norm_of_values_far_from_zero():
    """The variance of large values with a small spread, where a mean of squares would lose every digit."""
    norm = randomised(nn.GroupNorm(2, 4))
    x = 1000 + 1e-2 * latents(4, 9, 5, 5)
    streamed = torch.cat(list(streaming._normalise(iter(x.split(2, dim=2)), norm, 1)), dim=2)
    torch.testing.assert_close(streamed.double(), norm.double()(x.double()), rtol=0, atol=0.02)


def test_wrapped_monai_network():
    network = randomised(MonaiAutoencoder(3, [4, 8], blocks=1, norm_num_groups=2, library="monai-generative"))
    assert max(differences(network, latents(3, 5, 3, 4))) < 1e-5


def test_chunks_of_a_size_give_the_same_bits():
    network, z = monai_network("monai", (4, 8)), latents(3, 5, 3, 4)
    assert torch.equal(decode_streamed(network, z, 2500), decode_streamed(network, z, 2500))


# What would go wrong


@pytest.mark.parametrize(
    "make", [lambda: randomised(Autoencoder(3, 4, CHANNELS[4], 1)), lambda: monai_network("monai", (4, 8))]
)
def test_a_lost_plane_is_noticed(make, monkeypatch):
    """Zeros in the place of the plane before each window, as if the volume began there."""
    windows = streaming.windows_of

    def forgetful(chunks, before, *arguments):
        for window in windows(chunks, before, *arguments):
            window[:, :, :before] = 0
            yield window

    monkeypatch.setattr(streaming, "windows_of", forgetful)
    assert min(differences(make(), latents(3, 5, 3, 4), (1, 2500))) > 1e-2


def test_unknown_layer():
    network = Autoencoder(3, 2, [4])
    network.decoder.append(nn.InstanceNorm3d(4))
    with pytest.raises(InputError, match=r"InstanceNorm3d cannot be streamed.*decode it whole"):
        decode_streamed(network, latents(3, 2, 2, 2))


# Through the pipeline


def test_pipeline_decodes_alike_either_way_and_says_which(caplog):
    autoencoder = randomised(Autoencoder(3, 4, CHANNELS[4], 1))
    autoencoder.latent_mean.fill_(0.3)
    unet = nn.Linear(1, 1)  # for its device and dtype; a decode asks it nothing
    pipeline = Pipeline(autoencoder, unet, schema=None, grid=None, process=None, target="velocity", decode_mode="streamed")
    z = latents(3, 5, 3, 4)
    expected = autoencoder.decode_stage_2_outputs(z).clamp(0, 1)
    assert 0 < expected.mean() < 1
    with caplog.at_level("INFO", logger="ldm3d"):
        for mode in ("streamed", "streamed", "whole", "auto"):
            pipeline.decode_mode = mode
            torch.testing.assert_close(pipeline.decode(z), expected, rtol=0, atol=1e-5)
    said = [record.getMessage().split(",")[0] for record in caplog.records]
    assert said == ["decoding streamed", "decoding whole", "decoding whole"], "once a plan, not once a volume"


def test_unknown_mode():
    pipeline = Pipeline(Autoencoder(3, 2, [4]), nn.Linear(1, 1), None, None, None, "velocity", decode_mode="tiles")
    with pytest.raises(InputError, match="'tiles' is not one of auto, whole, streamed"):
        pipeline.decode(latents(3, 2, 2, 2))


@pytest.mark.parametrize("mode", ["whole", "streamed"])
@pytest.mark.parametrize("kind", ["ours", "without linear path", "monai", "monai-generative"])
def test_half_precision_leaves_all_grey_values(kind, mode):
    """Voxels in bfloat16 would have 256 values above 0.25 at most, and histograms with teeth."""
    if kind in ("ours", "without linear path"):
        network = randomised(Autoencoder(3, 4, CHANNELS[4], 1, linear_path=kind == "ours"))
    else:
        network = MonaiAutoencoder(3, [4, 8], 1, norm_num_groups=2, library=kind)
        randomised(network)
    network.bfloat16()
    z = latents(3, 8, 8, 8).bfloat16()
    volume = network.decode(z) if mode == "whole" else decode_streamed(network, z, 2500)
    assert volume.dtype == torch.float32
    bright = volume[volume.abs() > 0.25 * volume.abs().max()]
    assert len(bright) > 1000
    assert len(bright.unique()) > 0.9 * len(bright)


def test_autocast_leaves_all_grey_values():
    """As in training, where weights are float32."""
    network = randomised(Autoencoder(3, 4, CHANNELS[4], 1))
    with torch.autocast("cpu", torch.bfloat16):
        volume = network.decode(latents(3, 8, 8, 8))
    assert len(volume.unique()) > 0.9 * volume.numel()
