"""Weights' gradients in bfloat16 on grids with sides smaller than the kernel, where oneDNN's own are wrong on some CPUs."""

import pytest
import torch
from torch import nn

from ldm3d.config.training import TrainingConfig
from ldm3d.models.convolutions import PaddedConv3d, mend_convolutions
from ldm3d.models.unet import UNet
from ldm3d.training.task import Trained


def gradient(conv: nn.Module, x: torch.Tensor, toward: torch.Tensor, half: bool) -> torch.Tensor:
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = conv(x)
    (y.float() * toward).sum().backward()
    return conv.weight.grad.clone()


@pytest.mark.parametrize(("kernel", "side"), [(3, 1), (3, 2), (3, 3), (5, 2), (5, 4), (5, 5)])
def test_gradients_in_bfloat16_are_those_in_float32(side, kernel):
    """Within four roundings of bfloat16, 2^-9 each; a wrong one is off by its own size, or NaN."""
    torch.manual_seed(0)
    conv = nn.Conv3d(16, 16, kernel, padding=kernel // 2)
    x = torch.randn(2, 16, side, 5, 4)
    toward = torch.randn(2, 16, side, 5, 4)
    mend_convolutions(conv)
    for _ in range(4):  # what lies in memory beside the input varies
        junk = torch.full((2**18,), float("nan"))
        del junk
        exact, found = gradient(conv, x, toward, half=False), gradient(conv, x, toward, half=True)
        assert (found - exact).norm() < 4 * 2**-9 * exact.norm()


def test_nothing_else_changes():
    torch.manual_seed(0)
    plain, mended = (nn.Conv3d(4, 4, 3, padding=1) for _ in range(2))
    mended.load_state_dict(plain.state_dict())
    mend_convolutions(mended)
    assert type(mended) is PaddedConv3d
    for shape in ((2, 4, 2, 5, 4), (1, 4, 6, 5, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(mended(x), plain(x), rtol=0, atol=0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(mended(x), plain(x), rtol=2**-7, atol=2**-7)


def test_every_network_that_is_trained_is_mended():
    network = UNet(2, 2, [0], [8, 16], 1, [False, False], context_dim=4)
    Trained.of(network, TrainingConfig(steps=1, batch_size=1, learning_rate=1e-3))
    padded = [m for m in network.modules() if isinstance(m, nn.Conv3d) and any(m.padding) and m.stride[0] == 1]
    assert padded and all(type(m) is PaddedConv3d for m in padded)
    assert list(network.state_dict()) == list(UNet(2, 2, [0], [8, 16], 1, [False, False], context_dim=4).state_dict())
