"""The Gaussian beside a training: its own denoiser equals it, an untrained one is worse, a perfect one better."""

import pytest
import torch

from ldm3d.diffusion.schedules import make_process
from ldm3d.training.ruler import LEVELS, MAX_VALUES, MOST, GaussianRuler, few_enough, in_words

PROCESS = make_process("flow")


@pytest.fixture(scope="module")
def ruler():
    random = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 2, 4, 4, 4, generator=random)
    scores = torch.randn(120, 4, generator=random)
    x = torch.einsum("nk,kcxyz->ncxyz", scores, patterns) + 0.1 * torch.randn(120, 2, 4, 4, 4, generator=random)
    return GaussianRuler(x[:104], x[104:], PROCESS)


def errors(found, kind):
    return [found[f"{kind}_error_{level:g}"] for level in LEVELS]


def test_the_gaussian_s_denoiser_is_its_own_equal(ruler):
    found = ruler.compare(ruler.gaussian.denoiser(PROCESS))
    assert errors(found, "denoising") == pytest.approx(errors(found, "gaussian"))
    assert errors(found, "gaussian") == sorted(errors(found, "gaussian"))  # more noise, more error
    assert errors(found, "gaussian")[0] < 0.01 < errors(found, "gaussian")[-1] < 1


def test_what_knows_nothing_is_worse_and_what_knows_the_answer_is_better(ruler):
    nothing = ruler.compare(lambda z, t: torch.zeros_like(z))
    everything = ruler.compare(lambda z, t: ruler.held_out)
    assert all(own > best for own, best in zip(errors(nothing, "denoising"), errors(nothing, "gaussian")))
    assert errors(nothing, "denoising") == pytest.approx([1] * len(LEVELS), rel=0.3)
    assert errors(everything, "denoising") == [0] * len(LEVELS)
    assert in_words(nothing).count("(") == 1 + len(LEVELS)


def test_too_few_latents_and_too_large_ones():
    assert few_enough(19, 10) == 0 and few_enough(20, 10) == 20 and few_enough(10**6, 10) == MOST
    assert few_enough(1000, MAX_VALUES // 30) == 30 and few_enough(1000, MAX_VALUES // 10) == 0
