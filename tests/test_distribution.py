"""Measures of distribution against closed forms, brute force and MONAI's own."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric, MMDMetric
from scipy import linalg

from ldm3d.errors import InputError
from ldm3d.metrics import distances as distribution
from ldm3d.metrics.distances import (
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
    neighbours,
    rbf_mmd,
    spatial_features,
    spread_ratio,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet_of_moments(mean1, covariance1, mean2, covariance2) -> float:
    root = linalg.sqrtm(covariance1 @ covariance2).real
    return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1 + covariance2 - 2 * root))


@pytest.fixture(scope="module")
def gaussians():
    """Draw n of either of two Gaussians of 16 dimensions, and their exact Fréchet distance."""
    mixing = [normal(16, 16, seed=seed) / 4 for seed in (1, 2)]
    means = [torch.zeros(16, dtype=torch.float64), 0.3 * normal(16, seed=3)]
    exact = frechet_of_moments(
        *(m.numpy() for mean, mix in zip(means, mixing) for m in (mean, mix.T @ mix)),
    )

    def draw(which: int, n: int, seed: int):
        return normal(n, 16, seed=10 + 2 * seed + which) @ mixing[which] + means[which]

    return draw, exact


def test_frechet_distance_of_two_gaussians(gaussians):
    draw, exact = gaussians
    assert frechet_distance(draw(0, 20_000, 0), draw(1, 20_000, 0)) == pytest.approx(exact, rel=0.01)


def test_frechet_distance_is_monais():
    x, y = normal(60, 8), 1.5 * normal(50, 8, seed=1) + 0.2
    assert frechet_distance(x, y) == pytest.approx(float(FIDMetric()(y, x)), rel=1e-6)
    assert frechet_distance(x.numpy(), y.float()) == pytest.approx(frechet_distance(x, y), rel=1e-5)


def test_frechet_distance_of_fewer_volumes_than_features():
    x, y = normal(30, 50), 1.5 * normal(20, 50, seed=1)
    moments = [m for z in (x.numpy(), y.numpy()) for m in (z.mean(axis=0), np.cov(z.T))]
    assert frechet_distance(x, y) == pytest.approx(frechet_of_moments(*moments), rel=1e-4)  # its square root is the less exact
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_extrapolation_takes_most_of_the_bias_off(gaussians):
    draw, exact = gaussians
    for n, repeats in ((500, 100), (2000, 20)):
        pairs = [(draw(0, n, seed), draw(1, n, seed)) for seed in range(repeats)]
        plain, extrapolated = ([f(x, y) - exact for x, y in pairs] for f in (frechet_distance, frechet_infinity))
        sampling_error = np.std(extrapolated) / math.sqrt(repeats)
        assert abs(np.mean(extrapolated)) < 3 * sampling_error, n
        assert n > 500 or np.mean(plain) > 5 * sampling_error
    x, y = normal(1000, 64), normal(1000, 64, seed=1)
    assert frechet_distance(x, y) > 2 and abs(frechet_infinity(x, y)) < 0.2


def test_kernel_distance_by_brute_force():
    x, y = normal(7, 3), normal(5, 3, seed=1) + 1

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    expected = (
        np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        - 2 * np.mean([k(a, b) for a in x for b in y])
    )
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_is_unbiased():
    found = np.array([kernel_distance(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1)) for i in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20


def test_mmd_of_two_gaussians():
    """E exp(-|x - y|^2 / 2h^2) of x - y ~ N(m, 2 s^2 I) is (h^2 / (h^2 + 2 s^2))^(D/2) exp(-|m|^2 / (2 (h^2 + 2 s^2)))."""
    shift, h = torch.tensor([0.7, 0, 0], dtype=torch.float64), 1.3
    width = h**2 + 2
    expected = 2 * (h**2 / width) ** 1.5 * (1 - math.exp(-0.49 / (2 * width)))
    found = rbf_mmd(normal(6000, 3), normal(5000, 3, seed=1) + shift, bandwidth=h)
    assert found == pytest.approx(expected, rel=0.05)


def test_mmd_chooses_the_median_distance():
    x, y = normal(40, 3), normal(40, 3, seed=1)
    median = float(torch.pdist(x).median())
    assert rbf_mmd(x, y) == pytest.approx(rbf_mmd(x, y, bandwidth=median), rel=1e-9)
    assert rbf_mmd(1000 * x, 1000 * y) == pytest.approx(rbf_mmd(x, y))
    assert rbf_mmd(torch.ones(4, 2), torch.ones(4, 2)) == 0


def test_kernels_see_variance_where_monais_linear_mmd_is_blind():
    x, y = normal(2000, 3), 2 * normal(2000, 3, seed=1)
    null = (kernel_distance(x, normal(2000, 3, seed=2)), rbf_mmd(x, normal(2000, 3, seed=2)))
    assert kernel_distance(x, y) > 50 * abs(null[0]) and rbf_mmd(x, y) > 50 * abs(null[1])
    assert abs(float(MMDMetric()(y.reshape(-1, 1, 3, 1), x.reshape(-1, 1, 3, 1)))) < 0.01


def naive_neighbours(real: np.ndarray, other: np.ndarray) -> dict[str, float]:
    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    radii = {(name, k): np.sort(distances(x, x), axis=1)[:, k] for name, x in (("r", real), ("o", other)) for k in (1, 3, 5)}
    cross = distances(other, real)
    return {
        "precision": (cross <= radii["r", 3]).any(axis=1).mean(),
        "recall": (radii["o", 3] >= cross.T).any(axis=1).mean(),
        "density": (cross < radii["r", 5]).sum() / (5 * len(other)),
        "coverage": (cross.min(axis=0) < radii["r", 5]).mean(),
        "ratio": cross.min(axis=1).mean() / radii["r", 1].mean(),
    }


@pytest.mark.parametrize("rows", [7, 1024])
def test_neighbours_by_brute_force(monkeypatch, rows):
    monkeypatch.setattr(distribution, "ROWS", rows)
    real, other = normal(40, 3) + 100, 0.8 * normal(33, 3, seed=1) + 100.5
    found = neighbours(real, other)
    for name, value in naive_neighbours(real.numpy(), other.numpy()).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert 0.1 < found.recall < 0.95 and 0.1 < found.coverage < 0.999  # so that each can be wrong


def test_neighbours_of_two_modes_of_which_one_is_missing():
    real = torch.cat([normal(50, 2), normal(50, 2, seed=1) + 50])
    found = neighbours(real, 0.9 * normal(100, 2, seed=2))
    assert found.precision > 0.9 and found.recall < 0.55 and found.coverage < 0.55 and found.density > 0.9


def test_neighbours_of_copies_and_of_an_outlier():
    real = normal(60, 3)
    copies = neighbours(real, real)
    assert copies.ratio == pytest.approx(0, abs=1e-6) and copies.precision == copies.recall == copies.coverage == 1
    outlier = torch.cat([real, torch.full((1, 3), 30.0)])  # its ball holds everybody: precision believes it, density does not
    far = neighbours(outlier, normal(60, 3, seed=1) + 10)
    assert far.precision == 1 and far.density < 0.25


def test_only_blocks_of_rows_are_held(monkeypatch):
    asked, original = [], distribution._squared_distances

    def spy(x, y):
        asked.append((len(x), len(y)))
        return original(x, y)

    monkeypatch.setattr(distribution, "_squared_distances", spy)
    monkeypatch.setattr(distribution, "ROWS", 16)
    x, y = normal(3000, 2), normal(900, 2, seed=1)
    neighbours(x, y)
    assert (
        max(rows for rows, _ in asked) == 16 and sum(rows * columns for rows, columns in asked) == 3000**2 + 900**2 + 2_700_000
    )
    asked.clear()
    rbf_mmd(x, y)
    assert max(rows for rows, columns in asked if columns > 500) == 16


def test_inception_score_of_certain_and_of_blind_classifiers():
    assert inception_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5)
    assert inception_score(torch.full((6, 4), 0.25)) == pytest.approx(1)
    assert inception_score(torch.eye(5)[torch.zeros(8, dtype=int)]) == pytest.approx(1)  # certain, of one class
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert inception_score(p) == pytest.approx(2 * math.exp(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    with pytest.raises(InputError, match="softmax"):
        inception_score(torch.tensor([[2.0, -1.0]]))


def test_spatial_features_know_where():
    maps = torch.rand(3, 32, 10, 12, 10)
    features = spatial_features(maps)
    assert features.shape == (3, 9 * 216) and features.shape[1] <= 2048
    torch.testing.assert_close(spatial_features(maps.flip(2)).mean(dim=1), features.mean(dim=1))
    assert not torch.allclose(spatial_features(maps.flip(2)), features)
    assert spatial_features(maps[..., :3, :4, 5]).shape == (3, 12 * 32)
    exact = spatial_features(maps[:, :, :5, :5, :5])  # nothing to average: the first 2048 // 125 channels as they are
    torch.testing.assert_close(exact, maps[:, :16, :5, :5, :5].flatten(1))


@pytest.mark.parametrize(
    "real, other, message",
    [
        (torch.zeros(9, 2, 2), torch.zeros(9, 2), r"\(9, 2, 2\); give \(volumes, features\)"),
        (torch.zeros(9, 2), torch.zeros(9, 3), "2 features and the others 3"),
        (torch.zeros(5, 2), torch.zeros(9, 2), "5 real volumes are too few; give 6"),
        (torch.zeros(9, 2), torch.full((9, 2), math.nan), "9 other volumes have features that are not finite"),
    ],
)
def test_what_cannot_be_compared(real, other, message):
    with pytest.raises(InputError, match=message):
        neighbours(real, other)


def test_spread_ratio_is_the_factor_between_two_sets_and_does_not_see_where_they_are(monkeypatch):
    real = normal(60, 5)
    assert spread_ratio(real, 0.8 * real + 1e6) == pytest.approx(0.8, rel=1e-6)
    assert spread_ratio(real, real[:1].repeat(9, 1)) == 0
    exact = np.mean([np.linalg.norm(a - b) for i, a in enumerate(real.numpy()) for b in real.numpy()[:i]])
    other = normal(40, 5, seed=1)
    by_hand = np.mean([np.linalg.norm(a - b) for i, a in enumerate(other.numpy()) for b in other.numpy()[:i]]) / exact
    monkeypatch.setattr(distribution, "ROWS", 7)
    assert spread_ratio(real, other) == pytest.approx(by_hand)
