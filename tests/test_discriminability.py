"""The classifier two-sample test: chance where there is nothing to tell, certainty where there is grain."""

import pytest
import torch
import torch.nn.functional as F

from ldm3d.errors import InputError
from ldm3d.metrics.discriminability import classifier_auc


def blobs(count, seed, grain=0.0):
    """Smooth random volumes (N, 1, 16, 16, 16), with white noise of a standard deviation added."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, 5, generator=random)
    smooth = F.interpolate(coarse, (16, 16, 16), mode="trilinear", align_corners=True)
    return (smooth + grain * torch.randn(smooth.shape, generator=random)).clamp(0, 1)


def test_sets_of_one_kind_cannot_be_told_apart():
    assert 0.3 < classifier_auc(blobs(40, 0), blobs(40, 1), folds=2, steps=60) < 0.7  # +-3 standard errors of 40 + 40


def test_a_little_grain_is_found():
    assert classifier_auc(blobs(40, 0), blobs(40, 1, grain=0.03), folds=2, steps=60) > 0.9


def test_numbers_follow_from_the_seed():
    one, other = blobs(10, 0), blobs(12, 1)
    assert classifier_auc(one, other, folds=2, steps=3, seed=1) == classifier_auc(one, other, folds=2, steps=3, seed=1)


def test_few_volumes_are_refused():
    with pytest.raises(InputError, match="9 and 20"):
        classifier_auc(blobs(9, 0), blobs(20, 1))
