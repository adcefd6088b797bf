"""Extractors: what the built-in one sees, that weights go where they belong, and what a file may hold."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import ResNetFeatures
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from torch import nn

from ldm3d.data.phantoms import make_phantom
from ldm3d.errors import InputError
from ldm3d.evaluation.realism_pairs import diversity_metrics
from ldm3d.evaluation.realism_sets import distribution_metrics
from ldm3d.metrics.distances import spatial_features
from ldm3d.metrics.features import (
    MedicalNet,
    RadImageNet,
    RandomFeatures,
    extract,
    load_extractor,
    read_features,
    standardise,
)
from ldm3d.statistics.equivalence import Finding


def phantoms(seed: int, count: int) -> tuple[np.ndarray, list[dict]]:
    """(count, 1, 24, 28, 24) in [0, 1], and their covariates."""
    made = [make_phantom((24, 28, 24), seed=seed, index=i) for i in range(count)]
    return np.stack([image / 1000 for image, _, _ in made]).clip(0, 1).astype(np.float32), [row for _, _, row in made]


@pytest.fixture(scope="module")
def real():
    return phantoms(0, 80)[0]


@pytest.fixture(scope="module")
def others():
    return phantoms(1, 80)


def both(volumes) -> tuple[torch.Tensor, torch.Tensor]:
    """The built-in features, and those of its maps."""
    extractor = RandomFeatures()
    return extract(volumes, extractor), extract(volumes, lambda v: spatial_features(extractor.maps(v)))


WORSE, CLOSER, SAME = "worse", "closer", "same"


def moved(figure: Finding) -> str:
    """Where a figure lies beside what real volumes reach: what a measure sees, whatever margin a verdict grants it."""
    if figure.null_low <= figure.value <= figure.null_high:
        return SAME
    better = {"low": figure.value < figure.null_low, "high": figure.value > figure.null_high, "real": False}
    return CLOSER if better[figure.direction] else WORSE


@pytest.fixture(scope="module")
def verdicts(real):
    """Whether each measure of volumes moves, on synthetic ones against `real`."""
    features, maps = both(real)

    def judge(synthetic, pairs: int = 0) -> dict[str, str]:
        ours, our_maps = both(synthetic)
        figures = distribution_metrics(*standardise(features, ours), splits=30) + distribution_metrics(
            maps, our_maps, "maps", splits=30
        )
        figures += diversity_metrics(real, synthetic, pairs=pairs) if pairs else []
        return {figure.name: moved(figure) for figure in figures}

    return judge


def test_other_people_are_not_worse_than_real(verdicts, others):
    found = verdicts(others[0], pairs=25)
    assert {name for name, verdict in found.items() if verdict in (WORSE, CLOSER)} == set()


def test_blur_and_noise_move_everything(verdicts, others):
    rng = np.random.default_rng(0)
    blurred = np.stack([gaussian_filter(volume, (0, 0.5, 0.5, 0.5)) for volume in others[0]])
    noisy = (others[0] + 0.03 * rng.standard_normal(others[0].shape, np.float32)).clip(0, 1)
    for synthetic in (blurred, noisy):
        found = verdicts(synthetic)
        assert {name for name, verdict in found.items() if verdict != WORSE} <= {"spread"}


def test_a_few_spoiled_volumes_move_precision_and_not_recall(verdicts, others):
    rng = np.random.default_rng(0)
    spoiled = others[0].copy()
    spoiled[:20] += 0.1 * rng.standard_normal(spoiled[:20].shape, np.float32)
    found = verdicts(spoiled)
    for name in ("precision", "density", "nearest_ratio", "frechet"):
        assert found[name] == WORSE, name
    assert found["recall"] != WORSE != found["coverage"]


def test_a_flip_moves_what_knows_where(verdicts, others):
    found = verdicts(others[0][:, :, ::-1], pairs=25)
    assert found["spatial_frechet"] == found["density"] == found["nearest_ratio"] == WORSE
    assert found["ms_ssim"] != WORSE  # a set of flipped volumes has as much variety as any
    half = np.concatenate([others[0][:40], others[0][40:, :, ::-1]])
    assert verdicts(half)["spatial_frechet"] == WORSE


def test_missing_modes_move_recall_coverage_and_variety(verdicts, others):
    rng = np.random.default_rng(0)
    few = np.tile(others[0][:6], (13, 1, 1, 1, 1))
    found = verdicts(few + 0.002 * rng.standard_normal(few.shape, np.float32), pairs=25)
    for name in ("frechet", "recall", "coverage", "ms_ssim", "four_g_r_ssim"):
        assert found[name] == WORSE, name
    assert found["precision"] != WORSE  # each by itself looks real
    volumes, rows = phantoms(2, 200)
    young = np.stack([volume for volume, row in zip(volumes, rows) if row["age"] < 40])
    found = verdicts(young, pairs=25)
    assert found["recall"] == found["ms_ssim"] == WORSE != found["precision"]


def test_copies_move_the_distance_to_the_nearest(verdicts, real):
    rng = np.random.default_rng(0)
    near = (real + 0.003 * rng.standard_normal(real.shape, np.float32)).clip(0, 1)
    found = verdicts(near, pairs=25)
    assert found["nearest_ratio"] == WORSE and CLOSER in found.values()
    assert {name for name, verdict in found.items() if verdict == WORSE} == {"nearest_ratio"}


def test_random_features_stay_what_they_are():
    """Figures of different days compare only if the filters are the same."""
    x, y, z = torch.meshgrid(*(torch.linspace(0, 1, n) for n in (20, 18, 16)), indexing="ij")
    volume = (x * y + torch.sin(6 * z) ** 2).div(2)[None, None]
    found = RandomFeatures()(volume)
    assert found.shape == (1, 220) and found.isfinite().all()
    expected = torch.tensor([0.370510, 0.213270, 0.273450, 0.180262, 0.225666, 0.010908, 0.065504, 0.041239, 0.018796])
    torch.testing.assert_close(found[0, [0, 1, 2, 10, 54, 107, 108, 150, 219]], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(RandomFeatures()(volume.repeat(2, 1, 1, 1, 1)), found.repeat(2, 1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(RandomFeatures(seed=1)(volume)[:, 108:], found[:, 108:])
    assert RandomFeatures().maps(volume).shape == (1, 32, 5, 4, 4)
    with pytest.raises(InputError, match="sides of 16 or more"):
        RandomFeatures()(torch.zeros(1, 1, 15, 20, 20))


def test_random_filters_answer_to_structure_and_not_to_brightness():
    inside = RandomFeatures().maps(torch.full((1, 1, 32, 32, 32), 0.7))[..., 3:5, 3:5, 3:5]  # far from the padding
    torch.testing.assert_close(inside, torch.zeros_like(inside), atol=1e-5, rtol=0)


def test_extraction_takes_any_callable(real):
    class Means(nn.Module):
        def forward(self, x):
            assert not self.training and x.shape == (1, 1, 24, 28, 24)
            return torch.stack([x.mean(dim=(1, 2, 3, 4)), x.amax(dim=(1, 2, 3, 4))], dim=1)

    found = extract(real[:3], Means())
    torch.testing.assert_close(found, torch.tensor([[v.mean(), v.max()] for v in real[:3]]))
    torch.testing.assert_close(extract((v for v in torch.from_numpy(real[:3])), lambda x: x.amax((2, 3, 4))), found[:, 1:])
    with pytest.raises(InputError, match=r"makes \(1, 1, 24, 28, 24\) of a volume"):
        extract(real[:1], lambda x: x)
    with pytest.raises(InputError, match="no volume"):
        extract([], Means())


def test_standardised_by_the_real_volumes():
    real = torch.tensor([[0.0, 10.0, 5.0], [2.0, 30.0, 5.0], [4.0, 20.0, 5.0]])
    one, other = standardise(real, real + torch.tensor([2.0, 0.0, 0.1]))
    torch.testing.assert_close(one[:, :2].std(dim=0), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(one.mean(dim=0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(other - one, torch.tensor([[1.0, 0.0, 5.0]] * 3, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def randomise(network: nn.Module) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                torch.rand(value.shape, generator=rng) + 0.5
                if "var" in name
                else 0.05 * torch.randn(value.shape, generator=rng)
            )
    return network.state_dict()


def test_medicalnet_takes_the_published_names(tmp_path):
    network = ResNetFeatures("resnet10", pretrained=False, spatial_dims=3, in_channels=1).eval()
    state = randomise(network)
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "published.pth")
    save_file(state, tmp_path / "converted.safetensors")
    volumes = torch.rand(2, 1, 32, 32, 32)
    normalised = torch.stack([(v - v.mean()) / v.std() for v in volumes])
    expected = network(normalised)[-1].mean(dim=(2, 3, 4))
    for file in ("published.pth", "converted.safetensors"):
        extractor = load_extractor(f"medicalnet:{tmp_path / file}")
        assert extractor(volumes).shape == (2, 512)
        torch.testing.assert_close(extractor(volumes), expected)
    torch.testing.assert_close(extractor(3 * volumes + 1), expected, rtol=1e-3, atol=1e-4)
    assert extractor.maps(volumes).shape[:2] == (2, 512)
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="another configuration"):
        MedicalNet(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="do not exist"):
        MedicalNet(tmp_path / "none.pth")


def resnet50(x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """He et al. 2016 with the stride in the 3 x 3 convolution, from a state dict with torchvision's names."""

    def norm(x, name):
        running = (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.batch_norm(x, *running, state[f"{name}.weight"], state[f"{name}.bias"])

    x = norm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = norm(F.conv2d(x, state[f"{at}.conv1.weight"]), f"{at}.bn1").relu()
            y = norm(F.conv2d(y, state[f"{at}.conv2.weight"], stride=stride, padding=1), f"{at}.bn2").relu()
            y = norm(F.conv2d(y, state[f"{at}.conv3.weight"]), f"{at}.bn3")
            if block == 0:
                x = norm(F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride), f"{at}.downsample.1")
            x = (x + y).relu()
    return x.mean(dim=(2, 3))


def test_radimagenet_takes_both_ways_of_naming(tmp_path, monkeypatch):
    from monai.networks.nets import resnet50 as monai_resnet50

    network = monai_resnet50(pretrained=False, spatial_dims=2, n_input_channels=3, bias_downsample=False, num_classes=4)
    state = randomise(network)  # with a classifier, which is not used
    torch.save(state, tmp_path / "torchvision.pt")
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    counted = {}
    for name, value in state.items():
        root, _, rest = name.partition(".")
        if root != "fc":
            counted[f"backbone.{places[root]}.{rest}"] = value
    save_file(counted, tmp_path / "counted.safetensors")
    monkeypatch.setattr("ldm3d.metrics.features.SLICE_SIDE", 64)  # less to compute
    volume = torch.rand(1, 1, 64, 32, 64)
    slices = [volume[:, :, 32], volume[:, :, :, 16], volume[..., 32]]
    expected = sum(resnet50(2 * plane.repeat(1, 3, 1, 1) - 1, state) for plane in slices) / 3
    for file in ("torchvision.pt", "counted.safetensors"):
        extractor = load_extractor(f"radimagenet:{tmp_path / file}")
        torch.testing.assert_close(extractor(volume), expected, rtol=1e-4, atol=1e-5)
    small = RadImageNet(tmp_path / "torchvision.pt")(torch.rand(2, 1, 24, 28, 20))
    assert small.shape == (2, 2048)
    counted["backbone.0.bias"] = torch.zeros(64)  # as files that come from Keras
    save_file(counted, tmp_path / "keras.safetensors")
    with pytest.raises(InputError, match=r"conv1.bias is unknown"):
        RadImageNet(tmp_path / "keras.safetensors")


def test_extractors_by_name():
    assert isinstance(load_extractor("random"), RandomFeatures)
    assert isinstance(load_extractor("ldm3d.metrics.features:RandomFeatures"), RandomFeatures)
    for name in ("vgg", "numpy:nothing", "medical.net:x", ""):
        with pytest.raises(InputError, match=r"package\.module:function"):
            load_extractor(name)


def test_files_of_features(tmp_path):
    values = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "a.npy", values.astype(np.float32))
    ids, found = read_features(tmp_path / "a.npy")
    assert ids is None and found.tolist() == values.tolist()
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        lines = [
            separator.join(("id", "f1", "f2")),
            *(separator.join((f"00{i}", str(a), str(b))) for i, (a, b) in enumerate(values)),
        ]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        ids, found = read_features(tmp_path / name)
        assert ids == ["000", "001", "002"] and found.tolist() == values.tolist()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tsv", "id\tf\nx\tyes\n", "numbers alone"),
        ("a.tsv", "id\nx\n", r"\(1, 0\); give \(volumes, features\)"),
        ("a.npy", "no array", "cannot be read"),
        ("a.mat", "", "neither .npy nor .tsv nor .csv"),
    ],
)
def test_files_that_hold_no_features(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_features(tmp_path / name)
    with pytest.raises(InputError, match="do not exist"):
        read_features(tmp_path / "none.npy")


def test_files_run_no_code(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        read_features(tmp_path / "objects.npy")
