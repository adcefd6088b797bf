"""The U-Net: any latent size, what its output depends on and what it must not depend on."""

import importlib
from itertools import product

import pytest
import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

from ldm3d.errors import InputError
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.blocks import sinusoidal_embedding
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import UNet, pad_to, pad_to_even

pytestmark = pytest.mark.filterwarnings("ignore:`torch.cuda.amp:FutureWarning")  # monai-generative, as it is imported

CATEGORIES = [0, 3, 0]  # continuous, one of three, continuous


def network(num_categories=CATEGORIES, seed=0, start=False, **options):
    """A small U-Net in float64; every parameter random, unless it is to be as it starts."""
    torch.manual_seed(seed)
    arguments = {"channels": [8, 12], "blocks": 1, "attention": [False, True], "head_channels": 4, "context_dim": 6}
    net = UNet(2, 2, num_categories, **{**arguments, **options}).double()
    if not start:
        g = torch.Generator().manual_seed(seed + 1)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=g)
    return net


def latent(n=2, size=(4, 6, 3)):
    return torch.randn(n, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def context(*rows):
    """Rows of (value or None) a covariate -> (N, K, 2)."""
    return torch.tensor([[(0.0, 0.0) if v is None else (float(v), 1.0) for v in row] for row in rows], dtype=torch.float64)


TIME = torch.tensor([0.3, 0.8], dtype=torch.float64)
GIVEN = context((0.5, 1, -1.0), (-0.7, 2, 0.2))


# Shapes


@pytest.mark.parametrize("size", [(4, 4, 4), (15, 18, 15), (5, 7, 3), (10, 12, 10), (1, 2, 1)])
def test_any_latent_size(size):
    net = network(channels=[4, 4, 8], attention=[False, False, True], blocks=2)
    with torch.no_grad():
        out = net(latent(1, size), TIME[:1], GIVEN[:1])
    assert out.shape == (1, 2, *size)
    assert torch.isfinite(out).all()


def test_odd_sides_double_their_last_plane():
    x = torch.arange(6.0).reshape(1, 1, 3, 1, 2)
    padded = pad_to_even(x)
    assert padded.shape == (1, 1, 4, 2, 2)
    assert padded[0, 0, :, 0].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5]]
    assert torch.equal(padded[..., 0, :], padded[..., 1, :])
    assert pad_to_even(x[:, :, :2].expand(1, 1, 2, 2, 2)).shape == (1, 1, 2, 2, 2)


@pytest.mark.parametrize(
    "blocks, attention", list(product([1, 2], [(False, False, False), (True, False, False), (True, True, True)]))
)
def test_levels_and_blocks(blocks, attention):
    net = network(channels=[4, 8, 4], blocks=blocks, attention=attention)
    assert net(latent(), TIME, GIVEN).shape == (2, 2, 4, 6, 3)


def images(n=2, channels=3, size=(4, 6, 3)):
    return torch.randn(n, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def all_known(image):
    return image.new_ones(*image.shape[:2], 1, 1, 1)


def test_images_change_nothing_at_first_and_are_learned():
    """A trained network that is given images starts with its own answers, and gradients reach the new weights."""
    old = network()
    new = old.with_images(3)
    given = Conditions(GIVEN, images(), all_known(images()))
    out = new(latent(), TIME, given)
    assert torch.equal(out, old(latent(), TIME, GIVEN))
    out.square().mean().backward()
    assert new.conv_images.weight.grad.abs().amax(dim=(0, 2, 3, 4)).min() > 0  # of each image, and of each flag
    assert new.arguments["image_channels"] == 3 and old.arguments["image_channels"] == 0


def test_images_of_many_channels_are_mixed_before_neighbours_are_looked_at():
    """It starts as the old network, too; once the second weights move, each image and each flag has its say."""
    old, many = network(), images(channels=40)
    wide, given = old.with_images(40), Conditions(GIVEN, many, torch.rand_like(many))
    assert wide.arguments["image_width"] == 32 and wide.conv_images.weight.shape[1] == 32
    assert torch.equal(wide(latent(), TIME, given), old(latent(), TIME, GIVEN))
    torch.nn.init.normal_(wide.conv_images.weight, std=0.1)
    wide(latent(), TIME, given).square().sum().backward()
    assert wide.mix_images.weight.grad.abs().amax(dim=(0, 2, 3, 4)).min() > 0


@pytest.mark.parametrize("blocks", [[1, 3], 2])
def test_blocks_change_nothing_at_first_and_are_learned(blocks):
    old = network(blocks=1, attention=[True, True])
    new = old.with_blocks(blocks)
    out = new(latent(), TIME, GIVEN)
    torch.testing.assert_close(out, old(latent(), TIME, GIVEN), rtol=1e-12, atol=1e-12)
    out.square().mean().backward()
    assert new.down[1][1].residual.conv2.weight.grad.abs().min() > 0
    assert new.up[1][1].transformer.cross_attention.out.weight.grad.abs().max() > 0
    assert new.arguments["blocks"] == blocks and old.arguments["blocks"] == 1 and old.with_blocks([1, 1]) is old
    with pytest.raises(InputError, match="blocks can be added, not taken away"):
        new.with_blocks(1)


def test_images_are_stacked_behind_the_latent():
    """One convolution over all channels has the same answer."""
    net = network(image_channels=3)
    given = Conditions(GIVEN, images(), all_known(images()))
    stacked = torch.cat([latent(), images(), torch.ones_like(images())], dim=1)
    wide = UNet(8, 2, **{k: v for k, v in net.arguments.items() if k not in ("in_channels", "out_channels", "image_channels")})
    weights = net.state_dict()
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], weights.pop("conv_images.weight")], dim=1)
    wide.double().load_state_dict(weights)
    torch.testing.assert_close(net(latent(), TIME, given), wide(stacked, TIME, GIVEN))


@pytest.mark.parametrize("content", [1.0, torch.nan])
def test_an_image_that_is_not_known_has_no_influence(content):
    net, known = (
        network(image_channels=3),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(2, -1, 1, 1, 1),
    )
    other = images().clone()
    other[:, 1] = content
    assert torch.equal(
        net(latent(), TIME, Conditions(GIVEN, images(), known)), net(latent(), TIME, Conditions(GIVEN, other, known))
    )
    other[:, 0] += 1
    assert not torch.equal(
        net(latent(), TIME, Conditions(GIVEN, images(), known)), net(latent(), TIME, Conditions(GIVEN, other, known))
    )
    opened = Conditions(GIVEN, images(), known).open([], images=True)
    assert torch.equal(net(latent(), TIME, opened), net(latent(), TIME, GIVEN))


def test_images_are_padded_as_the_latent_is_and_known_may_be_a_mask():
    net, size = network(image_channels=3), (5, 6, 3)
    mask = (images() > 0).double()
    padded = latent(size=size)
    whole = net(padded, TIME, Conditions(GIVEN, pad_to(images(), size), pad_to(mask, size)))
    assert torch.equal(net(padded, TIME, Conditions(GIVEN, images(), mask)), whole)


def test_images_for_a_network_that_takes_none_or_others_are_refused():
    given = Conditions(GIVEN, images(), all_known(images()))
    for net, message in ((network(), "takes no images"), (network(image_channels=2), "takes 2")):
        with pytest.raises(InputError, match=f"images of 3 channels; this network {message}"):
            net(latent(), TIME, given)


def test_one_attention_flag_a_level():
    with pytest.raises(InputError, match="one flag for each"):
        UNet(2, 2, [], [8, 16], 1, [True])


def test_starts_at_zero():
    """The first step then learns from the target alone."""
    assert (network(start=True)(latent(), TIME, GIVEN) == 0).all()


def test_save_and_load(tmp_path):
    net = network(tokens_per_covariate=2, activation_checkpointing=True)
    net.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path, dtype=torch.float64)
    # from_pretrained builds in float32
    torch.testing.assert_close(again(latent(), TIME, GIVEN), net(latent(), TIME, GIVEN), atol=1e-3, rtol=1e-3)
    assert again.arguments == net.arguments


# What the output depends on


@pytest.mark.parametrize("in_time_embedding", [True, False])
def test_depends_on_every_value_presence_and_time(in_time_embedding):
    net = network(covariates_in_time_embedding=in_time_embedding)
    x, time = latent(1), TIME[:1]
    base = (0.5, 1, -1.0)
    others = {
        "first value": (0.6, 1, -1.0),
        "category": (0.5, 2, -1.0),
        "third value": (0.5, 1, -1.1),
        "first left open": (None, 1, -1.0),
        "category left open": (0.5, None, -1.0),
        "third left open": (0.5, 1, None),
        "two exchanged": (-1.0, 1, 0.5),
    }
    with torch.no_grad():
        out = net(x, time, context(base))
        for name, row in others.items():
            assert (net(x, time, context(row)) - out).abs().max() > 1e-4, name
        assert (net(x, time + 0.01, context(base)) - out).abs().max() > 1e-4
        assert (net(x + 0.01, time, context(base)) - out).abs().max() > 1e-4


@pytest.mark.parametrize("k", range(3))
def test_left_open_is_not_the_value_zero(k):
    """0 is the mean of a continuous covariate and the first category: an answer of its own."""
    zero, left_open = [0.1, 1, 0.2], [0.1, 1, 0.2]
    zero[k], left_open[k] = 0, None
    net = network()
    with torch.no_grad():
        difference = net(latent(1), TIME[:1], context(zero)) - net(latent(1), TIME[:1], context(left_open))
    assert difference.abs().max() > 1e-4


def test_value_behind_a_dropped_covariate_has_no_influence():
    net = network()
    dropped = GIVEN.clone()
    dropped[..., 1] = 0
    assert torch.equal(net(latent(), TIME, dropped), net(latent(), TIME, torch.zeros_like(dropped)))


def test_no_context_leaves_all_open():
    net = network()
    assert torch.equal(net(latent(), TIME), net(latent(), TIME, context((None,) * 3, (None,) * 3)))


def test_attention_to_covariates_differs_from_place_to_place():
    """With scale and shift alone a covariate would act on all positions of a constant latent alike."""
    net = network(covariates_in_time_embedding=False)
    x = latent(1, (8, 8, 8))
    with torch.no_grad():
        effect = net(x, TIME[:1], GIVEN[:1]) - net(x, TIME[:1], GIVEN[1:])
    assert effect.std(dim=(2, 3, 4)).min() > 1e-3


def test_samples_of_a_batch_do_not_mix():
    net = network()
    with torch.no_grad():
        together = net(latent(), TIME, GIVEN)
        for i in range(2):
            alone = net(latent()[i : i + 1], TIME[i : i + 1], GIVEN[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1])


def test_random_numbers_play_no_part():
    net = network()
    assert torch.equal(net(latent(), TIME, GIVEN), net(latent(), TIME, GIVEN))


# Time


def test_sinusoidal_embedding_by_hand():
    t = torch.tensor([0.0, 3.0])
    embedded = sinusoidal_embedding(t, 4, max_period=100.0)  # frequencies 1 and 1/10
    expected = torch.stack([torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([3.0, 0.3, 3.0, 0.3])])
    expected[1] = torch.cat([expected[1, :2].cos(), expected[1, 2:].sin()])
    torch.testing.assert_close(embedded, expected)


@pytest.mark.parametrize("k", [0, 1, 250, 999])
def test_whole_timesteps_may_be_integers(k):
    net = network()
    with torch.no_grad():
        whole = net(latent(), torch.tensor([k, k]), GIVEN)
        part = net(latent(), torch.full((2,), k, dtype=torch.float64), GIVEN)
    torch.testing.assert_close(whole, part, atol=1e-4, rtol=1e-4)


# Gradients


@pytest.mark.parametrize("options", [{}, {"covariates_in_time_embedding": False}, {"tokens_per_covariate": 2}])
def test_every_parameter_learns(options):
    """Each covariate present in one sample and open in another: nothing may be left for find_unused_parameters."""
    net = network(**options)
    loss = (net(latent(4), TIME.repeat(2), context((1, 0, None), (None, 1, 2), (0.3, 2, None), (1, None, 1))) ** 2).mean()
    loss.backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_every_parameter_has_a_gradient_even_when_nothing_is_given():
    """DistributedDataParallel waits for all of them in every step."""
    net = network()
    net(latent(), TIME).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_activation_checkpointing_changes_nothing():
    nets = [network(activation_checkpointing=on) for on in (False, True)]
    outputs = [net(latent(), TIME, GIVEN) for net in nets]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().mean().backward()
    for (name, plain), (_, checkpointed) in zip(nets[0].named_parameters(), nets[1].named_parameters()):
        torch.testing.assert_close(plain.grad, checkpointed.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_weights_have_the_names_that_saved_models_know():
    names = network(channels=[4, 8], blocks=2, head_channels=4).state_dict().keys()
    for side in ("down", "up"):
        assert {n.split(".residual")[0] for n in names if n.startswith(side) and ".residual" in n} == {
            f"{side}.{level}.{block}" for level in range(2) for block in range(2)
        }
    assert "down.1.0.transformer.cross_attention.query.weight" in names


def test_activation_checkpointing_recomputes():
    net = network(activation_checkpointing=True)
    calls, blocks = [], [block for level in (*net.down, *net.up) for block in level]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    out = net(latent(), TIME, GIVEN)
    forward = len(calls)
    out.sum().backward()
    assert forward == len(blocks) == 4
    assert len(calls) == 2 * forward


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_backends_agree(backend):
    torch.testing.assert_close(
        network(attention_backend=backend)(latent(), TIME, GIVEN), network(attention_backend="math")(latent(), TIME, GIVEN)
    )


# Other shapes of conditioning


def test_unconditional():
    net = network(num_categories=[])
    out = net(latent(), TIME)
    assert out.shape == (2, 2, 4, 6, 3)
    assert torch.equal(net(latent(), TIME, torch.zeros(2, 0, 2, dtype=torch.float64)), out)
    assert not any("cross" in name or "token" in name for name, _ in net.named_parameters())
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_two_tokens_a_covariate():
    net = network(tokens_per_covariate=2)
    tokens = net.tokens(GIVEN)
    assert tokens.shape == (2, 6, 6)
    # Tokens 2k and 2k + 1 are covariate k's
    changed = GIVEN.clone()
    changed[:, 1, 0] = 0
    differs = (net.tokens(changed) != tokens).any(dim=-1)
    assert differs.tolist() == [[False, False, True, True, False, False]] * 2
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])
    assert net(latent(), TIME, GIVEN).shape == (2, 2, 4, 6, 3)


def test_tokens_by_hand():
    """A category is its row of the table; what is open is the null token of its covariate."""
    tokens = network().tokens
    found = tokens(context((None, 2, None)))[0]
    assert torch.equal(found, torch.stack([tokens.null[0], tokens.embed[1].weight[2], tokens.null[2]]))


# MONAI's inferers


SCHEDULERS = [DDPMScheduler, DDIMScheduler]


@pytest.fixture(params=["monai", "generative"])
def inferer(request):
    """LatentDiffusionInferer of MONAI's core, and of monai-generative before it."""
    return importlib.import_module(f"{request.param}.inferers").LatentDiffusionInferer


def pair():
    """An autoencoder with a scale of its own, and a U-Net, both in float32."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(2, 2, [8], blocks=1)
    autoencoder.fit_linear_path(torch.rand(2, 1, 8, 12, 6))
    autoencoder.latent_mean.copy_(torch.tensor([1.0, -1.0]))
    autoencoder.latent_std.copy_(torch.tensor([2.0, 3.0]))
    return autoencoder.eval(), network().float().eval()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_monai_trains_our_networks(inferer, scheduler):
    autoencoder, unet = pair()
    schedule = scheduler(num_train_timesteps=1000, clip_sample=False)
    volumes, noise = torch.rand(2, 1, 8, 12, 6), torch.randn(2, 2, 4, 6, 3)
    times, given = torch.tensor([10, 900]), GIVEN.float()
    predicted = inferer(schedule, scale_factor=1.0)(
        inputs=volumes, autoencoder_model=autoencoder, diffusion_model=unet, noise=noise, timesteps=times, condition=given
    )
    assert predicted.shape == noise.shape
    z = autoencoder.normalise(autoencoder.sample(autoencoder.encode(volumes)))
    alpha = schedule.alphas_cumprod[times].reshape(2, 1, 1, 1, 1)
    expected = unet(alpha.sqrt() * z + (1 - alpha).sqrt() * noise, times, given)
    torch.testing.assert_close(predicted, expected, atol=1e-3, rtol=1e-3)


class Recorder(torch.nn.Module):
    """Passes calls on and keeps what was asked and answered."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, []

    def forward(self, x, timesteps, context=None):
        out = self.net(x, timesteps=timesteps, context=context)
        self.calls.append((x, timesteps, context, out))
        return out


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_monai_samples_from_our_networks(inferer, scheduler):
    autoencoder, unet = pair()
    recorder, schedule = Recorder(unet), scheduler(num_train_timesteps=1000, clip_sample=False)
    schedule.set_timesteps(num_inference_steps=4)
    with torch.no_grad():
        volumes = inferer(schedule, scale_factor=1.0).sample(
            input_noise=torch.randn(2, 2, 4, 6, 3),
            autoencoder_model=autoencoder,
            diffusion_model=recorder,
            scheduler=schedule,
            conditioning=GIVEN.float(),
            verbose=False,
        )
    assert volumes.shape == (2, 1, 8, 12, 6)
    assert torch.isfinite(volumes).all()
    assert len(recorder.calls) == 4
    assert all(out.shape == (2, 2, 4, 6, 3) for *_, out in recorder.calls)


def test_monai_samples_at_the_times_it_means(inferer):
    """MONAI's training call gives integer timesteps, its `sample` the same numbers as floats."""
    autoencoder, unet = pair()
    recorder, schedule = Recorder(unet), DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    schedule.set_timesteps(num_inference_steps=4)
    with torch.no_grad():
        inferer(schedule, scale_factor=1.0).sample(
            input_noise=torch.randn(2, 2, 4, 6, 3),
            autoencoder_model=autoencoder,
            diffusion_model=recorder,
            scheduler=schedule,
            conditioning=GIVEN.float(),
            verbose=False,
        )
        for (x, _, given, out), k in zip(recorder.calls, schedule.timesteps):
            torch.testing.assert_close(out, unet(x, torch.stack([k, k]), given), atol=1e-3, rtol=1e-3)


def test_a_level_may_have_a_number_of_blocks_of_its_own(tmp_path):
    net = network(channels=[4, 8], blocks=[1, 3], head_channels=4, start=True)
    assert [len(level) for level in (*net.down, *net.up)] == [1, 3, 1, 3]
    net.save_pretrained(tmp_path)
    again, times = UNet.from_pretrained(tmp_path), torch.tensor([100.0, 900.0])
    assert torch.equal(again(latent(), times), net(latent(), times))
    with pytest.raises(InputError, match=r"blocks \[1, 2, 3\] needs one number for each"):
        network(channels=[4, 8], blocks=[1, 2, 3], head_channels=4)
