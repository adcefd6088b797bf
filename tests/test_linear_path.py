"""The training of the linear path alone, before that of the networks."""

import torch

from ldm3d.models.autoencoder import Autoencoder
from ldm3d.training.linear_path import VOLUMES, train_linear_path, volumes_for


def waves(n=6, shape=(16, 20, 12), seed=0):
    """Smooth random volumes, in which a block's neighbours say much about it."""
    noise = torch.randn(n, 1, *shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(4):
        noise = torch.nn.functional.avg_pool3d(noise, 3, stride=1, padding=1)
    return 0.5 + noise / noise.std() / 6


def error(network, volumes):
    with torch.no_grad():
        return (network.through_linear_path(volumes) - volumes).square().mean().item()


def trained(steps=300):
    torch.manual_seed(1)
    network = Autoencoder(2, 4, [8, 8], blocks=1)
    train_linear_path(network, waves(), steps, seed=0)
    return network


def test_beats_principal_components_on_new_volumes():
    closed_form, network = Autoencoder(2, 4, [8, 8], blocks=1), trained()
    closed_form.fit_linear_path(waves())
    new = waves(seed=1)
    assert error(network, new) < 0.9 * error(closed_form, new)
    assert network.analysis.weight[:, :, 0].abs().max() > 0, "the analysis looks at neighbours, too"


def test_is_reproducible_and_touches_nothing_else():
    first, second = trained(30).state_dict(), trained(30).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    fresh = Autoencoder(2, 4, [8, 8], blocks=1).state_dict()
    assert {name for name in fresh if not torch.equal(fresh[name], first[name])} == {
        f"{part}.{kind}" for part in ("analysis", "synthesis") for kind in ("weight", "bias")
    }


def test_networks_start_as_no_correction_to_it():
    network, volume = trained(30), waves(1)
    with torch.no_grad():
        again = network.decode(network.sample(network.encode(volume)))
    torch.testing.assert_close(again, network.through_linear_path(volume))


def test_number_of_volumes_follows_from_their_size():
    assert volumes_for((56, 72, 56)) == VOLUMES
    assert 4 <= volumes_for((160, 224, 160)) < 10
    assert volumes_for((512, 512, 512)) == 4
