"""Conditions: what is stacked, left open and moved."""

import pytest
import torch

from ldm3d.models.conditioning import Conditions

COVARIATES = torch.arange(1.0, 13).reshape(2, 3, 2)
IMAGES, KNOWN = torch.ones(2, 4, 2, 3, 2), torch.ones(2, 4, 1, 1, 1)


def test_batches_are_stacked():
    both = Conditions(COVARIATES, IMAGES, KNOWN) + Conditions(-COVARIATES, 0 * IMAGES, 0 * KNOWN)
    assert len(both) == 4
    assert torch.equal(both.covariates, torch.cat([COVARIATES, -COVARIATES]))
    assert both.images.flatten(1).sum(1).tolist() == [48, 48, 0, 0]
    assert both.known.flatten(1).sum(1).tolist() == [4, 4, 0, 0]


def test_what_is_left_open_is_zero_and_the_rest_stays():
    given = Conditions(COVARIATES, IMAGES, KNOWN)
    opened = given.open()
    assert not any(part.any() for part in (opened.covariates, opened.images, opened.known))
    second = given.open([1], images=False)
    assert not second.covariates[:, 1].any()
    assert torch.equal(second.covariates[:, [0, 2]], COVARIATES[:, [0, 2]])
    assert torch.equal(second.images, IMAGES) and torch.equal(second.known, KNOWN)


def test_moves_all_parts():
    moved = Conditions(COVARIATES, IMAGES, KNOWN).to(torch.bfloat16)
    assert {part.dtype for part in (moved.covariates, moved.images, moved.known)} == {torch.bfloat16}
    assert Conditions(COVARIATES).to("cpu").images is None


def test_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match="go together"):
        Conditions(COVARIATES, IMAGES)
    with pytest.raises(ValueError, match="different kinds"):
        Conditions(COVARIATES) + Conditions(COVARIATES, IMAGES, KNOWN)
    with pytest.raises(ValueError, match="different kinds"):
        Conditions(COVARIATES) + Conditions(COVARIATES[:, :2])
