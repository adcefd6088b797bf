"""The judge sees what an eye sees: brains without anatomy are found worse than slightly blurred ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from broken_brains import CHANGES

from ldm3d.data.phantoms import GREY, VENTRICLES, WHITE, make_phantom
from ldm3d.errors import InputError
from ldm3d.evaluation import discriminability
from ldm3d.evaluation.anatomy import ALL, MISSING, Segmented, class_names, compare_anatomy, compare_figures, segment
from ldm3d.evaluation.discriminability import Discriminability, auc_interval, is_quick, tell_apart
from ldm3d.metrics.discriminability import classifier_auc
from ldm3d.metrics.distances import frechet_distance
from ldm3d.metrics.features import SegmenterFeatures, extract, load_extractor, standardise
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.models.unet import UNet
from ldm3d.report.sections import anatomy as section
from ldm3d.report.sections.anatomy import anatomy_light
from ldm3d.rulers.segmenter import Segmenter
from ldm3d.statistics.equivalence import CLOSER, WITHIN

SHAPE, SPACING_MM = (20, 24, 20), 7.5
GROUPS = {"grey": [GREY], "white": [WHITE], "ventricles": list(VENTRICLES)}
PEOPLE = 30
BAD = ("shuffled", "scrambled", "grain")


def brain(index: int):
    """A phantom without its head, in [0, 1], and its classes; both (X, Y, Z)."""
    image, labels, _ = make_phantom(SHAPE, SPACING_MM, seed=5, index=index)
    classes = sum(k * np.isin(labels[0], group) for k, group in enumerate(GROUPS.values(), start=1))
    return np.where(classes > 0, image[0] / 900, 0).clip(0, 1).astype(np.float32), classes


@pytest.fixture(scope="module")
def sets():
    """ "real" people, and others changed in every way, (X, Y, Z) each."""
    others = [brain(PEOPLE + i)[0] for i in range(PEOPLE)]
    changed = {
        name: [change(volume, np.random.default_rng(i)).astype(np.float32) for i, volume in enumerate(others)]
        for name, change in CHANGES.items()
    }
    return {"real": [brain(i)[0] for i in range(PEOPLE)], **changed}


@pytest.fixture(scope="module")
def network():
    """Trained for seconds, on blurred and noisy volumes too."""
    volumes, classes = (torch.from_numpy(np.stack(each)) for each in zip(*(brain(1000 + i) for i in range(32))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SegmentationUNet(GROUPS, (8, 16, 32)).train()
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, 100)
    for _ in range(100):
        chosen = torch.randint(len(volumes), (2,), generator=random)
        x, (gain, blur) = volumes[chosen, None], torch.rand(2, generator=random).tolist()
        x = (0.8 + 0.4 * gain) * x + blur * (F.avg_pool3d(x, 3, stride=1, padding=1) - x)
        x = x + 0.03 * torch.randn(x.shape, generator=random)
        loss = F.cross_entropy(network(x), classes[chosen], torch.tensor([1.0, 1, 1, 4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="module")
def extractor(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenter")
    network.save_pretrained(folder)
    return load_extractor(f"segmenter:{folder}")


@pytest.fixture(scope="module")
def distances(sets, extractor):
    features = {name: extract([volume[None] for volume in volumes], extractor) for name, volumes in sets.items()}
    return {name: frechet_distance(*standardise(features["real"], each)) for name, each in features.items()}


@pytest.fixture(scope="module")
def shares(sets, network):
    """Share of figures within the middle 90% of real people, by kind of volume."""
    segmenter, spacing_mm = Segmenter(network), (SPACING_MM,) * 3
    maps = {name: [segment(volume, segmenter, spacing_mm) for volume in volumes] for name, volumes in sets.items()}
    people, others = list(range(PEOPLE)), list(range(PEOPLE, 2 * PEOPLE))
    found = {}
    for pair in (("as they are", "blurred"), ("shuffled", "scrambled"), ("blurred", "grain")):  # two sets at a time
        one, other = (maps[name] for name in pair)
        anatomy = compare_anatomy(maps["real"], one, other, list(GROUPS), people, others, people)
        found |= {name: each[0].value for name, each in zip(pair, (anatomy.reconstructed, anatomy.generated))}
    return found


@pytest.mark.parametrize("kind", BAD)
def test_no_anatomy_is_further_away_than_a_slight_blur(distances, kind):
    assert distances[kind] > 1.2 * distances["blurred"], distances


@pytest.mark.parametrize("kind", BAD)
def test_no_anatomy_is_less_often_like_that_of_people_than_a_slight_blur(shares, kind):
    assert shares[kind] < shares["blurred"] - 0.1, shares


def test_brains_of_other_people_are_in_the_middle(shares):
    assert shares["as they are"] == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize("kind", BAD)
def test_a_classifier_finds_what_has_no_anatomy(sets, kind):
    one, other = (torch.from_numpy(np.stack(sets[name]))[:, None] for name in ("real", kind))
    assert classifier_auc(one, other, folds=2, steps=30) > 0.9


def test_a_classifier_does_not_find_other_people(sets):
    one, other = (torch.from_numpy(np.stack(sets[name]))[:, None] for name in ("real", "as they are"))
    assert 0.3 < classifier_auc(one, other, folds=2, steps=30) < 0.7


def test_class_maps_and_features(network, extractor, sets):
    volume = sets["real"][0]
    segmenter = Segmenter(network)
    classes = segmenter.classes(volume)
    assert segmenter.names == list(GROUPS) and classes.shape == SHAPE and classes.dtype == np.uint8
    assert (segmenter.classes(volume[None]) == classes).all()
    with torch.inference_mode():
        shares = network(torch.from_numpy(volume)[None, None])[0].softmax(dim=0).sum(dim=(1, 2, 3))
    measured = segmenter(volume, (2, 5, 10))
    assert measured == pytest.approx({name: float(shares[k]) / 10 for k, name in enumerate(GROUPS, start=1)}, rel=1e-4)
    true = brain(0)[1]
    assert 2 * ((classes == 2) & (true == 2)).sum() / ((classes == 2).sum() + (true == 2).sum()) > 0.6
    both = torch.from_numpy(np.stack([volume, volume[::-1].copy()]))[:, None]
    features = extractor(both)
    assert features.shape == (2, 32 + 27 * 4 + 8)
    cells = features[:, 32 : 32 + 27 * 4].view(2, 4, 3, 3, 3)
    assert torch.allclose(cells.sum(dim=1), torch.ones(2, 3, 3, 3), atol=1e-5)  # probabilities
    assert torch.allclose(extractor.maps(both).mean(dim=(2, 3, 4)), cells.mean(dim=(2, 3, 4)), atol=0.02)  # 20 / 3 overlap
    assert torch.equal(extractor(torch.cat([both, both.flip(0)], dim=1)), features)  # of several channels the first


def test_classes_are_named_without_units():
    for given, short in ((["ventricular_volume_ml", "grey_ml", "csf"], ["ventricular", "grey", "csf"]), (["a", "a_ml"],) * 2):
        assert class_names(Segmenter(SegmentationUNet({name: [k] for k, name in enumerate(given)}, (4, 8)))) == short


def test_where_tissue_is_shows_in_the_features(extractor, sets):
    """A flip from front to back exchanges the front and the back cells."""
    volume = torch.from_numpy(np.pad(sets["real"][0], ((0, 0), (0, 4), (0, 0))))[None, None]
    front, back = (extractor(v)[0, 32 : 32 + 27].view(3, 3, 3) for v in (volume, volume.flip(3)))  # of background
    assert (front - back).abs().max() > 0.1 and (front - back.flip(1)).abs().max() < 0.1


def test_another_network_is_no_segmenter(tmp_path):
    UNet(2, 2, [], [8, 16], 1, [False, False]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no segmentation network"):
        SegmenterFeatures(tmp_path)


FIGURES = [f"figure {f}" for f in range(15)]


def figures(count: int, seed: int, spread: float = 1.0, shift: float = 0.0):
    """15 figures of people, which follow from 5 of their properties; `shift` moves the first, in standard deviations."""
    random, mixing = np.random.default_rng(seed), np.random.default_rng(0).standard_normal((5, len(FIGURES)))
    values = spread * random.standard_normal((count, 5)) @ mixing / np.linalg.norm(mixing, axis=0)
    values[:, 0] += shift
    return values


def anatomy_of(people: int, generated: int, seed: int = 0, **change):
    made = figures(generated, 1000 + seed, **change)
    return compare_figures(FIGURES, figures(people, seed), made, range(people), [i % people for i in range(generated)])


def test_verdict_on_anatomy_with_the_default_number_of_volumes():
    for seed in range(2):
        assert anatomy_light(anatomy_of(200, 200, seed)).verdict == ("green", WITHIN)
        assert anatomy_light(anatomy_of(200, 200, seed, spread=0.7)).verdict == ("amber", CLOSER)  # the usual brain
        assert anatomy_light(anatomy_of(200, 200, seed, spread=1.7)).verdict[0] == "red"
        light, words = anatomy_light(anatomy_of(200, 200, seed, shift=1.5)).verdict  # one figure of 15
        assert light == "red" and words.startswith("1 of 15")
    assert anatomy_light(anatomy_of(14, 100)).verdict[0] == "grey"
    assert anatomy_light(anatomy_of(14, 100, spread=6)).verdict[0] == "red"


def test_share_has_an_interval_that_holds_it():
    """Of an endless number of people as they are, 90% are in the middle 90%."""
    held = 0
    for seed in range(16):
        mean, *each = anatomy_of(100, 100, seed)
        assert mean.value == pytest.approx(np.mean([finding.value for finding in each])) and mean.name == ALL
        held += mean.low <= 0.9 <= mean.high
    assert held >= 13


def test_a_class_that_people_lack_is_no_fault_and_one_that_they_have_is():
    values = figures(60, 0)
    some = np.where(np.arange(60)[:, None] % 3 == 0, MISSING, values)  # a third of the people lack it
    ids = range(60)
    assert compare_figures(FIGURES, some, np.full((60, 15), MISSING), ids, ids)[0].value == 1
    assert compare_figures(FIGURES, values, np.full((60, 15), MISSING), ids, ids)[0].value == 0


def test_the_nearest_anatomy_is_another_person_s():
    """Four scans of two people: the second scan of a person is not their nearest anatomy, nor is the original a copy's."""
    block = np.zeros((12, 12, 12), np.uint8)
    block[3:9, 3:9, 3:9] = 1
    long = np.zeros((12, 12, 12), np.uint8)
    long[2:10, 4:8, 4:8] = 1
    real = [Segmented({}, classes) for classes in (block, block, long, long)]
    people = ["a", "a", "b", "b"]
    found = compare_anatomy(real, real, real[:1] + real[3:], ["it"], people, ["a", "b"], [2, 0, 1, 3])
    other = 2 * 6 * 4 * 4 / (6**3 + 8 * 4 * 4)
    for kind, count in (("real", 4), ("reconstructed", 4), ("generated", 2)):
        assert found.values[kind] == pytest.approx(np.full((count, 1), other)), kind
    assert found.mean_dice("it")[0] == 1 and found.names == ["it_overlap"]


def test_variety_and_people_that_are_told_apart(monkeypatch):
    """Generated volumes that deviate half as much from their mean have a quarter of the variance."""
    monkeypatch.setattr(
        discriminability, "classifier_auc", lambda one, other, **_: 0.5 + 0.25 * float(one.std() > other.std())
    )
    random = np.random.default_rng(0)
    known = random.random((40, 1, 4, 4, 4)).astype(np.float32)
    made = 0.5 * (known - known.mean(axis=0)) + 0.3
    found = tell_apart(list(known), list(made[::-1]), range(40), range(39, -1, -1))
    assert found.people == 40 and found.auc == 0.75 and found.variety == pytest.approx(0.25, rel=1e-5)
    low, high = found.variety_interval
    assert low == pytest.approx(0.25, rel=1e-3) and high == pytest.approx(0.25, rel=1e-3)  # person by person the same
    with pytest.raises(InputError, match="of 5 people"):
        tell_apart(list(known), list(made), range(40), [*range(5)] * 8)


def test_variances_of_resamples():
    volumes = np.random.default_rng(0).random((3, 1, 4, 4, 4))
    found = discriminability._variances(list(volumes), np.array([[2.0, 0, 1]]))
    assert found == pytest.approx([volumes[rows].var(axis=0).sum() for rows in ([0, 1, 2], [0, 0, 2])], rel=1e-5)


def test_interval_of_an_auc():
    """Hanley and McNeil 1982, section III: an area of 0.893 of 51 and 58 images has a standard error of 0.0323 or so."""
    low, high = auc_interval(0.893, 51, 58)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.032, abs=0.002)
    assert auc_interval(0.99, 10, 10)[1] == 1


@pytest.mark.parametrize(
    "people, auc, variety, lights",
    [(100, 0.55, 1.0, ["green", "green"]), (100, 0.95, 0.6, ["red", "red"]), (30, 0.5, 1.0, ["grey", "grey"])],
)
def test_lights_of_classifier_and_variety(people, auc, variety, lights):
    found = Discriminability(people, auc, auc_interval(auc, people, people), variety, (variety - 0.1, variety + 0.1))
    assert [goal.verdict[0] for goal in section.lights(None, found)] == lights


def test_a_classifier_is_trained_by_default_where_it_takes_minutes():
    assert is_quick((56, 72, 56), "cpu") and not is_quick((160, 224, 160), "cpu") and is_quick((160, 224, 160), "cuda")
