"""Explanations: a change that is not there is not found, one that is there is found there; attention is what was used."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command_line
from scipy import stats
from torture.generation import make_pipeline

from ldm3d import figures
from ldm3d.errors import InputError
from ldm3d.evaluation.explanation import ALL, FAMILY_WISE_ERROR, _attention, explain, sign_flip_test
from ldm3d.geometry import Grid
from ldm3d.models.attention_maps import AttentionMaps, recorded
from ldm3d.models.blocks import TransformerBlock
from ldm3d.models.unet import UNet

CUBE = (slice(2, 5), slice(6, 8), slice(1, 3))


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# The test


@pytest.mark.parametrize("patterns", [2048, 200])
def test_of_one_voxel_it_is_the_known_sign_flip_test(patterns):
    """Against scipy's, which looks at all patterns; and the paired t against scipy's."""
    differences = random(9, 1) + 0.6
    t, p = sign_flip_test(differences, patterns)
    assert t[0] == pytest.approx(stats.ttest_1samp(differences[:, 0], 0).statistic, rel=1e-5)
    known = stats.permutation_test(
        (differences[:, 0].astype(float),),
        lambda d, axis: np.abs(d.mean(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=np.inf,
        vectorized=True,
    )
    assert 0.01 < known.pvalue < 0.3
    assert p[0] == pytest.approx(known.pvalue, abs=1e-6 if patterns > 256 else 0.08)


def test_p_is_the_rank_of_the_largest_t():
    """By the definition, pattern after pattern, on voxels that have to do with each other."""
    differences = random(7, 40)
    differences = (differences + 2 * random(7, 1, seed=1) + np.where(np.arange(40) < 3, 1.5, 0)).astype(np.float32)
    t, p = sign_flip_test(differences.reshape(7, 5, 4, 2))
    assert t.shape == p.shape == (5, 4, 2)
    largest = []
    for pattern in range(2**7):
        signs = np.array([1 if pattern >> bit & 1 else -1 for bit in range(7)])[:, None]
        largest.append(np.abs(stats.ttest_1samp(signs * differences.astype(float), 0).statistic).max())
    expected = [
        np.mean(np.array(largest) >= abs(value) - 1e-6) for value in stats.ttest_1samp(differences.astype(float), 0)[0]
    ]
    np.testing.assert_allclose(p.ravel(), expected, atol=1e-6)
    assert len(np.unique(p)) > 5


def test_without_a_change_a_map_is_false_no_more_often_than_stated():
    """400 maps of smooth noise: the family-wise error, but for chance, is the share with any significant voxel."""
    found = 0
    for i in range(400):
        noise = random(8, 60, seed=i)
        found += (sign_flip_test(noise + np.roll(noise, 1, axis=1))[1] <= FAMILY_WISE_ERROR).any()
    assert 0.015 < found / 400 < FAMILY_WISE_ERROR + 3 * (FAMILY_WISE_ERROR * (1 - FAMILY_WISE_ERROR) / 400) ** 0.5


def test_what_does_not_move_is_never_significant():
    still = np.zeros((8, 10), np.float32)
    still[:, 0] = 1e-6  # of one sign in all seeds: rounding
    still[:, 1] = 0.01
    t, p = sign_flip_test(still)
    assert (t[0], p[0]) == (0, 1) and p[1] == 2**-7
    assert np.isfinite(t).all() and t[1] > 1000


# Changes of a request


class Planted:
    """A pipeline whose volumes are brighter in a cube with age, and a little different everywhere in every call."""

    grid = output_grid = Grid.centred((8, 9, 6), (2.0, 2.0, 2.0))
    group_size, unet, schema = 4, torch.nn.Identity(), ("age", "sex")

    def __init__(self):
        self.calls = []

    def parse(self, rows):
        return [{name: row.get(name) for name in ("age", "sex")} for row in rows]

    def volumes(self, requests, sampling):
        self.calls.append(requests[0])
        for number, row in enumerate(requests):
            volume = (
                0.5 + 0.1 * random(1, 8, 9, 6, seed=number) + 0.002 * random(1, 8, 9, 6, seed=100 * len(self.calls) + number)
            )
            volume[0][CUBE] += (row["age"] - 60) / 20 * (0.1 + 0.02 * random(seed=number))
            yield volume


SAMPLING = SimpleNamespace(guidance=1.0, seed=0)


def test_a_planted_change_is_found_there_and_only_there():
    pipeline = Planted()
    found = explain(pipeline, {"age": 60, "sex": "F"}, {"age": 80, "sex": "M"}, SAMPLING, seeds=8)
    assert [contrast.name for contrast in found.contrasts] == ["age", "sex", ALL]
    assert pipeline.calls == [{"age": a, "sex": s} for a, s in ((60, "F"), (80, "F"), (60, "M"), (80, "M"))]
    cube = np.zeros((1, 8, 9, 6), bool)
    cube[0][CUBE] = True
    age, sex, both = found.contrasts
    assert (age.significant == cube).all() and (both.significant == cube).all()
    assert not sex.significant.any()
    assert age.difference[cube].mean() == pytest.approx(0.1, abs=0.02) and age.t[cube].min() > 5
    assert not found.attention
    # The noise differs from seed to seed by 0.1, and by as much in every voxel
    assert found.deviation.mean() == pytest.approx(0.1, rel=0.1) and found.deviation.shape == (1, 8, 9, 6)
    said = age.to_dict(pipeline.grid)
    assert said["notably_brighter_ml"] == said["significant_ml"] == pytest.approx(cube.sum() * 0.008)
    assert said["notably_darker_ml"] == 0
    assert said["largest_change_at_mm"][0] in [2 * i - 7 for i in range(2, 5)]


def test_where_the_network_is_never_called_there_is_no_attention():
    """One step from a start: the Gaussian answers it alone."""
    pipeline = make_pipeline()
    pipeline.latents = lambda requests, sampling, positions: torch.zeros(len(requests), 1)
    assert _attention(pipeline, {"age": 40}, pipeline.sampling, 2) == ({}, 0)


def test_of_a_covariate_without_effect_nothing_is_found():
    """A real pipeline with random weights that have forgotten one of the covariates: not a voxel differs."""
    pipeline = make_pipeline()
    for parameter in pipeline.unet.tokens.embed[1].parameters():
        parameter.zero_()
    found = explain(pipeline, {"age": 40, "sex": "F"}, {"age": 70, "sex": "M"}, pipeline.sampling, seeds=6)
    age, sex, both = found.contrasts
    assert not sex.difference.any() and (sex.p == 1).all()
    assert np.abs(age.difference).max() > 0.002 and age.p.min() < 1
    np.testing.assert_array_equal(both.difference, age.difference)
    assert set(found.attention) == {"age", "sex"} and found.attention_voxels == 8
    np.testing.assert_allclose(found.attention["age"] + found.attention["sex"], 1, atol=1e-5)


@pytest.mark.parametrize(
    "before, changes, options, message",
    [
        ({"age": 60}, {"age": 60.0}, {}, "changes nothing"),
        ({"age": 60}, {}, {}, "changes nothing"),
        ({"age": 60}, {"age": 70}, {"seeds": 5}, "5 seeds have 16 patterns .* below 0.0625; ask for 6"),
        ({"age": 60}, {"aeg": 70}, {}, "did you mean 'age'"),
    ],
)
def test_requests_that_explain_nothing(before, changes, options, message):
    pipeline = make_pipeline()
    with pytest.raises(InputError, match=message):
        explain(pipeline, before, changes, pipeline.sampling, **options)


def test_guidance_0_is_refused():
    pipeline = make_pipeline()
    with pytest.raises(InputError, match="guidance 0 ignores"):
        explain(pipeline, {"age": 60}, {"age": 70}, pipeline.sampling.replace(guidance=0))


# Attention


def small_unet(levels=(True, True)):
    torch.manual_seed(0)
    unet = UNet(2, 2, [0, 2, 0], [8, 16], 1, levels, head_channels=8, context_dim=8)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return unet.eval()


def test_recorded_weights_are_those_that_were_used():
    """With one head the weights times the values are what went into the block's output, whichever kernel computed that."""
    unet, seen = small_unet((True, False)), []
    with recorded(unet, 2) as maps, torch.no_grad():
        attention = unet.down[0][0].transformer.cross_attention
        attention.register_forward_hook(lambda _, inputs, output: seen.append((inputs[1], output)))
        unet(torch.randn(4, 2, 5, 4, 3), torch.full((4,), 300.0), torch.tensor([[[0.5, 1], [1, 1], [0, 0]]] * 4))
        shares = maps._sums[unet.down[0][0].transformer]  # (2, 3, 5, 4, 3)
        tokens, output = seen[0]  # (4, 3, 8), (4, 60, 8)
        values = attention.key_value(tokens).chunk(2, dim=-1)[1][:2]
        used = torch.einsum("nkxyz,nkc->nxyzc", shares, values).flatten(1, 3)
        torch.testing.assert_close(attention.out(used), output[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 5, 4, 3))
    assert shares.std() > 0.01


def test_neighbouring_tokens_are_one_covariates():
    """Of two tokens a covariate, the first one's are 0 and have no value: what comes out is the second one's share."""
    torch.manual_seed(0)
    block, maps, seen = TransformerBlock(8, 8, 8), AttentionMaps(1, 2), []
    maps.record(block, 0)
    attention = block.cross_attention
    torch.nn.init.eye_(attention.out.weight)
    attention.register_forward_hook(lambda _, inputs, output: seen.append(output))
    token = torch.randn(8)
    with torch.no_grad():
        block(torch.randn(1, 8, 3, 2, 2), torch.stack([0 * token, 0 * token, token, token])[None])
        value = attention.key_value(token).chunk(2)[1]
    share = maps._sums[block][0, 1].flatten()  # (12,)
    torch.testing.assert_close(share[:, None] * value, seen[0][0])
    assert 0.05 < share.min() < share.max() < 0.95 and share.std() > 0.01


def test_maps_lie_where_the_network_looked():
    """One position of a level that halves an odd latent grid, on the volume's grid."""
    unet = small_unet((False, True))
    with recorded(unet, 1) as maps, torch.no_grad():
        unet(torch.randn(1, 2, 5, 4, 3), torch.tensor([300.0]))
    assert maps.coarsest == 2
    for block in maps._sums:
        share = torch.full((1, 3, 3, 2, 2), 0.2)
        share[0, 1, 2, 0, 1], share[0, 0, 2, 0, 1] = 0.7, 0.1
        maps._sums[block], maps._calls[block] = 3 * share, 3
    found = maps.mean((20, 16, 12), factor=4)  # positions of the level are blocks of 8 voxels; the last juts out by half
    assert found.shape == (1, 3, 20, 16, 12)
    # A voxel's centre is 1 / 16 of a block away from the block's, towards its neighbours along x and z; along y there is none
    assert found[0, 1, 19, 3, 11] == found[0, 1].max() == pytest.approx(0.2 + 0.5 * (15 / 16) ** 2, abs=1e-5)
    assert found[0, 1, 12, 3, 11] == pytest.approx(0.2 + 0.5 * 1 / 16 * 15 / 16, abs=1e-5)
    assert found[0, 1, 0, 12, 0] == pytest.approx(0.2)


def test_recording_ends_and_changes_nothing():
    unet, x, t = small_unet(), torch.randn(1, 2, 4, 4, 4), torch.tensor([300.0])
    with torch.no_grad():
        plain = unet(x, t)
        with recorded(unet, 1) as maps:
            torch.testing.assert_close(unet(x, t), plain, rtol=0, atol=0)
            calls = dict(maps._calls)
        assert torch.equal(unet(x, t), plain)
    assert len(calls) == 4 and maps._calls == calls
    with recorded(torch.nn.Identity(), 1) as none:
        assert none is None
    assert isinstance(maps, AttentionMaps)


# The picture


def test_colours_of_changes_are_even_about_0_and_others_are_not():
    values = np.zeros((1, 9, 9, 9), np.float32)
    values[0, 4, 2:7, 2:7], values[0, 2:7, 4, 2:7] = 0.1, -0.3
    for signed, expected in ((True, (-0.3, 0.3)), (False, (-0.3, 0.1))):
        picture, bar = figures.overlay(values, values, (1, 1, 1), "t", "l", signed, values > 0).axes
        assert bar.get_ylim() == pytest.approx(expected, abs=0.01) and bar.get_ylabel() == "l"
        opacity = picture.images[1].get_alpha()
        assert opacity.shape == picture.images[1].get_array().shape and opacity.max() > 0.5
        assert bool(opacity.min() == 0) is signed


# The command


def test_command_writes_maps_pictures_and_page(tmp_path, capsys):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "model")
    asked = [
        "--from",
        "age=40,sex=F",
        "--to",
        "age=70",
        "--seeds",
        6,
        "--steps",
        2,
        "--device",
        "cpu",
        "--precision",
        "float32",
    ]
    command_line("explain", tmp_path / "model", *asked, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "brighter ml" in said and "page written" in said
    maps = {path.name.removesuffix(".nii.gz"): nibabel.load(path) for path in (tmp_path / "out").glob("*.nii.gz")}
    of_age = {f"{kind}-age" for kind in ("difference", "t", "p", "significant", "attention")}
    assert set(maps) == {"mean", "deviation", "attention-sex", *of_age}
    for image in maps.values():
        assert image.shape == (16, 16, 16) and b"SYNTHETIC" in bytes(image.header["descrip"])
        np.testing.assert_allclose(image.affine, pipeline.output_grid.affine)
    one, two = (pipeline(age=age, sex="F", num_volumes=6, steps=2).images for age in (40, 70))
    difference = np.mean([np.asarray(b.dataobj) - np.asarray(a.dataobj) for a, b in zip(one, two)], axis=0)
    np.testing.assert_allclose(np.asarray(maps["difference-age"].dataobj), difference, atol=1e-5)
    values = json.loads((tmp_path / "out/metrics.json").read_text())
    assert values["request"] == {"age": 40, "sex": "F"} and values["changes"][0]["changed"] == "age"
    page = (tmp_path / "out/report.html").read_text()
    assert "age 40 to 70" in page and "data:image/png;base64," in page
    assert (tmp_path / "out/difference-age.png").stat().st_size > 5000


def test_commands_requests_are_name_and_value(tmp_path, fails):
    make_pipeline().save_pretrained(tmp_path / "model")
    assert "--to 'seventy': write NAME=VALUE" in fails("explain", tmp_path / "model", "--from", "age=4", "--to", "seventy")
