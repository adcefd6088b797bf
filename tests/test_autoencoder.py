"""The autoencoder: its linear code against independent numpy, its shapes, its scale, its files."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import ndimage

from ldm3d.errors import InputError
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.blocks import depth_to_space, space_to_depth
from ldm3d.models.pretrained import weights_hash
from ldm3d.models.unet import UNet

CHANNELS = {1: [8], 2: [8], 4: [8, 12], 8: [8, 12, 16]}


def network(downsampling=4, latent_channels=4, seed=0, **options):
    torch.manual_seed(seed)
    return Autoencoder(latent_channels, downsampling, CHANNELS[downsampling], blocks=1, **options)


def randomised(module, std=0.2):
    g = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=g)
    return module


def smooth_volumes(n=6, shape=(16, 20, 12), channels=1, seed=0):
    """Volumes whose neighbouring voxels have to do with each other, in [0, 1]; no axis is like another."""
    noise = np.random.default_rng(seed).normal(size=(n, channels, *shape))
    volumes = ndimage.gaussian_filter(noise, (0, 0, 2.0, 1.5, 1.0))
    volumes = (volumes - volumes.min()) / (volumes.max() - volumes.min())
    return torch.from_numpy(volumes).float()


def psnr(a, b):
    return -10 * math.log10((a - b).square().mean().item())


# Voxels to channels


def test_space_to_depth_by_hand():
    """Two blocks of 2x2x2 along X; within a block Z runs fastest, as in memory."""
    x = torch.arange(4 * 2 * 2).reshape(1, 1, 4, 2, 2)
    deep = space_to_depth(x, 2)
    assert deep.shape == (1, 8, 2, 1, 1)
    assert deep[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert deep[0, :, 1, 0, 0].tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    # Along Z the halves interleave
    assert space_to_depth(torch.arange(16).reshape(1, 1, 2, 2, 4), 2)[0, :, 0, 0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    # Image channels stay together: all voxels of the first, then of the second
    two = torch.stack([torch.zeros(2, 2, 2), torch.ones(2, 2, 2)])[None]
    assert space_to_depth(two, 2).flatten().tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_depth_to_space_is_the_inverse(factor):
    x = torch.randn(2, 3, 2 * factor, 3 * factor, factor)
    deep = space_to_depth(x, factor)
    assert deep.shape == (2, 3 * factor**3, 2, 3, 1)
    assert torch.equal(depth_to_space(deep, factor), x)


def test_space_to_depth_is_a_strided_convolution():
    """The linear path relies on it: one channel of a block is one tap of a kernel."""
    x, factor = torch.randn(1, 2, 4, 6, 2), 2
    identity = torch.eye(2 * factor**3).reshape(-1, 2, factor, factor, factor)
    assert torch.equal(space_to_depth(x, factor), torch.nn.functional.conv3d(x, identity, stride=factor))


# Shapes


@pytest.mark.parametrize("downsampling", [1, 2, 4, 8])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("linear_path", [False, True])
def test_shapes(downsampling, attention, linear_path):
    net = randomised(network(downsampling, 3, attention=attention, linear_path=linear_path, in_channels=2))
    shape = (16, 8, 24) if downsampling > 1 else (4, 3, 5)
    latent = (3, *(n // downsampling for n in shape))
    x = torch.rand(2, 2, *shape)
    reconstruction, moments = net(x, torch.randn(2, *latent))
    assert moments.shape == (2, 6, *latent[1:])
    assert net.latent_shape(shape) == latent
    assert reconstruction.shape == x.shape
    assert torch.isfinite(reconstruction).all()


@pytest.mark.parametrize("downsampling, channels", [(3, [8]), (6, [8, 8]), (4, [8]), (4, [8, 8, 8]), (2, [])])
def test_levels_and_channels_must_agree(downsampling, channels):
    with pytest.raises(InputError, match="must be a power of two"):
        Autoencoder(4, downsampling, channels)


@pytest.mark.parametrize("shape", [(15, 16, 16), (16, 16, 18)])
def test_volume_that_does_not_divide(shape):
    with pytest.raises(InputError, match=r"\(1[56], 16, 1[68]\) must be divisible by the downsampling 4; crop or pad"):
        network().encode(torch.rand(1, 1, *shape))


# The linear path


def numpy_pca(volumes, f, c):
    """Blocks as rows, in another order than the code's; (rows, their reconstruction from c components)."""
    x = volumes.double().numpy()
    n, _, sx, sy, sz = x.shape
    rows = [
        x[i, :, a : a + f, b : b + f, d : d + f].ravel()
        for i in range(n)
        for a in range(0, sx, f)
        for b in range(0, sy, f)
        for d in range(0, sz, f)
    ]
    rows = np.array(rows)
    mean = rows.mean(axis=0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    return rows, mean + (rows - mean) @ axes[:c].T @ axes[:c]


def latent_rows(z):
    """(N, c, x, y, z) -> (positions, c) in the order of `numpy_pca`."""
    return z.permute(0, 2, 3, 4, 1).flatten(0, 3).double().numpy()


@pytest.mark.parametrize("f, c, channels", [(4, 4, 1), (2, 3, 1), (4, 6, 2), (1, 1, 2)])
def test_linear_path_encodes_principal_components(f, c, channels):
    volumes = smooth_volumes(channels=channels)
    net = network(f, c, in_channels=channels)
    net.fit_linear_path(volumes)
    with torch.no_grad():
        z = latent_rows(net.sample(net.encode(volumes)))
    # Unit variance and no correlation
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(c) if c > 1 else 1, atol=1e-3)
    # The best linear decoding of these latents is as good as the best that c components can do
    rows, projected = numpy_pca(volumes, f, c)
    design = np.column_stack([z, np.ones(len(z))])
    decoded = design @ np.linalg.lstsq(design, rows, rcond=None)[0]
    assert ((decoded - rows) ** 2).mean() == pytest.approx(((projected - rows) ** 2).mean(), rel=1e-3, abs=1e-10)


def test_linear_path_decodes_by_regression_from_a_latent_and_its_neighbours():
    """Against least squares in numpy, on a design matrix written out: 27 positions, zeros beyond the border, a constant."""
    volumes, f, c = smooth_volumes(n=12), 4, 2
    net = network(f, c)
    net.fit_linear_path(volumes, ridge=1e-12)
    with torch.no_grad():
        z = net.sample(net.encode(volumes))
        decoded = net.decode(z)
    padded = np.pad(z.double().numpy(), [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1)])
    x_, y_, z_ = z.shape[2:]
    near = [padded[:, :, i : i + x_, j : j + y_, k : k + z_] for i in range(3) for j in range(3) for k in range(3)]
    design = np.concatenate([*near, np.ones((len(z), 1, x_, y_, z_))], axis=1)
    design = design.transpose(0, 2, 3, 4, 1).reshape(-1, 27 * c + 1)
    rows, projected = numpy_pca(volumes, f, c)
    expected = design @ np.linalg.lstsq(design, rows, rcond=None)[0]
    found, _ = numpy_pca(decoded, f, c)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    # Neighbours help: blocks join better than from inverse principal components
    assert ((found - rows) ** 2).mean() < 0.9 * ((projected - rows) ** 2).mean()


def test_ridge_shrinks():
    volumes = smooth_volumes()
    weights = []
    for ridge in (1e-6, 1e-2, 1.0):
        net = network()
        net.fit_linear_path(volumes, ridge)
        weights.append(net.synthesis.weight.norm().item())
    assert weights[0] > weights[1] > weights[2] > 0


def test_more_latent_channels_are_better():
    volumes, unseen = smooth_volumes(n=8), smooth_volumes(n=2, seed=9)
    quality = []
    for c in (1, 2, 4, 8):
        net = network(4, c)
        net.fit_linear_path(volumes)
        with torch.no_grad():
            quality.append(psnr(net.decode(net.sample(net.encode(unseen))), unseen))
    assert all(more > less + 0.5 for less, more in pairwise(quality)), quality


def test_more_latent_channels_than_voxels_in_a_block():
    volumes = smooth_volumes(n=2, shape=(6, 5, 4))
    net = network(1, 3)
    net.fit_linear_path(volumes)
    with torch.no_grad():
        z = net.sample(net.encode(volumes))
        assert psnr(net.decode(z), volumes) > 40
    assert (z[:, 1:] == 0).all()


def test_constant_blocks_do_no_harm():
    """Background is most of a volume, and some components of it are exactly zero."""
    volumes = torch.zeros(2, 1, 16, 16, 16)
    volumes[:, :, 4:8, 4:12, 4:8] = 0.7
    net = network(4, 4)
    net.fit_linear_path(volumes)
    with torch.no_grad():
        reconstruction = net.decode(net.sample(net.encode(volumes)))
    assert torch.isfinite(reconstruction).all()
    assert psnr(reconstruction, volumes) > 25


def test_linear_path_is_reproducible():
    nets = [network(seed=seed) for seed in (1, 2)]
    for net in nets:
        net.fit_linear_path(smooth_volumes())
    assert torch.equal(nets[0].analysis.weight, nets[1].analysis.weight)


# The posterior


def test_posterior_starts_narrow():
    x = smooth_volumes(n=2)
    assert (network().encode(x).chunk(2, dim=1)[1] == -6).all()
    # Without the linear path the networks are not silent at the start, but about as narrow
    without = network(linear_path=False).encode(x).chunk(2, dim=1)[1]
    assert without.mean().item() == pytest.approx(-6, abs=1)


def test_sample_of_known_noise():
    moments = torch.cat([torch.full((1, 2, 1, 1, 1), 3.0), torch.full((1, 2, 1, 1, 1), 2 * math.log(0.5))], dim=1)
    noise = torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1, 1)
    assert Autoencoder.sample(moments, noise).flatten().tolist() == pytest.approx([4.0, 2.5])
    assert Autoencoder.sample(moments).flatten().tolist() == [3.0, 3.0]


def test_training_pass_is_encode_sample_decode():
    net = randomised(network()).double()
    x, noise = smooth_volumes(n=2).double(), torch.randn(2, 4, 4, 5, 3, dtype=torch.float64)
    reconstruction, moments = net(x, noise)
    mean, log_variance = net.encode(x).chunk(2, dim=1)
    torch.testing.assert_close(moments, torch.cat([mean, log_variance], dim=1))
    torch.testing.assert_close(reconstruction, net.decode(mean + (log_variance / 2).exp() * noise))


# The scale


def test_normalise_and_its_inverse():
    net = network(latent_channels=2)
    net.latent_mean.copy_(torch.tensor([1.0, -2.0]))
    net.latent_std.copy_(torch.tensor([2.0, 0.5]))
    z = torch.tensor([5.0, -1.0]).reshape(1, 2, 1, 1, 1)
    assert net.normalise(z).flatten().tolist() == [2.0, 2.0]
    z = torch.randn(2, 2, 3, 4, 5)
    torch.testing.assert_close(net.denormalise(net.normalise(z)), z)
    torch.testing.assert_close(net.normalise(net.denormalise(z)), z)


def test_names_that_monai_calls_see_normalised_latents():
    net = randomised(network())
    net.latent_mean.fill_(0.3)
    net.latent_std.fill_(4.0)
    x = smooth_volumes(n=1)
    z = net.encode_stage_2_inputs(x)
    torch.testing.assert_close(z, (net.sample(net.encode(x)) - 0.3) / 4)
    torch.testing.assert_close(net.decode_stage_2_outputs(z), net.decode(net.sample(net.encode(x))), atol=1e-4, rtol=1e-4)


# Locality


@pytest.mark.parametrize("attention", [False, True])
def test_part_decodes_like_the_whole(attention):
    """No statistics over a volume, so tiles join without seams; attention gives that up."""
    net = randomised(network(attention=attention)).double()
    z = torch.randn(1, 4, 18, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        whole, part = net.decode(z), net.decode(z[:, :, 3:16])
    # Reach of 5 latents: 1 + 2 convolutions on the latent grid, 2 + 1 on the one of half its spacing
    same = torch.allclose(part[:, :, 5 * 4 : 8 * 4], whole[:, :, 8 * 4 : 11 * 4], atol=1e-10)
    assert same != attention
    assert not torch.allclose(part[:, :, :4], whole[:, :, 12:16]), "the border does differ: the comparison is not of constants"


def test_part_encodes_like_the_whole():
    net = randomised(network()).double()
    x = torch.rand(1, 1, 8, 72, 8, dtype=torch.float64)
    with torch.no_grad():
        whole, part = net.encode(x), net.encode(x[:, :, :, 8:])
    torch.testing.assert_close(part[:, :, :, 5:], whole[:, :, :, 7:], atol=1e-10, rtol=0)


def test_samples_of_a_batch_do_not_mix():
    net = randomised(network(attention=True)).double()
    x = torch.rand(3, 1, 8, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net.encode(x)[1:2], net.encode(x[1:2]))


# Training


@pytest.mark.parametrize("linear_path", [False, True])
def test_a_few_steps_lower_the_loss(linear_path):
    volumes = smooth_volumes(n=4)
    net = network(linear_path=linear_path)
    if linear_path:
        net.fit_linear_path(volumes)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-4 if linear_path else 3e-3)  # the linear path is nearly there
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(30):
        reconstruction, _ = net(volumes, torch.randn(4, 4, 4, 5, 3, generator=g))
        loss = (reconstruction - volumes).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in net.parameters()), "distributed training asks for every gradient"
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# Files


@pytest.fixture
def saved(tmp_path):
    net = randomised(network(attention=True))
    net.latent_mean.copy_(torch.arange(4.0))
    net.latent_std.fill_(1.5)
    net.save_pretrained(tmp_path / "autoencoder")
    return net, tmp_path / "autoencoder"


def test_save_and_load(saved):
    net, folder = saved
    again = Autoencoder.from_pretrained(folder)
    x = smooth_volumes(n=1)
    with torch.no_grad():
        assert torch.equal(again.encode(x), net.encode(x))
        assert torch.equal(
            again.decode_stage_2_outputs(torch.ones(1, 4, 2, 2, 2)), net.decode_stage_2_outputs(torch.ones(1, 4, 2, 2, 2))
        )
    assert again.latent_mean.tolist() == [0, 1, 2, 3]
    assert again.latent_std.tolist() == [1.5] * 4
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert again.arguments == net.arguments


def test_files_hold_no_code(saved):
    _, folder = saved
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert "latent_mean" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["class"] == "Autoencoder"


def test_saved_in_its_own_precision(saved, tmp_path):
    net, folder = saved
    assert Autoencoder.from_pretrained(folder, dtype=torch.bfloat16).to_voxels.weight.dtype == torch.bfloat16
    net.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert Autoencoder.from_pretrained(tmp_path / "half").to_voxels.weight.dtype == torch.bfloat16


def test_other_class(saved):
    with pytest.raises(InputError, match="holds weights of Autoencoder, not of UNet"):
        UNet.from_pretrained(saved[1])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved, name):
    (saved[1] / name).unlink()
    with pytest.raises(InputError, match=f"holds no Autoencoder: {name} is missing"):
        Autoencoder.from_pretrained(saved[1])


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(saved, keep):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Autoencoder.from_pretrained(saved[1])


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"class": "Autoencoder"}'])
def test_damaged_config(saved, text):
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        Autoencoder.from_pretrained(saved[1])


def change_arguments(folder, **changes):
    description = json.loads((folder / "config.json").read_text())
    description["arguments"].update(changes)
    (folder / "config.json").write_text(json.dumps(description))


def test_weights_of_another_shape(saved):
    change_arguments(saved[1], channels=[8, 16], attention=False)
    with pytest.raises(InputError, match=r"of another configuration: .*is \(\d.*\) instead of \(\d.* and \d+ more"):
        Autoencoder.from_pretrained(saved[1])


def test_weights_with_other_names(saved):
    change_arguments(saved[1], linear_path=False)
    with pytest.raises(InputError, match=r"analysis\.bias is unknown"):
        Autoencoder.from_pretrained(saved[1])


def test_config_of_another_version(saved):
    change_arguments(saved[1], colour="grey")
    with pytest.raises(InputError, match=r"written by another version of ldm3d, or is damaged: .*colour"):
        Autoencoder.from_pretrained(saved[1])


def test_hash_changes_with_any_weight_or_setting(saved, tmp_path):
    net, folder = saved
    first = weights_hash(folder)
    net.save_pretrained(tmp_path / "copy")
    assert weights_hash(tmp_path / "copy") == first
    with torch.no_grad():
        net.latent_std[2] += 1e-3
    net.save_pretrained(tmp_path / "copy")
    assert weights_hash(tmp_path / "copy") != first
    change_arguments(folder, blocks=2)
    assert weights_hash(folder) != first
