"""Operators of volumes: each with its transpose, and known answers."""

import pytest
import torch

from ldm3d.diffusion.operators import (
    FWHM,
    Along,
    Chain,
    Identity,
    Measured,
    Sampled,
    Scaled,
    between,
    bias_field,
    blur,
    cubic_between,
    mask,
    missing,
    slices,
)
from ldm3d.errors import InputError

SHAPE = (7, 9, 8)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turned():
    """A lattice that is turned about Z, shifted, coarser, and averaged over three points of each sample."""
    matrix = torch.tensor([[1.2, -0.5, 0, 1], [0.5, 1.2, 0, -1], [0, 0, 2.0, 0.3], [0, 0, 0, 1]])
    steps = torch.tensor([[0, 0, -0.3], [0, 0, 0], [0, 0, 0.3]])
    return Sampled(matrix, SHAPE, (5, 6, 4), steps, torch.tensor([0.25, 0.5, 0.25]))


OPERATORS = {
    "identity": Identity(),
    "mask": mask(random(*SHAPE) > 0),
    "missing slices": missing(SHAPE, 1, [2, 3]),
    "blur": blur(2, 8, 2.5),
    "slices": slices(1, 9, 3, profile="box"),
    "slices with a gap": slices(0, 7, 1.5, 2),
    "bias": bias_field(SHAPE, 0.3 * random(2, 3, 2).float()),
    "another lattice": turned(),
    "chain": Chain(blur(0, 7, 2), bias_field(SHAPE, torch.ones(2, 1, 1)), slices(2, 8, 2), missing((7, 9, 4), 0, [1])),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("before", [(), (1,), (2, 3)])
def test_transpose_is_the_transpose(name, before):
    operator = OPERATORS[name]
    x = random(*before, *SHAPE)
    image = operator(x)
    y = random(*image.shape, seed=1)
    back = operator.transpose(y)
    assert back.shape == x.shape
    torch.testing.assert_close((image * y).sum(), (x * back).sum(), rtol=1e-6, atol=1e-6)


def test_a_volume_of_one_value_keeps_it_in_slices_and_blurs():
    for operator in (blur(0, 7, 3), slices(0, 7, 2, 3, "box"), slices(0, 7, 2.5)):
        torch.testing.assert_close(operator(torch.ones(1, *SHAPE)), torch.ones(1, operator.matrix.shape[0], 9, 8))


def test_box_slices_are_means_of_their_voxels():
    x = random(*SHAPE)
    torch.testing.assert_close(slices(2, 8, 2, profile="box")(x), x.unflatten(2, (4, 2)).mean(3), rtol=1e-5, atol=1e-6)
    third = slices(1, 9, 3, profile="box")(x)  # three voxels, and the middle of the second slice is that of the volume
    torch.testing.assert_close(third[:, 1], x[:, 3:6].mean(1), rtol=1e-5, atol=1e-6)


def test_width_of_a_blur():
    """A point's image has the Gaussian's variance, plus that of a voxel's box, 1/12."""
    point = torch.zeros(1, 1, 61)
    point[..., 30] = 1
    image = blur(2, 61, 8.0)(point)[0, 0].double()
    variance = (image * (torch.arange(61) - 30.0) ** 2).sum()
    assert variance == pytest.approx((8 / FWHM) ** 2 + 1 / 12, rel=1e-3)


def test_another_lattice_with_whole_shifts_copies_voxels():
    matrix = torch.eye(4)
    matrix[:3, 3] = torch.tensor([1.0, 2.0, 0.0])
    x = random(*SHAPE).float()
    torch.testing.assert_close(Sampled(matrix, SHAPE, (5, 6, 8))(x), x[1:6, 2:8])


def test_a_way_back_from_slices():
    """A ramp is a ramp again, but for the outermost half slices."""
    ramp = torch.arange(12.0).expand(1, 1, 12)
    middles = torch.tensor([0.5, 2.5, 4.5, 6.5, 8.5, 10.5], dtype=torch.float64)
    back = between(2, middles, 12)(slices(2, 12, 2, profile="box")(ramp))
    torch.testing.assert_close(back[0, 0, 1:11], torch.arange(1.0, 11))
    assert between(2, middles[:1], 3)(torch.full((1, 1, 1), 4.0)).tolist() == [[[4, 4, 4]]]


def test_cubic_interpolation_keeps_what_is_quadratic():
    """Keys's kernel is exact for parabolas away from the ends; the linear way back is not."""
    middles = 1.5 + 3 * torch.arange(8, dtype=torch.float64)
    parabola = lambda x: (0.3 * x**2 - 2 * x + 1).float()[None, :, None, None].expand(1, -1, 2, 2)  # noqa: E731
    samples, truth = parabola(middles), parabola(torch.arange(24, dtype=torch.float64))
    cubic, linear = cubic_between(0, middles, 24)(samples), between(0, middles, 24)(samples)
    torch.testing.assert_close(cubic[:, 5:19], truth[:, 5:19], rtol=1e-5, atol=1e-4)
    assert (linear - truth)[:, 5:19].abs().max() > 0.3
    ones = torch.ones(1, 8, 2, 2)
    torch.testing.assert_close(cubic_between(0, middles, 24)(ones), torch.ones(1, 24, 2, 2))
    assert cubic_between(0, middles[:1], 5)(ones[:, :1]).eq(1).all()


def test_bias_field_is_smooth_and_as_strong_as_asked():
    field = bias_field((20, 20, 20), torch.tensor([[[0.0]], [[0.5]]])).factors
    assert field.shape == (20, 20, 20)
    assert field.log().abs().max() == pytest.approx(0.5, rel=0.01)
    torch.testing.assert_close(field, field[:, :1, :1].expand(20, 20, 20))


def test_noise_of_a_measurement():
    measured = Measured(Identity(), 0.3)
    y = measured.draw(torch.zeros(1, 40, 40, 40), torch.Generator().manual_seed(0))
    assert y.std() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: mask(torch.zeros(SHAPE)), "keeps no voxel"),
        (lambda: missing(SHAPE, 1, [9]), r"slices \[9\] are missing, and axis 1 has slices 0 to 8"),
        (lambda: missing(SHAPE, 3, [0]), "axis is 3"),
        (lambda: slices(0, 7, 0), "above 0"),
        (lambda: slices(0, 7, 2, profile="bix"), "did you mean 'box'"),
        (lambda: blur(0, 7, -1), "more than 0"),
        (lambda: Along(5, torch.eye(3)), "axis is 5"),
        (lambda: Measured(Scaled(torch.ones(1)), 0.0), "above 0"),
    ],
)
def test_what_is_no_operator(make, message):
    with pytest.raises(InputError, match=message):
        make()
