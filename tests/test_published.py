"""Published models: what monai-generative 0.2.3 computes is what comes out of the imported pipeline.

No weights are downloaded: networks of that library, with every parameter random (the one that is never called, too), are saved
as published files are and imported by the command line.
"""

import json
import math
import types
import warnings
from pathlib import Path

import monai.config
import nibabel
import numpy as np
import pytest
import torch
import yaml
from conftest import SHAPE, command_line
from generative.networks import nets as published
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer, LatentDiffusionInferer
from monai.networks import nets as core
from monai.transforms import DivisiblePad
from safetensors.torch import save_file

from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.diffusion.schedules import make_process
from ldm3d.errors import InputError
from ldm3d.models.foreign import convert
from ldm3d.models.pretrained import make_network
from ldm3d.pipeline import Pipeline
from ldm3d.published import find_weights, make_grid, read_settings
from ldm3d.randomness import generator

LIBRARIES = ("monai", "monai-generative")
REGIONS = ("cerebral_cortex", "hippocampus", "amygdala", "cerebral_white_matter", "lateral_ventricle")
RANGES = {f"{region}_mm3": [1000.0 * (i + 1), 9000.0 * (i + 1)] for i, region in enumerate(REGIONS)}

# The published shapes, and small ones of the same structure
LARGE = {
    "autoencoder": {"num_channels": (64, 128, 128, 128), "num_res_blocks": 2, "norm_num_groups": 32},
    "unet": {"num_channels": (256, 512, 768), "num_head_channels": (0, 512, 768), "norm_num_groups": 32},
}
SMALL = {
    "autoencoder": {"num_channels": (8, 16, 16), "num_res_blocks": 1, "norm_num_groups": 4},
    "unet": {"num_channels": (8, 16, 24), "num_head_channels": (0, 8, 24), "norm_num_groups": 4},
}


def randomise(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, so that no dead or zero one hides a mistake; in the size that keeps activations near 1."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            drawn = torch.randn(parameter.shape, generator=rng)
            if parameter.ndim == 1:  # biases, and norms' scales around 1
                parameter.copy_(0.1 * drawn + parameter.mean().round())
            else:
                parameter.copy_(drawn / math.sqrt(parameter[0].numel()))
    return network.eval().requires_grad_(False)


def autoencoder_of(sizes: dict, attention=None, middle=False, library=published):
    sizes = dict(sizes)
    channels = sizes.pop("num_channels")
    sizes |= {"num_channels" if library is published else "channels": channels}
    network = library.AutoencoderKL(
        spatial_dims=3,
        latent_channels=3,
        norm_eps=1e-6,
        attention_levels=attention or (False,) * len(channels),
        with_encoder_nonlocal_attn=middle,
        with_decoder_nonlocal_attn=middle,
        **sizes,
    )
    return randomise(network, 1)


def unet_of(sizes: dict, covariates: int, concatenate: bool = False, updown: bool = True, library=published):
    sizes = dict(sizes)
    sizes |= {"num_channels" if library is published else "channels": sizes.pop("num_channels")}
    network = library.DiffusionModelUNet(
        spatial_dims=3,
        in_channels=3 + concatenate * covariates,
        out_channels=3,
        num_res_blocks=2,
        attention_levels=(False, True, True),
        norm_eps=1e-6,
        resblock_updown=updown,
        with_conditioning=covariates > 0,
        cross_attention_dim=covariates or None,
        upcast_attention=library is published and covariates > 0,
        **sizes,
    )
    return randomise(network, 2)


def definition(network: str, arguments: dict) -> dict:
    """As it stands in a bundle's inference.json."""
    return {"_target_": f"generative.networks.nets.{network}", "spatial_dims": 3, **arguments}


def save_model_zoo(folder: Path, autoencoder, unet, sizes: dict, names=("autoencoder.pth", "diffusion_model.pth")) -> Path:
    """The bundle's folder; small networks are described by its inference.json, published ones need none."""
    (folder / "models").mkdir(parents=True)
    for name, network in zip(names, (autoencoder, unet)):
        torch.save(network.state_dict(), folder / "models" / name)
    if sizes is SMALL:
        ae = {"in_channels": 1, "out_channels": 1, "latent_channels": 3, "attention_levels": [False] * 3}
        flags = {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
        conditioning = {"with_conditioning": True, "cross_attention_dim": 4, "upcast_attention": True}
        flat = {"in_channels": 7, "out_channels": 3, "num_res_blocks": [2, 2, 2], "attention_levels": [False, True, True]}
        bundle = {
            "device": "$torch.device('cpu')",
            "autoencoder_def": definition("AutoencoderKL", ae | flags | sizes["autoencoder"]),
            "diffusion_def": definition("DiffusionModelUNet", flat | conditioning | sizes["unet"] | {"resblock_updown": True}),
            "scheduler": {"beta_start": 0.0015, "beta_end": 0.0205, "schedule": "scaled_linear_beta", "clip_sample": False},
        }
        (folder / "configs").mkdir()
        (folder / "configs/inference.json").write_text(json.dumps(bundle))
        grid = {"grid": {"shape": [16, 24, 16], "spacing_mm": 10}, "crop": [[1, 2], [0, 0], [0, 3]]}
        (folder / "import.yaml").write_text(yaml.safe_dump(grid))
    return folder


def save_brlp(folder: Path, autoencoder, unet, sizes: dict, scale_factor: float = 1.25) -> Path:
    """As the links of its page give the files, and import.yaml beside them."""
    folder.mkdir(parents=True)
    torch.save({"state_dict": autoencoder.state_dict()}, folder / "autoencoder.pth")
    torch.save({f"module.{name}": value for name, value in unet.state_dict().items()}, folder / "latentdiffusion.pth")
    settings = {"scale_factor": scale_factor, "ranges": RANGES}
    if sizes is SMALL:
        settings |= {
            "autoencoder": {"channels": [8, 16, 16], "blocks": 1, "norm_num_groups": 4},
            "unet": {"channels": [8, 16, 24], "head_channels": [0, 8, 24], "norm_num_groups": 4},
            "grid": {"shape": [20, 28, 20], "spacing_mm": 9},  # latents of 5 x 7 x 5
        }
    (folder / "import.yaml").write_text(yaml.safe_dump(settings))
    return folder


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.shape == theirs.shape
    assert theirs.std() > 0.01
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.std()


@torch.no_grad()
def assert_same_networks(
    pipeline: Pipeline, autoencoder, unet, latent: tuple[int, ...], concatenate: bool, decoded: tuple[int, ...] | None = None
) -> None:
    """Encode, decode (latents of `decoded`, if that is another shape) and U-Net of the pipeline against published networks."""
    rng = torch.Generator().manual_seed(3)
    factor = pipeline.autoencoder.downsampling
    x = torch.rand(1, 1, *(factor * n for n in decoded or latent), generator=rng)
    mean, sigma = autoencoder.encode(x)
    moments = pipeline.autoencoder.encode(x)
    assert_close(moments[:, :3], mean)
    assert_close((moments[:, 3:] / 2).exp(), sigma)
    z = torch.randn(1, 3, *(decoded or latent), generator=rng)
    assert_close(pipeline.autoencoder.decode(z), autoencoder.decode(z))

    z = torch.randn(1, 3, *pipeline.unet.padded_shape(latent), generator=rng)
    covariates = len(pipeline.schema)
    values = torch.rand(1, covariates, generator=rng)
    for step in (0, 980):
        constant = [values[..., None, None, None].expand(-1, -1, *z.shape[2:])] * concatenate
        theirs = unet(torch.cat([z, *constant], dim=1), timesteps=torch.tensor([step]), context=values[:, None])
        # Ours is told of an index and of thousandths of time
        raw = values * torch.tensor([max(n - 1, 1) for n in pipeline.schema.num_categories])
        mine = pipeline.unet(z, torch.tensor([step + 1.0]), torch.stack([raw, torch.ones_like(raw)], dim=-1))
        assert_close(mine, theirs)


def run_import(folder: Path, out: Path, library: str) -> Pipeline:
    command_line("import-monai", folder, "--out", out, "--library", library)
    return Pipeline.from_pretrained(out, "cpu", torch.float32)


# The two published layouts


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("sizes", [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="exact", marks=pytest.mark.slow)])
def test_model_zoo(tmp_path, library, sizes):
    autoencoder, unet = autoencoder_of(sizes["autoencoder"]), unet_of(sizes["unet"], covariates=4, concatenate=True)
    pipeline = run_import(save_model_zoo(tmp_path / "bundle", autoencoder, unet, sizes), tmp_path / "model", library)
    latent = (4, 8, 4) if sizes is SMALL else (20, 28, 20)
    assert pipeline.unet.arguments["library"] == pipeline.autoencoder.arguments["library"] == library
    assert pipeline.autoencoder.latent_std.eq(1).all() and pipeline.autoencoder.latent_mean.eq(0).all()
    # The same autoencoder as below, where the whole volume does not take 15 GB
    decoded = None if sizes is SMALL else (8, 8, 8)
    assert_same_networks(pipeline, autoencoder, unet, latent, concatenate=True, decoded=decoded)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("sizes", [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="exact", marks=pytest.mark.slow)])
def test_brain_latent_progression(tmp_path, library, sizes):
    autoencoder, unet = autoencoder_of(sizes["autoencoder"]), unet_of(sizes["unet"], covariates=8)
    pipeline = run_import(save_brlp(tmp_path / "brlp", autoencoder, unet, sizes), tmp_path / "model", library)
    latent = (5, 7, 5) if sizes is SMALL else (15, 18, 15)
    assert pipeline.unet.padded_shape(latent) == ((8, 8, 8) if sizes is SMALL else (16, 20, 16))
    assert pipeline.autoencoder.latent_std.tolist() == pytest.approx([1 / 1.25] * 3)
    assert_same_networks(pipeline, autoencoder, unet, latent, concatenate=False)


def test_settings_of_the_model_zoo(tmp_path):
    save_model_zoo(tmp_path / "bundle", torch.nn.Identity(), torch.nn.Identity(), LARGE)
    config = read_settings(tmp_path / "bundle", "diffusion_model", "monai", None)
    schema = [c.covariate() for c in config.covariates]
    assert [c.name for c in schema] == ["sex", "age", "ventricular_volume_ml", "brain_volume_ml"]
    assert [schema[0].encode(sex)[0] for sex in "FM"] == [0, 1]
    assert [schema[1].encode(age)[0] for age in (44, 63, 82)] == [0, 0.5, 1]
    # mm3 to ml
    assert schema[2].encode((6995.68 + 171375) / 2 / 1000)[0] == pytest.approx(0.5)
    assert [schema[3].encode(v)[0] for v in (1144.24, 1793.91)] == pytest.approx([0, 1])
    assert (config.generation.sampler, config.generation.steps, config.generation.spacing) == ("ddim", 50, "leading")


def test_where_volumes_of_the_model_zoo_lie(tmp_path):
    """The saver of the bundle writes [5:-5, 5:-5, :-15] with this affine; voxel (0, 0, 0) of the whole lies 5 further out."""
    config = read_settings(tmp_path, "model", "monai", None)
    grid = make_grid(config)
    written = grid.cropped(config.crop)
    assert (grid.shape, written.shape) == ((160, 224, 160), (150, 214, 145))
    saved = [[-1, 0, 0, 96.48149872], [0, 1, 0, -141.47715759], [0, 0, 1, -156.55375671], [0, 0, 0, 1]]
    np.testing.assert_allclose(written.affine, saved)
    np.testing.assert_allclose(grid.affine @ [5, 5, 0, 1], np.array(saved)[:, 3])


def test_settings_of_brain_latent_progression(tmp_path):
    (tmp_path / "import.yaml").write_text(yaml.safe_dump({"scale_factor": 1.0, "ranges": RANGES}))
    config = read_settings(tmp_path, "latentdiffusion", "monai-generative", None)
    schema = [c.covariate() for c in config.covariates]
    assert [c.name for c in schema] == ["age", "sex", "diagnosis", *RANGES]
    assert schema[0].encode(50)[0] == 0.5
    assert [schema[1].encode(sex)[0] for sex in "MF"] == [0, 1]
    assert schema[4].encode(10_000)[0] == pytest.approx((10_000 - 2000) / 16_000)
    sizes = {"channels": [4, 4], "blocks": 1, "attention": [False, True], "head_channels": [4], "norm_num_groups": 2}
    of_data = {"in_channels": 3, "out_channels": 3, "num_categories": [0, 2, 3], "conditioning": "values"}
    unet = make_network("UNet", kind="monai", **of_data, **sizes)
    assert unet.largest.tolist() == [1, 1, 2]  # diagnosis: 0, 0.5, 1
    # Voxel (0, 0, 0) of 120 x 144 x 120 is voxel (1, 1, 1) of MNI152 at 1.5 mm
    np.testing.assert_allclose(make_grid(config).affine[:3, 3], [90 - 1.5, -126 + 1.5, -72 + 1.5])


# Sampling


@pytest.fixture
def published_schedulers(monkeypatch):
    """DDIMScheduler of monai-generative 0.2.3: its package imports only where MONAI has a name that it has lost."""
    monkeypatch.setattr(monai.config, "IgniteInfo", types.SimpleNamespace(OPT_IMPORT_VERSION="0.4.11"), raising=False)
    from generative.networks import schedulers

    return schedulers


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """(imported small pipeline, published networks)."""
    folder = tmp_path_factory.mktemp("zoo")
    autoencoder = autoencoder_of(SMALL["autoencoder"])
    unet = unet_of(SMALL["unet"], covariates=4, concatenate=True)
    return (
        run_import(save_model_zoo(folder / "bundle", autoencoder, unet, SMALL), folder / "model", "monai"),
        autoencoder,
        unet,
    )


ASKED = {"sex": "M", "age": 63, "ventricular_volume_ml": 50.0, "brain_volume_ml": 1500.0}


class Concatenating(torch.nn.Module):
    """What the bundle's own sampler does around its U-Net."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timesteps, context):
        constant = context[:, 0, :, None, None, None].expand(-1, -1, *x.shape[2:])
        return self.unet(torch.cat([x, constant], dim=1), timesteps=timesteps, context=context)


def test_sampling_is_the_published_one(zoo, published_schedulers):
    """All 50 steps and the decoding, from the same noise, by MONAI's inferer with the published networks and scheduler."""
    pipeline, autoencoder, unet = zoo
    schedule = {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205}
    scheduler = published_schedulers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **schedule)
    scheduler.set_timesteps(50)
    padded = torch.randn((3, *pipeline.unet.padded_shape((4, 6, 4))), generator=generator("sample", 7, 0))[None]
    requests = pipeline.parse([ASKED])
    context = pipeline.schema.encode(requests)[..., 0][:, None]  # sex is 0 or 1 as it is
    np.testing.assert_allclose(context[0, 0, :2], [1, 0.5])
    inferer = LatentDiffusionInferer(scheduler, ldm_latent_shape=[4, 8, 4], autoencoder_latent_shape=[4, 6, 4])
    sampled = inferer.sample(padded, autoencoder, Concatenating(unet), conditioning=context, mode="crossattn", verbose=False)
    latents = pipeline.latents(requests, pipeline.sampling.replace(seed=7), [0])
    mine = pipeline.autoencoder.decode(pipeline.autoencoder.denormalise(latents))
    assert (mine - sampled).abs().max() < 1e-4 * sampled.std()
    volume = next(pipeline.volumes(requests, pipeline.sampling.replace(seed=7)))
    np.testing.assert_allclose(volume, sampled[0, :, 1:-2, :, :-3].clamp(0, 1), atol=1e-4)


def test_scale_factor_and_padding_are_the_published_ones(tmp_path, published_schedulers):
    autoencoder, unet = autoencoder_of(SMALL["autoencoder"]), unet_of(SMALL["unet"], covariates=8)
    pipeline = run_import(save_brlp(tmp_path / "brlp", autoencoder, unet, SMALL), tmp_path / "model", "monai-generative")
    scheduler = published_schedulers.DDIMScheduler(
        schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, clip_sample=False
    )
    scheduler.set_timesteps(20)
    asked = {"age": 70, "sex": "F", "diagnosis": "MCI", **{name: sum(limits) / 2 for name, limits in RANGES.items()}}
    requests = pipeline.parse([asked])
    noise = torch.randn((3, 8, 8, 8), generator=generator("sample", 0, 0))
    context = torch.tensor([[[0.7, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]]])
    sampled = DiffusionInferer(scheduler).sample(noise[None], unet, conditioning=context, mode="crossattn", verbose=False)
    # The padding that its latents were trained with, taken back; MONAI's inferer would cut another plane of an odd side
    padder = DivisiblePad(k=4)
    z = padder.inverse(padder(MetaTensor(torch.zeros(3, 5, 7, 5))) + sampled[0] / 1.25)
    sampled = autoencoder.decode(z.as_tensor()[None])
    latents = pipeline.latents(requests, pipeline.sampling.replace(steps=20), [0])
    assert latents.shape == (1, 3, 5, 7, 5)
    mine = pipeline.autoencoder.decode(pipeline.autoencoder.denormalise(latents))
    assert (mine - sampled).abs().max() < 1e-4 * sampled.std()


@pytest.mark.parametrize("steps", [1, 3, 50, 1000])
def test_leading_times_are_the_published_steps(published_schedulers, steps):
    process = make_process("vp-scaled-linear", beta_start=0.0015, beta_end=0.0205)
    scheduler = published_schedulers.DDIMScheduler(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205)
    scheduler.set_timesteps(steps)
    times = process.times(steps, "leading")
    assert [round(1000 * t - 1) for t in times[:-1]] == scheduler.timesteps.tolist()
    assert times[-1] == 0
    alpha = scheduler.alphas_cumprod[scheduler.timesteps].sqrt()
    np.testing.assert_allclose([process.alpha(t) for t in times[:-1]], alpha, rtol=1e-4)


def test_leading_times_belong_to_chains():
    for kind in ("flow", "vp-cosine"):
        with pytest.raises(InputError, match=f"{kind} process has none"):
            make_process(kind).times(10, "leading")
    with pytest.raises(InputError, match="1001 steps: the chain has 1000"):
        make_process("vp-linear").times(1001, "leading")


# What can be asked


def test_nothing_can_be_left_open(zoo):
    pipeline = zoo[0]
    with pytest.raises(InputError, match="brain_volume_ml: a value must be given"):
        pipeline(**{**ASKED, "brain_volume_ml": None})
    with pytest.raises(InputError, match="age: a value must be given"):
        pipeline(**{name: value for name, value in ASKED.items() if name != "age"})


@pytest.mark.parametrize("guidance", [0, 2])
def test_no_guidance(zoo, guidance):
    with pytest.raises(InputError, match=f"guidance {guidance}: this model was trained with no covariate left open"):
        zoo[0](**ASKED, guidance=guidance)


def test_wrong_spacing_is_told_before_anything_is_written(zoo):
    pipeline = zoo[0]
    with pytest.raises(InputError, match="2000 steps"):  # at once, not when the first volume is asked for
        pipeline.volumes(pipeline.parse([ASKED]), pipeline.sampling.replace(steps=2000))


def test_beyond_the_scaling_range_is_extrapolation(zoo):
    with pytest.warns(UserWarning, match="age 90 years: training saw 44 to 82 only"):
        zoo[0].parse([{**ASKED, "age": 90}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo[0].parse([{**ASKED, "age": 82}])


def test_generate_and_evaluate(tmp_path, zoo):
    """An imported model is a pipeline like any other: its volumes carry the cropped grid, and it can be measured."""
    model = tmp_path / "model"
    zoo[0].save_pretrained(model)
    autoencoder = autoencoder_of(SMALL["autoencoder"])
    unet = unet_of(SMALL["unet"], covariates=4, concatenate=True)
    run_import(save_model_zoo(tmp_path / "bundle", autoencoder, unet, SMALL), tmp_path / "imported", "monai")
    asked = [f"--{name.replace('_', '-')}={value}" for name, value in ASKED.items()]
    command_line("generate", tmp_path / "imported", "--out", tmp_path / "out", "--steps", 2, *asked)
    image = nibabel.load(next((tmp_path / "out").rglob("*.nii.gz")))
    assert image.shape == (13, 24, 13)
    whole = zoo[0].grid.affine
    np.testing.assert_allclose(image.affine[:3, 3], (whole @ [1, 0, 0, 1])[:3])

    write_dataset(tmp_path / "data", subjects=4, shape=SHAPE, seed=3, workers=1)
    arguments = ["--data", tmp_path / "data", "--num", 3, "--steps", 1, "--out", tmp_path / "report"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # phantoms are no brains of this model's range
        command_line("evaluate", tmp_path / "imported", "--experiment", "none", *arguments)
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["reconstruction"]["volumes"] == 4
    assert {sweep["covariate"] for sweep in metrics["sweeps"]} == {"age", "ventricular_volume_ml", "brain_volume_ml"}


# Conversion


def target(network, library: str):
    """The same network from another library."""
    arguments = {"spatial_dims": 3, "in_channels": 3, "out_channels": 3, "num_res_blocks": 1, "norm_num_groups": 4}
    key = "num_channels" if library == "monai-generative" else "channels"
    nets = published if library == "monai-generative" else core
    return getattr(nets, network)(**arguments, **{key: (8, 8)}, attention_levels=(False, True), **EXTRA[network])


EXTRA = {"AutoencoderKL": {}, "DiffusionModelUNet": {"num_head_channels": 4, "resblock_updown": False}}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("network", EXTRA)
def test_attention_of_an_unconditioned_network(network, library):
    """0.2.3 owns a projection that it never calls: whatever is in it, outputs stay."""
    theirs = randomise(target(network, "monai-generative"), 5)
    mine = target(network, library)
    x = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([7])) if network == "DiffusionModelUNet" else (x,)

    def answer(net):
        return net(*inputs) if network == "DiffusionModelUNet" else net.reconstruct(*inputs)

    mine.load_state_dict(convert(theirs.state_dict(), mine.state_dict(), "x"))
    with torch.no_grad():
        assert_close(answer(mine.eval()), answer(theirs))
        for name, parameter in theirs.named_parameters():
            if "proj_attn" in name:
                parameter.fill_(float("nan"))
        converted = convert(theirs.state_dict(), mine.state_dict(), "x")
        mine.load_state_dict(converted)
        assert_close(answer(mine.eval()), answer(theirs))
    if library == "monai":
        assert any("attn.out_proj" in name for name in converted)  # core's is called


@pytest.mark.parametrize("updown", [False, True])
def test_conditioned_network_with_and_without_updown(updown):
    theirs = unet_of(SMALL["unet"], covariates=4, updown=updown)
    mine = unet_of(SMALL["unet"], covariates=4, updown=updown, library=core)
    mine.load_state_dict(convert(theirs.state_dict(), mine.state_dict(), "x"))
    inputs = torch.randn(1, 3, 8, 8, 8), torch.tensor([3]), torch.rand(1, 1, 4)
    assert_close(mine(*inputs), theirs(*inputs))
    back = unet_of(SMALL["unet"], covariates=4, updown=updown)
    back.load_state_dict(convert(mine.state_dict(), randomise(back, 9).state_dict(), "x"))
    assert_close(back(*inputs), theirs(*inputs))


@pytest.mark.parametrize("library", LIBRARIES)
def test_state_dicts_of_monai_core(tmp_path, library):
    """Named model.pt, as the model zoo has them now."""
    autoencoder = autoencoder_of(SMALL["autoencoder"], library=core)
    unet = unet_of(SMALL["unet"], covariates=4, concatenate=True, library=core)
    folder = save_model_zoo(tmp_path / "bundle", autoencoder, unet, SMALL, names=("autoencoder.pt", "model.pt"))
    pipeline = run_import(folder, tmp_path / "model", library)
    assert_same_networks(pipeline, autoencoder, unet, (4, 8, 4), concatenate=True)


def test_core_s_own_projection_is_kept_or_refused():
    theirs = randomise(target("AutoencoderKL", "monai"), 5)
    mine = target("AutoencoderKL", "monai")
    converted = convert(theirs.state_dict(), mine.state_dict(), "x")
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(converted[name], value, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"left over.*use --library monai"):
        convert(theirs.state_dict(), target("AutoencoderKL", "monai-generative").state_dict(), "x")


def test_safetensors(tmp_path):
    autoencoder, unet = autoencoder_of(SMALL["autoencoder"]), unet_of(SMALL["unet"], covariates=4, concatenate=True)
    folder = save_model_zoo(tmp_path / "bundle", autoencoder, unet, SMALL)
    (folder / "models/autoencoder.pth").unlink()
    save_file(autoencoder.state_dict(), folder / "models/autoencoder.safetensors")
    assert_same_networks(run_import(folder, tmp_path / "model", "monai"), autoencoder, unet, (4, 8, 4), concatenate=True)


def test_the_caller_s_weights_stay_as_they_are():
    """MONAI's own loader takes keys out of the dictionary that it is given."""
    weights = randomise(target("DiffusionModelUNet", "monai-generative"), 5).state_dict()
    before = {name: value.clone() for name, value in weights.items()}
    convert(weights, target("DiffusionModelUNet", "monai").state_dict(), "x")
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_key_counts(library):
    weights = randomise(target("DiffusionModelUNet", "monai-generative"), 5).state_dict()
    wanted = target("DiffusionModelUNet", library).state_dict()
    with pytest.raises(InputError, match=r"x is of another network: surprise\.weight is left over"):
        convert({**weights, "surprise.weight": torch.ones(1)}, wanted, "x")
    # A projection of a block that does not exist is none that is known to be dead
    with pytest.raises(InputError, match=r"down_blocks\.9\.proj_attn\.weight is left over"):
        convert({**weights, "down_blocks.9.proj_attn.weight": torch.ones(1)}, wanted, "x")
    for name in weights:
        if "proj_attn" not in name:
            with pytest.raises(InputError, match="is missing"):
                convert({key: value for key, value in weights.items() if key != name}, wanted, "x")


# Wrong folders, files and settings


@pytest.fixture
def bundle(tmp_path):
    autoencoder, unet = autoencoder_of(SMALL["autoencoder"]), unet_of(SMALL["unet"], covariates=4, concatenate=True)
    return save_model_zoo(tmp_path / "bundle", autoencoder, unet, SMALL)


def test_wrong_folder(tmp_path, fails, bundle):
    message = fails("import-monai", tmp_path / "none", "--out", tmp_path / "model")
    assert "none holds no published model: expected autoencoder.pth, and diffusion_model.pth or model.pt" in message
    (bundle / "models/latentdiffusion.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"several U-Nets, latentdiffusion\.pth, diffusion_model\.pth"):
        find_weights(bundle)
    assert not (tmp_path / "model").exists()


def test_out_must_be_empty(bundle, fails):
    assert "not empty; choose another --out" in fails("import-monai", bundle, "--out", bundle)


def test_unknown_library(bundle, fails, tmp_path):
    message = fails("import-monai", bundle, "--out", tmp_path / "model", "--library", "monay")
    assert "did you mean 'monai'?" in message


def test_what_brain_latent_progression_needs_to_be_told(tmp_path, fails):
    folder = save_brlp(tmp_path / "brlp", autoencoder_of(SMALL["autoencoder"]), unet_of(SMALL["unet"], 8), SMALL)
    (folder / "import.yaml").unlink()
    message = fails("import-monai", folder, "--out", tmp_path / "model")
    assert "brlp/import.yaml, as: scale_factor: 1.0; ranges: {cerebral_cortex_mm3: [lowest, highest], " in message
    settings = tmp_path / "mine.yaml"
    settings.write_text(yaml.safe_dump({"scale_factor": 1.0, "ranges": {"hipocampus_mm3": [1, 2]}}))
    message = fails("import-monai", folder, "--out", tmp_path / "model", "--settings", settings)
    assert "did you mean 'hippocampus_mm3'?" in message
    settings.write_text(yaml.safe_dump({"scale_factor": 0, "ranges": RANGES}))
    message = fails("import-monai", folder, "--out", tmp_path / "model", "--settings", settings)
    assert "scale_factor is 0" in message
    settings.write_text(yaml.safe_dump({"scale_factor": 1.0, "ranges": RANGES | {"amygdala_mm3": [2, 1]}}))
    message = fails("import-monai", folder, "--out", tmp_path / "model", "--settings", settings)
    assert "covariate amygdala_mm3: range (2.0, 1.0) must rise" in message
    settings.write_text(yaml.safe_dump({"scale_factor": 1.0, "ranges": RANGES, "covariates": 3}))
    assert "known: none" in fails("import-monai", folder, "--out", tmp_path / "model", "--settings", settings)
    settings.write_text(yaml.safe_dump({"scale_factr": 1, "scale_factor": 1, "ranges": RANGES}))
    message = fails("import-monai", folder, "--out", tmp_path / "model", "--settings", settings)
    assert "unknown key 'scale_factr'; did you mean 'scale_factor'?" in message
    assert "no file" in fails("import-monai", folder, "--out", tmp_path / "model", "--settings", tmp_path / "none.yaml")


def test_weights_of_another_network(bundle, fails, tmp_path):
    torch.save(autoencoder_of(SMALL["autoencoder"]).state_dict(), bundle / "models/diffusion_model.pth")
    message = fails("import-monai", bundle, "--out", tmp_path / "model")
    assert "diffusion_model.pth is of another network" in message and "more" in message
    (bundle / "configs/inference.json").unlink()  # then the published widths are expected
    assert "is missing" in fails("import-monai", bundle, "--out", tmp_path / "model")


def test_files_that_are_no_checkpoints(bundle, fails, tmp_path):
    path = bundle / "models/autoencoder.pth"
    path.write_bytes(b"no pickle")
    assert "is no checkpoint of plain tensors" in fails("import-monai", bundle, "--out", tmp_path / "model")
    torch.save({"weights": [1, 2]}, path)
    assert "holds no state dict" in fails("import-monai", bundle, "--out", tmp_path / "model")


def test_a_checkpoint_cannot_run_code(bundle, fails, tmp_path):
    torch.save({"state_dict": Boom(tmp_path / "ran")}, bundle / "models/autoencoder.pth")
    assert "is no checkpoint of plain tensors" in fails("import-monai", bundle, "--out", tmp_path / "model")
    assert not (tmp_path / "ran").exists()


class Boom:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "section, key, value, told",
    [
        ("autoencoder_def", "use_convtranspose", True, "use_convtranspose is True; only False can be imported"),
        ("autoencoder_def", "with_decoder_nonlocal_attn", True, "with_decoder_nonlocal_attn is True; only False"),
        ("diffusion_def", "novelty", 1, "diffusion_def.novelty is not known"),
        ("scheduler", "schedule", "cosine", "scheduler must be linear or scaled linear"),
        ("scheduler", "clip_sample", True, "scheduler.clip_sample is True; only False can be imported"),
        ("scheduler", "set_alpha_to_one", False, "scheduler.set_alpha_to_one is False; only True can be imported"),
        ("scheduler", "steps_offset", 1, "scheduler.steps_offset is 1; only 0 can be imported"),
        ("scheduler", "num_train_timesteps", 500, "of 1000 steps"),
    ],
)
def test_bundles_that_cannot_be_followed(bundle, fails, tmp_path, section, key, value, told):
    path = bundle / "configs/inference.json"
    values = json.loads(path.read_text())
    values[section][key] = value
    path.write_text(json.dumps(values))
    assert told in fails("import-monai", bundle, "--out", tmp_path / "model")
