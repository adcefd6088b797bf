"""Membership inference: known answers where the loss is known, and no alarm where there is nothing to tell."""

import re

import numpy as np
import pytest
import torch
from torture.generation import make_pipeline

from ldm3d.errors import InputError
from ldm3d.privacy.membership import REPEATS, TIMES, infer_members, losses_of
from ldm3d.report.sections.audit import _membership_light


def losses(subjects: int, mean: float, seed: int) -> np.ndarray:
    """Hard times have larger losses; a subject's differ together."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((subjects, 1)) + 0.2 * rng.standard_normal((subjects, len(TIMES)))
    return np.linspace(1, 50, len(TIMES)) * (10 + own + mean)


def test_members_with_lower_losses_are_named():
    found = infer_members(losses(40, -8, 1), losses(99, 0, 2))
    assert found.named == 40 and found.accused == 1 and found.false_positive_rate == 0.01
    assert found.auc == 1 and found.chance < 1e-10
    worse = infer_members(losses(40, 8, 1), losses(99, 0, 2))
    assert worse.named == 0 and worse.auc == 0, "a higher loss is no sign of a member"


def test_true_positives_are_counted_at_the_false_positive_rate():
    """One time that decides: 3 of 10 members are below the second lowest of 199 others."""
    members = np.full((10, len(TIMES)), 900.0) + np.arange(10)[:, None]
    members[:3] = 1.2
    others = np.full((199, len(TIMES)), 1.0) * np.arange(1, 200)[:, None]
    found = infer_members(members, others)
    assert (found.accused, found.false_positive_rate, found.named) == (2, 0.01, 3)
    few = infer_members(members, others[:20])
    assert (few.accused, few.false_positive_rate, few.named) == (1, pytest.approx(1 / 21), 0)


def test_no_alarm_by_chance_and_intervals_that_hold():
    alarms, holds = [], []
    for seed in range(300):
        found = infer_members(losses(60, 0, 2 * seed), losses(50, 0, 2 * seed + 1))
        alarms.append(found.chance < 0.05)
        holds.append(found.auc_low <= 0.5 <= found.auc_high)
    assert np.mean(alarms) <= 0.08
    assert 0.91 <= np.mean(holds) <= 0.99


def test_the_auc_is_the_share_of_pairs():
    members, others = (np.repeat(np.array(v, float)[:, None], len(TIMES), 1) for v in ([1, 2, 6], [2, 5]))
    assert infer_members(members, others).auc == pytest.approx((2 + 1.5 + 0) / 6)


def test_times_count_alike_however_large_their_losses():
    members, others = losses(30, -1, 1), losses(30, 0, 2)
    one, other = (infer_members(members * scale, others * scale) for scale in (1, np.logspace(-5, 5, len(TIMES))))
    assert one.named == other.named and one.auc == other.auc and 0.6 < one.auc < 1


def test_losses_of_a_network_that_answers_zero_are_the_targets_own(monkeypatch):
    pipeline = make_pipeline()
    pipeline.target = "data"
    monkeypatch.setattr(pipeline.unet, "forward", lambda z, t, context: torch.zeros_like(z))
    volume, row = np.random.default_rng(0).random((1, 16, 16, 16), dtype=np.float32), pipeline.parse([{}])[0]
    x = pipeline.autoencoder.encode_stage_2_inputs(torch.from_numpy(volume)[None])
    np.testing.assert_allclose(losses_of(pipeline, volume, row), x.square().mean().item(), rtol=1e-5)
    pipeline.target = "noise"
    found = losses_of(pipeline, volume, row)
    np.testing.assert_allclose(found, 1, atol=0.35)
    # Everybody meets the same noise; but for the rounding of z, from which it is found again
    np.testing.assert_allclose(found, losses_of(pipeline, np.zeros_like(volume), row), rtol=1e-6)
    assert len(set(found)) == len(TIMES) and (losses_of(pipeline, volume, row, seed=1) != found).all()


def test_a_network_is_told_time_and_covariates(monkeypatch):
    pipeline, told = make_pipeline(), []

    def listen(z, t, conditions):
        told.append((t.item(), conditions.covariates))
        return torch.zeros_like(z)

    monkeypatch.setattr(pipeline.unet, "forward", listen)
    row = pipeline.parse([{"age": 70, "sex": "F"}])[0]
    losses_of(pipeline, np.zeros((1, 16, 16, 16), np.float32), row)
    assert [t for t, _ in told] == pytest.approx([1000 * t for t in TIMES for _ in range(REPEATS)])
    assert all(torch.equal(context, pipeline.schema.encode([row])) for _, context in told)


def test_too_few_to_attack():
    with pytest.raises(InputError, match="1 training and 5 held-out subjects"):
        infer_members(losses(1, 0, 0), losses(5, 0, 0))


def light(shift: float, subjects: int = 200, seed: int = 0) -> tuple[str, str]:
    """The page's light and words, where training subjects' losses are lower by so many deviations."""
    return _membership_light(infer_members(losses(subjects, -shift, 2 * seed), losses(subjects, 0, 2 * seed + 1))).verdict


def test_a_model_that_remembers_nobody_is_green_and_is_told_with_its_auc():
    """As many subjects as the audit attacks: one in thirteen may be another colour by chance."""
    found = [light(0, seed=seed) for seed in range(60)]
    assert [colour for colour, _ in found].count("green") >= 48  # 55.5 expected
    assert all(re.search(r"AUC 0\.\d{3} \(0\.\d{3} to 0\.\d{3}\)$", words) for _, words in found)


def test_a_loss_that_is_lower_for_most_is_red_though_it_names_nobody():
    """An AUC of 0.64, as of a model that has seen its subjects often: nobody is below the lowest held-out subject."""
    members, others = losses(200, -0.5, 1), losses(200, 0, 2)
    others[:3] = members.min() - 100  # strangers with the lowest losses of all
    found = infer_members(members, others)
    assert found.named == 0 and 0.58 < found.auc < 0.7 and found.auc_low > 0.5
    colour, words = _membership_light(found).verdict
    assert colour == "red" and words.startswith("training subjects have lower losses; AUC 0.6")


@pytest.mark.parametrize(
    "shift, subjects, colour, words",
    [
        (8, 200, "red", "more than by chance"),
        (-1, 200, "amber", "the groups differ in other respects"),
        (0, 20, "amber", "20 training and 20 held-out subjects are too few to tell"),
    ],
)
def test_other_lights_of_membership(shift, subjects, colour, words):
    found = light(shift, subjects)
    assert found[0] == colour and words in found[1]


def test_two_of_either_give_nobody_away_by_chance():
    """The interval of DeLong has no width where two are below two, which one in six are by chance."""
    found = infer_members(losses(2, -8, 1), losses(2, 0, 2))
    assert found.auc == 1 and found.auc_chance > 0.05 and _membership_light(found).verdict[0] == "amber"
