"""Similarity of pairs: MONAI's MS-SSIM as an oracle, and 4-G-R-SSIM against what can be said by hand."""

import numpy as np
import pytest
import torch
from monai.metrics import regression
from monai.metrics.regression import compute_ms_ssim
from scipy import ndimage

from ldm3d.errors import InputError
from ldm3d.metrics import similarity as diversity
from ldm3d.metrics.similarity import four_g_r_ssim, ms_ssim, num_scales


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(seed: int) -> torch.Tensor:
    """Soft blobs around 0.5, (1, 1, 28, 30, 26)."""
    noise = np.random.default_rng(seed).standard_normal((28, 30, 26))
    return torch.from_numpy(np.clip(0.5 + 2 * ndimage.gaussian_filter(noise, 2), 0, 1)).float()[None, None]


@pytest.mark.parametrize(
    "shape, scales",
    [((8, 9, 10), 1), ((21, 40, 40), 1), ((22, 40, 40), 2), ((160, 224, 160), 4), ((175, 200, 200), 4), ((512,) * 3, 5)],
)
def test_number_of_scales_follows_from_the_shape(shape, scales):
    assert num_scales(shape) == scales


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_ms_ssim_is_monais(monkeypatch, scales):
    """MONAI's own window, scales and weights, where its check of the shape lets it work: 3 scales from 44 voxels on."""
    monkeypatch.setattr(diversity, "num_scales", lambda shape: scales)
    # In float64: variances are differences of nearly equal means, whose float32 rounding is another on every CPU. MONAI makes
    # its window in the default type, and would turn the volumes into float32
    monkeypatch.setattr(regression, "convert_data_type", lambda data, **_: (data, None, None))
    before = torch.get_default_dtype()
    x, y = rand(2, 1, 46, 44, 45).double(), rand(2, 1, 46, 44, 45, seed=1).double()
    y = 0.6 * x + 0.4 * y
    weights = diversity.SCALE_WEIGHTS[:scales]
    torch.set_default_dtype(torch.float64)
    try:
        expected = compute_ms_ssim(x, y, 3, weights=[w / sum(weights) for w in weights]).flatten()
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(ms_ssim(x, y), expected, rtol=0, atol=1e-6)  # MONAI's exponents are float32


@pytest.mark.parametrize("measure", [ms_ssim, four_g_r_ssim])
def test_equal_volumes_symmetry_and_batches(measure):
    x, y = torch.cat([smooth(0), smooth(1)]), torch.cat([smooth(2), smooth(3)])
    torch.testing.assert_close(measure(x, x), torch.ones(2))
    torch.testing.assert_close(measure(x, y), measure(y, x))
    torch.testing.assert_close(measure(x, y)[1:], measure(x[1:], y[1:]))
    near = 0.9 * x + 0.1 * y
    assert (measure(x, near) > measure(x, y) + 0.1).all()
    empty = torch.zeros(1, 1, 16, 16, 16)
    assert measure(empty, empty) == 1
    assert measure(torch.zeros(1, 1, 6, 5, 7), torch.zeros(1, 1, 6, 5, 7)) == 1  # thinner than a window


def naive_four_g_r_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """By the definitions, place by place, with scipy's own Sobel operator."""
    gx, gy = (
        np.sqrt(sum((ndimage.sobel(v, axis) / 32) ** 2 for axis in range(3)))[1:-1, 1:-1, 1:-1].astype(np.float64)
        for v in (x, y)
    )
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = line[:, None, None] * line[:, None] * line
    window /= window.sum()
    top, regions = max(gx.max(), gy.max()), {}
    for i, j, k in np.ndindex(*(side - 10 for side in gx.shape)):
        a, b = (g[i : i + 11, j : j + 11, k : k + 11] for g in (gx, gy))
        a_mean, b_mean = (window * a).sum(), (window * b).sum()
        covariance = (window * (a - a_mean) * (b - b_mean)).sum()
        r = covariance / np.sqrt((window * (a - a_mean) ** 2).sum() * (window * (b - b_mean) ** 2).sum())
        here = gx[i + 5, j + 5, k + 5] / top, gy[i + 5, j + 5, k + 5] / top
        edges = sum(g > 0.12 for g in here)
        kind = "both" if edges == 2 else "one" if edges == 1 else "smooth" if max(here) < 0.06 else "texture"
        regions.setdefault(kind, []).append(r)
    assert len(regions) == 4
    return float(np.mean([np.mean(values) for values in regions.values()]))


def test_four_g_r_ssim_by_its_definition():
    x, y = (smooth(seed)[0, 0, :22, :20, :18].numpy() for seed in (0, 1))
    x *= np.linspace(0, 1, 22, dtype=np.float32)[:, None, None] ** 3  # from still to steep, each along another axis
    y *= np.linspace(0, 1, 20, dtype=np.float32)[:, None] ** 3
    found = four_g_r_ssim(*(torch.from_numpy(v)[None, None] for v in (x, y)))
    assert found.item() == pytest.approx(naive_four_g_r_ssim(x, y), abs=1e-4)


def test_only_structure_counts_in_r():
    """r* is a correlation of gradients: contrast and brightness of a whole volume do not change it."""
    x, y = smooth(0), smooth(1)
    torch.testing.assert_close(four_g_r_ssim(x, 0.5 * x + 0.2), torch.ones(1), atol=0.1, rtol=0)
    assert ms_ssim(x, 0.5 * x + 0.2) < 0.9
    assert abs(four_g_r_ssim(x, y)) < 0.4


def test_a_constant_window_is_like_another_and_unlike_structure():
    flat, stripes = torch.zeros(1, 1, 20, 20, 20), torch.zeros(1, 1, 20, 20, 20)
    stripes[..., ::4] = 1
    assert four_g_r_ssim(flat, stripes).item() == pytest.approx(0, abs=1e-6)


def test_shapes_must_be_equal():
    with pytest.raises(InputError, match=r"\(1, 1, 8, 8, 8\) and \(1, 1, 8, 8, 9\)"):
        ms_ssim(torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 9))
