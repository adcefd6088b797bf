"""What the device decides: which GPU, how volumes are computed on it, and whether its convolutions are right."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils.other import compile_regions_fsdp2
from test_end_to_end import another_run
from torture.generation import make_pipeline

from ldm3d import devices
from ldm3d.config.training import TrainingConfig
from ldm3d.covariates import drop_covariates
from ldm3d.devices import check_convolutions, computing_alike, convolution_error, described
from ldm3d.diffusion.denoiser import call_network
from ldm3d.diffusion.objective import make_objective
from ldm3d.diffusion.samplers import SAMPLERS
from ldm3d.errors import InputError
from ldm3d.generation import identity, run, sampling
from ldm3d.generation import series as series_format
from ldm3d.generation.series import SERIES
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.blocks import ChannelNorm, normalise_channels
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import CovariateTokens, UNet, double_last_planes, pad_to_even
from ldm3d.pipeline import Pipeline
from ldm3d.processes import own_device
from ldm3d.training.ema import EMA
from ldm3d.training.losses import kl_divergence
from ldm3d.training.metrics import read_metrics
from ldm3d.training.optimizer import make_optimizer

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
ROWS = [{"age": 20.0 + 5 * i, "sex": "FM"[i % 2]} for i in range(3)]


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs; gives the list of those that were made current."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90000)  # builds for CUDA would look at the GPUs themselves
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)

    def of(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return chosen

    return of


@pytest.mark.parametrize(
    "variables, count, expected",
    [
        ({}, 8, 0),
        ({"LOCAL_RANK": "3"}, 8, 3),  # torchrun
        ({"SLURM_LOCALID": "5"}, 8, 5),  # srun, all GPUs of the node are seen
        ({"SLURM_LOCALID": "5"}, 1, 0),  # srun --gpus-per-task 1
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 8, 1),  # torchrun started by srun, one task a node
    ],
)
def test_each_process_has_a_gpu_of_its_own(gpus, monkeypatch, variables, count, expected):
    current = gpus(count)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert own_device() == f"cuda:{expected}"
    assert current == [expected]


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device() == "cpu"


# Volumes of one series


def test_the_type_of_gpu_is_part_of_what_bits_follow_from(gpus):
    assert described(CPU) == "cpu"
    assert described(CUDA) == "cuda, NVIDIA X"


def test_a_series_that_does_not_say_its_gpu_is_refused_and_one_of_a_cpu_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(series_format, "MOSAIC_VOLUMES", 1)
    model, out = make_pipeline(channels=16), tmp_path / "out"
    model.model_hash = "0123"
    rows = model.parse(ROWS[:1])
    assert run.generate(model, out, rows, model.sampling).made == 1
    assert run.generate(model, out, rows, model.sampling).kept == 1
    monkeypatch.setattr(identity, "described", lambda device: "cuda, NVIDIA X")
    with pytest.raises(InputError, match="device: cpu -> cuda, NVIDIA X"):
        run.generate(model, out, rows, model.sampling)
    series = out / SERIES
    series.write_text(series.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(InputError, match="did not note on which GPU"):
        run.generate(model, out, rows, model.sampling)


def test_sampling_on_cuda_is_fast_and_always_the_same(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # as in training
    before = torch.get_float32_matmul_precision()
    with computing_alike(CUDA, 1):
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cudnn.benchmark
    assert torch.get_float32_matmul_precision() == before
    assert torch.backends.cudnn.benchmark
    with computing_alike(CPU, 1):
        assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(
    "shape, device, expected",
    [
        ((56, 72, 56), "cpu", 2),  # 3 mm, factor 4
        ((160, 224, 160), "cpu", 1),  # 1 mm, factor 8
        ((56, 72, 56), "cuda", 32),
        ((160, 224, 160), "cuda", 8),
        ((256, 256, 256), "cuda", 4),
    ],
)
def test_a_gpu_takes_more_volumes_at_a_time(monkeypatch, shape, device, expected):
    model = make_pipeline(channels=16)
    latents = tuple(n // (8 if shape[0] > 100 else 4) for n in shape)
    monkeypatch.setattr(type(model.autoencoder), "latent_shape", lambda self, shape: (3, *latents))
    monkeypatch.setattr(Pipeline, "device", torch.device(device))
    assert model.group_size == expected


def test_volumes_that_are_decoded_ahead_are_the_same_in_the_same_order(monkeypatch):
    model = make_pipeline(channels=16)
    rows = model.parse(ROWS[:3])
    expected = [volume.tobytes() for volume in model.volumes(rows, model.sampling)]
    monkeypatch.setitem(sampling.AHEAD, "cpu", 1)
    assert [volume.tobytes() for volume in model.volumes(rows, model.sampling)] == expected


def test_a_decode_that_runs_out_of_memory_goes_on_in_parts_and_a_series_does_not(monkeypatch):
    model = make_pipeline(channels=16)
    z = torch.randn(1, *model.autoencoder.latent_shape(model.grid.shape), generator=torch.Generator().manual_seed(0))
    expected = model.decode(z)

    whole = model.autoencoder.decode

    def decode(z):
        if z.is_meta:  # the plan counts
            return whole(z)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.autoencoder, "decode", decode)
    torch.testing.assert_close(model.decode(z), expected, rtol=0, atol=1e-5)
    assert model.computing["decode"] == "streamed"
    model.decode_mode = "whole"
    with pytest.raises(InputError, match="runs out of GPU memory"):
        model.decode(z)


def test_too_large_a_group_is_said(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = make_pipeline(channels=16)
    monkeypatch.setattr(model, "latents", out_of_memory)
    with pytest.raises(InputError, match=r"4 volumes at a time .* --group"):
        next(model.volumes(model.parse(ROWS), model.sampling))


def test_several_threads_pack_beside_a_gpu_and_one_beside_a_cpu(monkeypatch):
    monkeypatch.setattr(run, "cores_each", lambda: 16)
    assert [run.packing_threads(device) for device in (CPU, CUDA)] == [1, run.PACKING]


# Convolutions


def test_right_convolutions_pass_and_wrong_ones_do_not(gpus, monkeypatch):
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, devices.CONVOLUTION_ERROR / 2)):
        assert convolution_error(CPU, dtype) < most

    def wrong(x, weight, padding):
        out = F.conv3d(x, weight, padding=padding)
        out[-1, -1] = 0  # a channel of a sample
        return out

    assert convolution_error(CPU, torch.bfloat16, wrong) > 10 * devices.CONVOLUTION_ERROR
    assert convolution_error(CPU, torch.float32, lambda *_, **__: torch.tensor(torch.nan)) != 0  # NaN is not small

    monkeypatch.setattr(devices, "convolution_error", lambda device, dtype: 0.5)
    with pytest.raises(InputError, match="3D convolutions in bfloat16 are wrong on cuda, NVIDIA X"):
        check_convolutions(CUDA, torch.bfloat16)
    check_convolutions(CPU, torch.bfloat16)
    for error in (0.004, torch.nan):
        monkeypatch.setattr(devices, "convolution_error", lambda device, dtype, error=error: error)
        if error == error:
            check_convolutions(CUDA, torch.bfloat16)
        else:
            with pytest.raises(InputError):
                check_convolutions(CUDA, torch.bfloat16)


# What CUDA runs in place of what the CPU does: the same numbers


@pytest.mark.parametrize("affine", [True, False])
def test_the_norm_outside_of_autocast_is_the_same_norm(affine):
    norm = ChannelNorm(16, elementwise_affine=affine)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 16, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 3
    arguments = norm.weight, norm.bias, norm.eps
    torch.testing.assert_close(normalise_channels(x, *arguments), norm(x))
    kept = []
    half = x.bfloat16().requires_grad_()
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        out = normalise_channels(half, *arguments)
    assert out.dtype == torch.bfloat16
    assert not [
        t for t in kept if t.dtype == torch.float32 and t.numel() >= x.numel()
    ]  # no float32 copy waits for the way back
    torch.testing.assert_close(out.float(), norm(half.detach().float()), rtol=0.02, atol=0.02)


def test_planes_doubled_for_cuda_are_those_of_the_pad():
    x = torch.randn(2, 3, 5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one, other = pad_to_even(x), double_last_planes(x)
    assert torch.equal(one, other)
    weight = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(torch.autograd.grad((out * weight).sum(), x)[0] for out in (one, other)))


def test_covariates_keep_their_precision_in_a_bfloat16_network():
    """Ages 72.1 and 72.2 of a standardised covariate are one number in bfloat16."""
    tokens, values = CovariateTokens([0], 8).bfloat16(), torch.tensor([[[1.001, 1.0]], [[1.002, 1.0]]])
    seen = []
    tokens.embed[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens(values)
    exact = torch.cat([values[:, :, 0], (f := values[:, :, 0] * tokens.frequencies.float()).sin(), f.cos()], dim=1)
    torch.testing.assert_close(seen[0], exact.bfloat16(), rtol=0, atol=0)


# torch.compile, as the launcher asks for it


def test_stage_2_trains_compiled_block_by_block(experiment, tmp_path, train_here, monkeypatch):
    """`accelerate launch --dynamo_use_regional_compilation`, with the backend that compiles nothing: the same losses."""
    config = another_run(experiment, tmp_path, "diffusion")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    torch._dynamo.reset()
    compiled = []
    monkeypatch.setattr(torch, "compile", _counting(torch.compile, compiled))
    train_here("diffusion", config, "training.steps=2")
    torch._dynamo.reset()
    assert compiled.count("Level") == 4  # two on the way down, two on the way up
    whole, blocks = (read_metrics(folder / "diffusion-training/metrics.jsonl") for folder in (experiment / "run", tmp_path))
    assert blocks[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)


def test_levels_are_compiled_where_parameters_are_spread():
    net = UNet(2, 2, [0], [8, 16], 1, [False, True], 8, 8)
    compile_regions_fsdp2(net, backend="eager")
    assert all(level._compiled_call_impl is not None for level in (*net.down, *net.up))


def _counting(compile, compiled: list[str]):
    def count(module, **options):
        compiled.append(type(module).__name__)
        return compile(module, **options)

    return count


# Where the host waits, and what is left on the CPU: tensors without data say both


@pytest.mark.parametrize("kind", ["flow", "vp-cosine", "vp-linear", "vp-scaled-linear", "vdm"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_training_step_asks_for_no_value(kind, name):
    """On the meta device, a value that the host asks for, and a tensor that is elsewhere, are errors."""
    net, autoencoder = UNet(2, 2, [0, 2], [8, 16], 1, [False, True], 8, 8).to(META), Autoencoder(2, 4, (4, 8), 1).to(META)
    average, training = EMA(net, 0.9), TrainingConfig(steps=4, batch_size=2, learning_rate=1e-2, optimizer=name)
    weight, times = "none" if kind == "vdm" else "min-snr", {"kind": "logit-normal", "location": 0.0, "scale": 1.0}
    objective = make_objective({"kind": kind}, "v", weight, times)
    if objective.schedule is not None:
        objective.schedule.to(META)
    x, u = torch.randn(2, 2, 5, 4, 4, device=META), torch.rand(2, device=META)
    context = drop_covariates(torch.ones(2, 2, 2, device=META), torch.rand(2, 4, device=META), 0.3)
    volume = torch.rand(2, 1, 16, 16, 16, device=META)

    def predict(z, time):
        return call_network(net, z, time, Conditions(context))

    again, moments = autoencoder(volume, torch.randn(2, 2, 4, 4, 4, device=META))
    loss = objective.losses(predict, x, torch.randn_like(x), u).mean() + (again - volume).square().mean()
    (loss + kl_divergence(moments)).backward()
    for network in (net, autoencoder):
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer = make_optimizer(network, training)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        if name == "muon":  # PyTorch's fused AdamW has no kernel for tensors without data
            optimizer.step()
    average.update(net, 0)
    with pytest.raises(RuntimeError, match="meta"):
        norm.item()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_asks_for_no_value(sampler):
    model = make_pipeline(channels=16).to(META)
    rows = model.parse(ROWS)
    assert model.latents(rows, model.sampling.replace(sampler=sampler, steps=3), range(3)).is_meta
