"""The audit: planted copies are found, new people are not called copies, and what it says of rates is so."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import command_line
from safetensors.torch import load_file, save_file
from scipy import stats
from torture.generation import bids_errors, digests, make_pipeline

from ldm3d.config.read import load_config
from ldm3d.covariates import Covariate, CovariateSchema
from ldm3d.data.derivative import synthetic_path
from ldm3d.data.nifti import write_volume
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.data.phantoms import make_phantom
from ldm3d.description import Sampling
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.experiment import save_experiment, scans_by_use
from ldm3d.generation import series as series_format
from ldm3d.generation.run import generate
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.unet import UNet
from ldm3d.pipeline import Pipeline
from ldm3d.privacy import membership
from ldm3d.privacy.audit import audit, data_copying
from ldm3d.privacy.calibration import calibrate
from ldm3d.privacy.descriptors import SHIFTS, coarse_volumes, descriptors_of
from ldm3d.privacy.embedding import augment, contrastive_loss, train_embedding
from ldm3d.privacy.findings import Audit
from ldm3d.privacy.guard import Guard
from ldm3d.privacy.nearest import SPACES, Nearest, Reference, Similarity
from ldm3d.privacy.volumes import HELD_OUT, TRAINING, Volumes, generated_for, of_subjects, written_in
from ldm3d.processes import Processes
from ldm3d.report.sections.audit import lights
from ldm3d.statistics.conformal import Rate, p_values

SHAPE = (24, 28, 24)
TRAINED, HELD, NEW = 24, 24, 12  # subjects
RNG = np.random.default_rng(0)


def phantom(i: int) -> np.ndarray:
    image = make_phantom(SHAPE, seed=11, index=i)[0]
    return (image / np.percentile(image, 99.8)).clip(0, 1).astype(np.float32)


def noisy(volume: np.ndarray, deviation: float = 0.05) -> np.ndarray:
    return (volume + deviation * RNG.standard_normal(volume.shape)).clip(0, 1).astype(np.float32)


def as_volumes(volumes: list[np.ndarray], names: list[str], pipeline: Pipeline) -> Volumes:
    return of_subjects(names, [{}] * len(volumes), volumes.__getitem__, pipeline)


def linear_pipeline(volumes: list[np.ndarray], channels: int = 4) -> Pipeline:
    """A model whose autoencoder is the principal components of these volumes; its U-Net knows nothing yet."""
    torch.manual_seed(0)
    schema = CovariateSchema((Covariate("age", "continuous", unit="years", mean=50, std=20),))
    autoencoder = Autoencoder(4, 4, (8, 16), blocks=1).eval().requires_grad_(False)
    batch = torch.from_numpy(np.stack(volumes))
    autoencoder.fit_linear_path(batch)
    with torch.no_grad():
        z = autoencoder.sample(autoencoder.encode(batch))
    autoencoder.latent_mean.copy_(z.mean((0, 2, 3, 4)))
    autoencoder.latent_std.copy_(z.std((0, 2, 3, 4)))
    network = (4, 4, schema.num_categories, (4 * channels, 8 * channels), 1, (False, True))
    unet = UNet(*network, head_channels=16, context_dim=16).eval().requires_grad_(False)
    grid, sampling = Grid.centred(SHAPE, (7.5,) * 3), Sampling(sampler="euler", steps=10)
    return Pipeline(autoencoder, unet, schema, grid, make_process("flow"), "v", sampling)


@pytest.fixture(scope="module")
def people() -> dict[str, list[np.ndarray]]:
    """Volumes of subjects that were trained on, held out, and of new ones; the first of either has a second scan."""
    everyone = [phantom(i) for i in range(TRAINED + HELD + NEW)]
    groups = {"training": everyone[:TRAINED], "held out": everyone[TRAINED:-NEW], "new": everyone[-NEW:]}
    for group in ("training", "held out"):
        groups[group].append(noisy(groups[group][0], 0.02))
    return groups


@pytest.fixture(scope="module")
def pipeline(people) -> Pipeline:
    return linear_pipeline(people["training"])


@pytest.fixture(scope="module", autouse=True)
def fewer_noises():
    """The attack by losses has tests of its own, and the embedding need not be good for most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "REPEATS", 1)
        patch.setattr(membership, "TIMES", (0.3, 0.6))
        yield


def run(pipeline: Pipeline, people: dict, synthetic: dict[str, np.ndarray], **options) -> tuple[Audit, Guard]:
    training = as_volumes(people["training"], [*(f"t{i}" for i in range(TRAINED)), "t0"], pipeline)
    held_out = as_volumes(people["held out"], [*(f"h{i}" for i in range(HELD)), "h0"], pipeline)
    looked = as_volumes(list(synthetic.values()), list(synthetic), pipeline)
    return audit(pipeline, training, held_out, looked, **{"embedding_steps": 20, **options})


@pytest.fixture(scope="module")
def planted(people) -> dict[str, np.ndarray]:
    """By "KIND of SUBJECT"."""
    t = people["training"]
    return {
        "exact of t3": t[3],
        "noisy of t5": noisy(t[5]),
        "flipped of t7": t[7][:, ::-1],
        "shifted of t9": np.roll(t[9], (1, 0, -1), (1, 2, 3)),
        "flipped and shifted of t11": np.roll(t[11][:, ::-1], 1, 2),
        "darker of t13": 0.7 * t[13] ** 1.1,
        "second scan of t0": noisy(t[0], 0.02),
    }


@pytest.fixture(scope="module")
def strangers(pipeline, people) -> dict[str, np.ndarray]:
    """New people as an honest model would draw them: they come out of the decoder."""
    volumes = (pipeline.reconstruct(torch.from_numpy(volume)[None])[0].numpy() for volume in people["new"])
    return {f"new {i}": volume for i, volume in enumerate(volumes)}


@pytest.fixture(scope="module")
def found(pipeline, people, planted, strangers) -> tuple[Audit, Guard]:
    return run(pipeline, people, planted | strangers)


# What is found


def test_planted_copies_are_found_and_new_people_are_none(found, planted):
    audited, _ = found
    looked = {each.name: each for each in audited.volumes}
    for name in planted:
        assert looked[name].copy and looked[name].plain, (name, looked[name])
        assert looked[name].subject == name.rpartition(" ")[2]
        assert looked[name].p == 1 / (HELD + 1)
    new = [each for name, each in looked.items() if name not in planted]
    assert not any(each.plain for each in new) and sum(each.copy for each in new) <= 2
    assert audited.has_copies and audited.verdict.startswith("COPIES: 7 plain ones; 7 of 19")
    assert audited.copied_subjects.count >= len(planted)
    assert audited.suspects[0][0].name == "exact of t3"
    np.testing.assert_array_equal(audited.suspects[0][1], audited.suspects[0][2])


def test_every_space_finds_the_exact_and_the_flipped_copy(found):
    audited, _ = found
    looked = {each.name: each for each in audited.volumes}
    for space in SPACES:
        for name in ("exact of t3", "flipped of t7"):
            assert looked[name].similarity.nearest[space].ratio < 0.05, (space, name)
    shifted = looked["flipped and shifted of t11"].similarity.nearest["image"]
    assert shifted.ratio < 0.3, "the faces that roll over are all that differs"


def test_new_people_alone_are_no_copies(pipeline, people, strangers):
    audited, _ = run(pipeline, people, strangers)
    assert not audited.has_copies and audited.plain == 0
    assert audited.verdict.startswith("no copies beyond the held-out rate")
    for space in audited.spaces.values():
        assert abs(space.c_t) < 3
        assert abs(space.authentic.value - space.held_out_authentic.value) < 0.5


def test_a_set_of_copies_shows_in_every_figure(pipeline, people):
    audited, _ = run(pipeline, people, {f"copy {i}": noisy(people["training"][i], 0.02) for i in range(20)})
    assert audited.copies().count == 20 and audited.copied_subjects.count == 20
    assert audited.chance < 1e-6
    for space in ("latent", "image"):
        assert audited.spaces[space].c_t < -5
        assert audited.spaces[space].authentic.count == 0


def test_one_exact_copy_among_many_is_enough(pipeline, people, strangers):
    """By counting alone it would be lost among the volumes that are below the threshold by chance."""
    audited, _ = run(pipeline, people, {"copy": people["training"][4]} | strangers)
    assert audited.chance > 0.05
    assert audited.has_copies and audited.plain == 1


def test_figures_are_json_and_name_what_they_are(found):
    values = json.loads(json.dumps(found[0].to_dict()))
    assert values["copies"]["of"] == len(values["volumes"]) and values["copies"]["plain"] == 7
    assert values["threshold"]["expected_false_rate"] == pytest.approx(1 / (HELD + 1))
    assert values["training"] == {"scans": TRAINED + 1, "subjects": TRAINED}
    assert values["volumes"][0]["name"] == "exact of t3" and values["volumes"][0]["nearest_subject"] == "t3"
    assert values["membership"]["held_out"] == HELD, "a subject is attacked once"


def test_who_is_trained_on_and_held_out_is_an_error(pipeline, people):
    volumes = as_volumes(people["new"], [f"n{i}" for i in range(NEW)], pipeline)
    with pytest.raises(InputError, match="n0, n1, n10: 12 subjects are both"):
        audit(pipeline, volumes, volumes, volumes)
    nobody = as_volumes([], [], pipeline)
    with pytest.raises(InputError, match="12 training, 0 held-out and 12 synthetic"):
        audit(pipeline, volumes, nobody, volumes)


def test_lights_of_a_model_that_copies_and_of_one_that_does_not(pipeline, people, strangers):
    """Red for one copy among new people, green for these alone, amber where 5 held-out subjects say so."""
    copied, _ = run(pipeline, people, {"copy": people["training"][4]} | strangers)
    innocent, _ = run(pipeline, people, strangers)
    enough = replace(innocent, threshold=replace(innocent.threshold, counted=10, held_out=199))
    found = [[goal.verdict[0] for goal in lights(each)[:2]] for each in (copied, innocent, enough)]
    assert found == [["red", "red"], ["green", "green"], ["green", "green"]]
    few = replace(innocent, threshold=replace(innocent.threshold, counted=1, held_out=5))
    assert lights(few)[0].verdict[0] == "amber"


def test_a_model_that_crops_its_volumes_is_audited_like_any_other(pipeline, people):
    """Generated volumes are smaller than what was trained on: both are looked at without the planes that are lost."""
    cropping = copy.copy(pipeline)
    cropping.crop = ((1, 2), (0, 0), (0, 3))
    shown = {f"new {i}": cropping.cropped(volume) for i, volume in enumerate(people["new"][:4])}
    shown["copy"] = cropping.cropped(people["training"][6])
    audited, guard = run(cropping, people, shown)
    assert [each.name for each in audited.volumes if each.plain] == ["copy"] and audited.suspects[0][0].subject == "t6"
    assert audited.suspects[0][1].shape == audited.suspects[0][2].shape == (1, *cropping.output_grid.shape)
    assert guard.withheld(cropping, shown["copy"]) and not guard.withheld(cropping, shown["new 1"])
    with pytest.raises(InputError, match="bring it there"):
        descriptors_of(cropping, shown["copy"][:, 1:])


# Views


def test_views_are_what_a_moved_or_mirrored_volume_shows(pipeline, people):
    volume = torch.from_numpy(people["new"][0])
    moved = coarse_volumes(volume, SHIFTS)
    assert len(moved) == 27 and SHIFTS[0] == (0, 0, 0)
    i = SHIFTS.index((1, 0, -1))
    rolled = coarse_volumes(volume.roll((1, -1), (1, 3)))[0]
    torch.testing.assert_close(moved[i][:, 2:-2, 2:-2, 2:-2], rolled[:, 2:-2, 2:-2, 2:-2], atol=0.02, rtol=0)
    torch.testing.assert_close(coarse_volumes(volume.flip(1))[0], coarse_volumes(volume)[0].flip(1))
    one, other = (descriptors_of(pipeline, v) for v in (people["new"][0], people["new"][0][:, ::-1].copy()))
    torch.testing.assert_close(one.latent[0], other.latent[1])
    torch.testing.assert_close(one.image[0], other.image[27])
    assert one.image.shape == (54, 256) and len(descriptors_of(pipeline, people["new"][0], views=False).image) == 1


def test_projections_keep_distances(pipeline, people):
    volumes = [torch.from_numpy(v) for v in people["training"]]
    coarse = torch.cat([coarse_volumes(v) for v in volumes]).flatten(1)
    seen = torch.cat([descriptors_of(pipeline, v.numpy(), views=False).image for v in volumes])
    ratio = torch.pdist(seen) / torch.pdist(coarse)
    assert abs(ratio.mean() - 1) < 0.05 and ratio.std() < 0.08


# Distances


def on_a_line(places: list[float], subjects: list[int]) -> Reference:
    """All three spaces are the same line."""
    return Reference({space: torch.tensor(places)[:, None] for space in SPACES}, torch.tensor(subjects))


def test_ratio_and_neighbours_on_a_line():
    reference = on_a_line([0.0, 10.0, 20.0, 30.0, 30.5], [0, 1, 2, 3, 3])
    assert reference.neighbours == 2
    own_distance, own_ratio = reference.own["image"]
    assert own_distance.tolist() == [10, 10, 10, 10, 10.5], "the second scan of subject 3 is no neighbour of the first"
    assert own_ratio[0] == pytest.approx(10 / 25) and own_ratio[3] == pytest.approx(10 / 25)
    similarity = reference.similarity({space: torch.tensor([[11.0], [100.0]]) for space in SPACES})
    nearest = similarity.nearest["image"]
    assert (nearest.row, nearest.distance, nearest.row_of_distance) == (1, 1.0, 1)
    assert nearest.ratio == pytest.approx(1 / 10)  # to subject 2: 9, to subject 0: 11
    assert not reference.is_authentic(similarity, "image")
    far = reference.similarity({space: torch.tensor([[-11.0], [30.5]]) for space in SPACES})
    assert far.nearest["image"].row == 4, "the second view is on it"
    assert far.nearest["image"].distance == 11 and reference.is_authentic(far, "image")


def test_twins_among_the_training_subjects_do_not_move_what_is_usual():
    places = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    twin = torch.cat([places, places[:1]])
    one, other = (Reference(dict.fromkeys(SPACES, p), torch.arange(len(p))) for p in (places, twin))
    np.testing.assert_allclose(one.usual["image"], other.usual["image"], atol=0.1)
    assert one.similarity(dict.fromkeys(SPACES, places[:1])).score < -10


def test_too_few_training_subjects():
    with pytest.raises(InputError, match="3 training subjects are too few"):
        on_a_line([0.0, 1.0, 2.0], [0, 1, 2])


# Rates


def with_score(score: float, ratio: float = 0.9) -> Similarity:
    return Similarity(score, "image", {space: Nearest(0, ratio, 1.0, 0) for space in SPACES})


def test_threshold_is_the_kth_lowest_score_of_subjects():
    similarities = [with_score(float(i)) for i in range(99)]
    threshold = calibrate(similarities, range(99))
    assert (threshold.score, threshold.counted, threshold.false_rate) == (4.0, 5, 0.05)
    assert threshold.is_copy(with_score(3.9)) and not threshold.is_copy(with_score(4.0))
    assert threshold.is_plain(with_score(50, ratio=0.44)) and not threshold.is_plain(with_score(-50, ratio=0.46))
    few = calibrate(similarities[:5], range(5))
    assert (few.score, few.counted, few.false_rate) == (0.0, 1, pytest.approx(1 / 6))
    assert few.false_interval == pytest.approx(stats.beta.interval(0.95, 1, 5))


def test_a_subject_counts_once_however_many_scans():
    """One subject has the 10 lowest scores: as many subjects as before may be below the threshold, itself in part."""
    subjects = [0] * 10 + list(range(1, 39))
    threshold = calibrate([with_score(float(i)) for i in range(48)], subjects)
    assert (threshold.counted, threshold.held_out) == (2, 39)
    assert threshold.score == 10.0, "the first scan of another subject than the lowest one"
    p = p_values([-1.0, 4.5, 9.5, 10.5], [float(i) for i in range(48)], subjects)
    assert p == pytest.approx([1 / 40, 1.5 / 40, 2 / 40, 3 / 40])


@pytest.mark.parametrize("held_out, level", [(9, 0.05), (40, 0.05), (150, 0.02)])
def test_new_people_are_called_copies_as_often_as_said(held_out, level):
    rng, rates, chances = np.random.default_rng(0), [], []
    for _ in range(1000):
        threshold = calibrate([with_score(score) for score in rng.standard_t(3, held_out)], range(held_out), level)
        rates.append(stats.t.cdf(threshold.score, 3))
        chances.append(threshold.chance(rng.binomial(200, rates[-1]), 200))
    assert np.mean(rates) == pytest.approx(threshold.false_rate, rel=0.1)
    low, high = threshold.false_interval
    assert np.mean((low < np.array(rates)) & (np.array(rates) < high)) == pytest.approx(0.95, abs=0.02)
    assert 0.01 < np.mean(np.array(chances) < 0.05) < 0.065, "false verdicts, at any number held out"


def test_a_rate_has_the_exact_interval():
    assert Rate(0, 20).interval == pytest.approx((0, 1 - 0.025 ** (1 / 20)))
    assert str(Rate(3, 4)).startswith("3 of 4, 75.0% (19.4% to 99.4%)")


def test_a_level_that_is_no_share():
    with pytest.raises(InputError, match=r"level 0\.7"):
        calibrate([with_score(0.0)], [0], 0.7)


def test_data_copying_is_mann_whitneys_z():
    assert data_copying([1, 2, 3], [1, 2, 3]) == 0
    assert data_copying([10] * 30, [1] * 40) == pytest.approx(-1200 / 2 / math.sqrt(1200 * 71 / 12))
    rng = np.random.default_rng(0)
    z = [data_copying(rng.random(40), rng.random(60)) for _ in range(500)]
    assert abs(np.mean(z)) < 0.15 and np.std(z) == pytest.approx(1, abs=0.1)
    reference = stats.mannwhitneyu(a := rng.random(50), b := rng.random(50) + 0.2, method="asymptotic", use_continuity=False)
    assert stats.norm.sf(abs(data_copying(b, a))) * 2 == pytest.approx(reference.pvalue)


# The embedding


def test_contrastive_loss_of_known_pairs():
    one = torch.eye(2)
    assert contrastive_loss(one, one, 0.5).item() == pytest.approx(-math.log(math.e**2 / (math.e**2 + 2)))
    assert contrastive_loss(one, one.flip(0), 0.5).item() == pytest.approx(-math.log(1 / (math.e**2 + 2)))


def test_embedding_knows_altered_volumes_again(people):
    """Trained on some, it finds others of whom it has never seen anything, mirrored, moved and noisier."""
    coarse = torch.cat([coarse_volumes(torch.from_numpy(v)) for v in people["training"]])
    subjects = torch.tensor([*range(TRAINED), 0])
    embedding = train_embedding(coarse, subjects, steps=150)
    new = torch.cat([coarse_volumes(torch.from_numpy(v)) for v in people["held out"][:HELD]])
    altered = augment(new, torch.Generator().manual_seed(1))
    for seen, least in ((new.flip(1), 0.9), (altered, 0.45)):  # 0.04 by chance
        hits = (embedding(seen) @ embedding(new).T).argmax(dim=1) == torch.arange(HELD)
        assert hits.float().mean() > least
    again = train_embedding(coarse, subjects, steps=3, seed=4)
    torch.testing.assert_close(train_embedding(coarse, subjects, steps=3, seed=4)(new), again(new))


# The guard


def test_a_guard_comes_back_as_it_was_and_holds_no_volume(found, pipeline, planted, people, tmp_path):
    _, guard = found
    guard.save(tmp_path / "guard")
    again = Guard.load(tmp_path, "unsaved")
    assert again.threshold == guard.threshold
    for volume in (*planted.values(), *people["new"]):
        one, other = (g.withheld(pipeline, volume) for g in (guard, again))
        assert (one is None) == (other is None)
        assert one is None or (one["score"], one["space"]) == pytest.approx((other["score"], other["space"]))
    assert sum(again.withheld(pipeline, volume) is not None for volume in planted.values()) == len(planted)
    tensors = load_file(tmp_path / "guard/guard.safetensors")
    assert {v.shape for name, v in tensors.items() if name.startswith("features/")} == {(TRAINED + 1, 256), (TRAINED + 1, 64)}
    said = (tmp_path / "guard/guard.json").read_text()
    assert "t3" not in said and not (tensors["subjects"] == guard.reference.subjects).all(), "an order of its own"


def test_a_guard_of_before_volumes_had_channels_is_read(found, pipeline, planted, tmp_path):
    found[1].save(tmp_path)
    path = tmp_path / "guard.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"coarse": description["coarse"][1:]}))
    assert Guard.load(tmp_path, "unsaved").withheld(pipeline, planted["exact of t3"])


def test_a_strange_or_damaged_guard_is_refused(found, tmp_path):
    with pytest.raises(InputError, match="no audit in"):
        Guard.load(tmp_path, "unsaved")
    found[1].save(tmp_path)
    with pytest.raises(InputError, match="is an audit of model 'unsaved', and this is model 0123"):
        Guard.load(tmp_path, "0123")
    description = (tmp_path / "guard.json").read_text()
    for change in (
        {"threshold": {}},
        {"coarse": [10**6] * 3},
        {"coarse": [12, 14]},
        {"usual": {"image": [0, 1]}},
        {"usual": 3},
    ):
        (tmp_path / "guard.json").write_text(json.dumps(json.loads(description) | change))
        with pytest.raises(InputError, match="damaged"):
            Guard.load(tmp_path, "unsaved")
    (tmp_path / "guard.json").write_text(description)
    tensors = load_file(tmp_path / "guard.safetensors")
    subjects, image = tensors["subjects"], tensors["features/image"]
    strange = ({"subjects": subjects + 10**12}, {"subjects": subjects[:5]}, {"subjects": subjects.float()})
    for change in (*strange, {"features/image": image[:, :9].contiguous()}, {"features/image": image * torch.nan}):
        save_file(tensors | change, tmp_path / "guard.safetensors")
        with pytest.raises(InputError, match="damaged"):
            Guard.load(tmp_path, "unsaved")
    (tmp_path / "guard.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="damaged"):
        Guard.load(tmp_path, "unsaved")


ROWS = [{"age": 20.0 + 5 * i, "sex": "FM"[i % 2]} for i in range(8)]
KEPT_BACK = (2, 5)


class StubGuard:
    """Withholds the volumes that it was told of."""

    identity = {"audit": "0123", "threshold": -3.0}  # noqa: RUF012 (never changed)

    def __init__(self, volumes):
        self.copies = {volume.tobytes() for volume in volumes}

    def withheld(self, pipeline, volume):
        return {"score": -9.0, **self.identity} if volume.tobytes() in self.copies else None


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return Pipeline.from_pretrained(folder, device="cpu")


@pytest.fixture
def guarded(generator, tmp_path, monkeypatch) -> tuple[Path, StubGuard]:
    """A series of eight of which two are withheld."""
    monkeypatch.setattr(series_format, "MOSAIC_VOLUMES", 3)
    rows = generator.parse(ROWS)
    volumes = list(generator.volumes(rows, generator.sampling))
    guard = StubGuard([volumes[i] for i in KEPT_BACK])
    tally = generate(generator, tmp_path / "guarded", rows, generator.sampling, guard=guard)
    assert (tally.made, tally.withheld, tally.missing) == (8, 2, 0)
    return tmp_path / "guarded", guard


def test_withheld_volumes_are_not_written_and_the_rest_is_as_without(guarded, generator, tmp_path):
    folder, _ = guarded
    generate(generator, tmp_path / "all", generator.parse(ROWS), generator.sampling)
    for i in range(8):
        path, plain = synthetic_path(folder, i), synthetic_path(tmp_path / "all", i)
        assert path.exists() == (i not in KEPT_BACK)
        assert i in KEPT_BACK or path.read_bytes() == plain.read_bytes()
    table = pd.read_csv(folder / "participants.tsv", sep="\t")
    assert list(table["participant_id"]) == [f"sub-syn{i + 1:04d}" for i in range(8) if i not in KEPT_BACK]
    assert list(table["age"]) == [ROWS[i]["age"] for i in range(8) if i not in KEPT_BACK]
    said = json.loads((folder / "withheld/sub-syn0003_desc-synthetic_T1w.json").read_text())
    assert said["withheld"] == {"score": -9.0, "audit": "0123", "threshold": -3.0} and said["sample"] == 2
    kept = json.loads(Path(str(synthetic_path(folder, 0)).replace(".nii.gz", ".json")).read_text())
    assert kept["guard"] == StubGuard.identity and "withheld" not in kept
    assert bids_errors(folder) == []


def test_a_guarded_series_goes_on_and_mends_itself(guarded, generator, tmp_path):
    folder, guard = guarded
    rows, before = generator.parse(ROWS), digests(folder)

    def again(**options):
        return generate(generator, folder, rows, generator.sampling, guard=guard, **options)

    tally = again()
    assert (tally.kept, tally.made, tally.redone, tally.withheld) == (8, 0, 0, 2)
    (folder / "withheld/sub-syn0003_desc-synthetic_T1w.json").write_text("{")
    (folder / "withheld/sub-syn0006_desc-synthetic_T1w.json").unlink()
    synthetic_path(folder, 0).write_bytes(b"")
    tally = again()
    assert (tally.kept, tally.made, tally.redone, tally.missing) == (5, 1, 2, 0) and digests(folder) == before
    write_volume(synthetic_path(folder, 2), np.ones((1, 4, 4, 4), np.float32), np.eye(4))  # back by mistake
    assert again().redone == 1 and digests(folder) == before
    sidecar = synthetic_path(folder, 2).with_name("sub-syn0003_desc-synthetic_T1w.json")
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    sidecar.write_text("{}")  # of a withheld volume, alone
    assert again().redone == 1 and digests(folder) == before
    for rank in (1, 0):
        generate(generator, tmp_path / "shared", rows, generator.sampling, processes=Processes(rank, 2), guard=guard)
    assert digests(tmp_path / "shared") == before
    with pytest.raises(InputError, match=r"guard.* -> None"):
        generate(generator, folder, rows, generator.sampling)


def test_everything_withheld_leaves_no_dataset_and_no_work(generator, tmp_path):
    rows = generator.parse(ROWS[:2])
    guard = StubGuard(list(generator.volumes(rows, generator.sampling)))
    for _ in range(2):
        tally = generate(generator, tmp_path / "out", rows, generator.sampling, guard=guard)
        assert (tally.withheld, tally.missing) == (2, 0)
    assert not (tmp_path / "out/participants.tsv").exists() and not list((tmp_path / "out").rglob("*.nii.gz"))


# What is looked at


def test_half_of_the_requests_are_training_subjects_own(pipeline):
    ages = {TRAINING: [20.0, 30.0, 40.0], HELD_OUT: [60.0, 70.0]}
    groups = [of_subjects(["a"] * len(v), [{"age": age} for age in v], v.__getitem__, pipeline) for v in ages.values()]
    made = generated_for(pipeline, *groups, 9, pipeline.sampling.replace(steps=1))
    assert list(made.asked) == [TRAINING] * 5 + [HELD_OUT] * 4
    assert {row["age"] for row in made.rows[:3]} == {20.0, 30.0, 40.0} and {row["age"] for row in made.rows[5:7]} == {
        60.0,
        70.0,
    }
    whole = [v.tobytes() for v in made.read(range(9))]
    assert [v.tobytes() for v in made.read([7])] == whole[7:8], "a volume can be made again alone"


def test_volumes_of_another_grid_are_refused(pipeline, tmp_path):
    with pytest.raises(InputError, match="no synthetic T1w volume in"):
        written_in(tmp_path, pipeline)
    write_volume(synthetic_path(tmp_path, 0), RNG.random((1, *SHAPE), np.float32), np.eye(4))
    with pytest.warns(UserWarning, match=r"1 of 1 volumes in .* are not by this model"):
        volumes = written_in(tmp_path, pipeline)
    with pytest.raises(InputError, match="lies elsewhere than the model's own volumes"):
        list(volumes.read([0]))


# The command


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """An experiment with a model that was never trained, which the command cannot know."""
    folder = tmp_path_factory.mktemp("experiment")
    never = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    write_dataset(folder / "data", subjects=16, shape=(16, 16, 16), seed=3, workers=1)
    settings = {
        "name": "tiny",
        "output": str(folder),
        "data": {
            "bids": str(folder / "data"),
            "grid": {"shape": [16, 16, 16], "spacing_mm": 13.5},
            "splits": {"validation": 0.2, "test": 0.4},
        },
        "covariates": [
            {"name": "age", "kind": "continuous"},
            {"name": "sex", "kind": "categorical", "categories": ["F", "M"]},
        ],
        "autoencoder": {"network": {"latent_channels": 2, "downsampling": 4, "channels": [4, 8]}, "training": never},
        "diffusion": {"network": {"channels": [16, 32], "attention": [False, True]}, "training": never},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command_line("prepare", folder / "config.yaml", "--workers", 1)
    make_pipeline().save_pretrained(folder / "model")
    save_experiment(load_config(folder / "config.yaml"), folder / "model")
    return folder


def test_validation_subjects_are_neither_trained_on_nor_held_out(experiment, tmp_path):
    _, training, held_out = scans_by_use(experiment / "model", experiment / "data", tmp_path)
    assert set(training["split"]) == {"train"} and set(held_out["split"]) == {"test"}
    assert (len(training), len(held_out)) == (7, 6)


def test_audit_and_guarded_generation_by_command(experiment, tmp_path, capsys):
    out, model = tmp_path / "audit", experiment / "model"
    command_line("audit", model, "--data", experiment / "data", "--out", out, "--num", 6, "--steps", 1)
    said = capsys.readouterr().out
    values = json.loads((out / "audit.json").read_text())
    assert said.strip().endswith(values["verdict"]) and "AuthPct" in said
    assert values["training"] == {"scans": 7, "subjects": 7} and values["threshold"]["held_out"] == 6
    assert values["copies"]["by_covariates_of"].keys() == {TRAINING, HELD_OUT} and values["membership"]["training"] == 7
    page = (out / "report.html").read_text()
    assert "keep it as you keep the training data" in page and "data:image/png;base64," in page
    assert (out / "pairs.png").stat().st_size > 10_000

    guard = json.loads((out / "guard/guard.json").read_text())
    for score, withheld in ((-1e9, 0), (1e9, 2)):
        guard["threshold"] |= {"score": score, "lowest": dict.fromkeys(SPACES, 0.0)}
        (out / "guard/guard.json").write_text(json.dumps(guard))
        folder = tmp_path / str(withheld)
        command_line("generate", model, "--num", 2, "--out", folder, "--audit", out, "--device", "cpu")
        assert len(list(folder.rglob("*.nii.gz"))) == 2 - withheld
    said = capsys.readouterr().out
    assert "2 synthetic volumes written" in said and "2 of 2 withheld: too near to a training subject" in said

    command_line("audit", model, "--data", experiment / "data", "--out", tmp_path / "again", "--synthetic", tmp_path / "0")
    values = json.loads((tmp_path / "again/audit.json").read_text())
    assert {each["name"] for each in values["volumes"]} == {"sub-syn0001", "sub-syn0002"}


@pytest.mark.slow
def test_two_processes_audit_as_one(experiment, tmp_path):
    asked = ["audit", experiment / "model", "--data", experiment / "data", "--volumes", 6, "--steps", 1]
    command_line(*asked, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ldm3d"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    arguments = map(str, [*command, *asked, "--out", tmp_path / "two"])
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.count("page written") == 1, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "audit.json").read_text()) for name in ("one", "two"))
    assert {each["name"] for each in one["volumes"]} == {each["name"] for each in two["volumes"]}
    assert two["held_out_scores"] == pytest.approx(one["held_out_scores"], rel=0.05, abs=0.1)
    assert two["threshold"]["lowest"] == pytest.approx(one["threshold"]["lowest"], rel=0.02)


# A model that has learned its subjects by heart


@pytest.mark.slow
def test_a_model_overfitted_on_eight_subjects_is_caught(people):
    """Trained until it knows nothing but eight volumes; a stand-in that draws new people's volumes is not."""
    trained = people["training"][:8]
    pipeline = linear_pipeline(trained, channels=8)
    overfit(pipeline, trained)
    training = of_subjects(
        [f"t{i}" for i in range(8)], [{"age": 20.0 + 8 * i} for i in range(8)], trained.__getitem__, pipeline
    )
    held_out = as_volumes(people["held out"][:HELD], [f"h{i}" for i in range(HELD)], pipeline)
    made = generated_for(pipeline, training, held_out, 24, pipeline.sampling)
    caught, _ = audit(pipeline, training, held_out, made)
    assert caught.has_copies, caught.verdict
    assert caught.copies(TRAINING).value > 0.8 and caught.copied_subjects.count >= 6
    assert caught.spaces["latent"].c_t < -3 and caught.spaces["image"].c_t < -3
    assert caught.membership.auc > 0.95 and caught.membership.chance < 0.01
    spared, _ = audit(pipeline, training, held_out, as_volumes(people["new"], [f"n{i}" for i in range(NEW)], pipeline))
    assert not spared.has_copies, spared.verdict


def overfit(pipeline: Pipeline, volumes: list[np.ndarray], steps: int = 1500) -> None:
    """Train the U-Net on these volumes alone, asked for by age, in plain torch."""
    unet, process, rng = pipeline.unet.requires_grad_(True), pipeline.process, torch.Generator().manual_seed(0)
    with torch.no_grad():
        x = pipeline.autoencoder.encode_stage_2_inputs(torch.from_numpy(np.stack(volumes)))
    context = pipeline.schema.encode(pipeline.parse([{"age": 20.0 + 8 * i} for i in range(len(volumes))]))
    padded = pipeline.unet.padded_shape(x.shape[2:])
    assert tuple(padded) == tuple(x.shape[2:])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        t, noise = torch.rand(len(x), generator=rng), torch.randn(x.shape, generator=rng)
        output = unet(process.add_noise(x, noise, t), 1000 * t, context)
        loss = (output - process.target("v", x, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    unet.requires_grad_(False)
