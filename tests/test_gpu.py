"""What only a GPU can show: `make gpu` runs these and keeps the figures that they record.

Without CUDA they are skipped. `make gpu DRY=1` sets LDM3D_GPU_DRY, and then those that a CPU can run do so, with the kernels
that it has.
"""

import copy
import functools
import importlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from conftest import command_line, free_port, tiny_settings
from safetensors.torch import load_file
from torch.nn.attention import sdpa_kernel
from torture.generation import make_pipeline

from ldm3d import figures
from ldm3d.config.read import load_config
from ldm3d.data.batches import TrainingBatches
from ldm3d.data.phantom_dataset import write_dataset
from ldm3d.devices import CONVOLUTION_ERROR, HostCopy, convolution_error
from ldm3d.environment import KERNELS
from ldm3d.models.attention import attention, why_xformers_fails
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.unet import UNet
from ldm3d.preemption import REQUEUE, Stop
from ldm3d.processes import own_device
from ldm3d.training import parallel
from ldm3d.training.metrics import read_metrics

pytestmark = pytest.mark.gpu

UNIT = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24}  # the largest relative error of one rounding
STAGES = ["autoencoder", "diffusion"]
SIDES, STEPS = (16, 20, 16), 4


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available() and not os.environ.get("LDM3D_GPU_DRY"):
        pytest.skip("no CUDA GPU; `make gpu DRY=1` runs what a CPU can")
    return torch.device(own_device())


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("only CUDA has it")
    return device


@pytest.fixture
def exact():
    """Within it, float32 is float32: no TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """On the CPU, so that it is the same for every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(one, other) -> float:
    """Of two tensors, or lists of them, relative to the second."""
    flat = [
        torch.cat([t.detach().double().cpu().flatten() for t in (x if isinstance(x, list) else [x])]) for x in (one, other)
    ]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def unet() -> UNet:
    """Three levels, an odd grid, attention; no weight is zero."""
    torch.manual_seed(0)
    network = UNet(4, 4, [0, 2], [32, 64, 64], 1, [False, False, True], head_channels=32, context_dim=32)
    return without_zeros(network)


def without_zeros(network: torch.nn.Module) -> torch.nn.Module:
    """Branches that start at zero would hide their errors."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return network


def unet_loss(network: UNet) -> torch.Tensor:
    device = next(network.parameters()).device
    z, context = noise(2, 4, 10, 12, 9).to(device), torch.ones(2, 2, 2, device=device)
    return (network(z, torch.tensor([123.4, 998.9], device=device), context).float() - z).square().mean()


def autoencoder_loss(network: Autoencoder) -> torch.Tensor:
    device = next(network.parameters()).device
    volume = noise(1, 1, 24, 28, 24).to(device).abs() / 3
    reconstruction, _ = network(volume, noise(1, 3, 6, 7, 6).to(device))
    return (reconstruction.float() - volume).square().mean()


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return without_zeros(Autoencoder(3, 4, (16, 32), blocks=1))


NETWORKS = {"unet": (unet, unet_loss), "autoencoder": (autoencoder, autoencoder_loss)}


def gradients(network, loss, half: bool = False) -> tuple[float, list[torch.Tensor]]:
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        value = loss(network)
    value.backward()
    found = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    return value.item(), found


# Precision


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_convolutions(device, dtype, record_property):
    error = convolution_error(device, dtype)
    record_property("error", error)
    assert error < CONVOLUTION_ERROR


def test_large_convolutions(device, exact, record_property):
    """At 1 mm the decoder works on 80 x 112 x 80: some releases of cuDNN computed such ones wrongly in bfloat16."""
    sides = (80, 112, 80) if device.type == "cuda" else (12, 14, 12)
    x, weight = noise(1, 32, *sides).to(device), noise(32, 32, 3, 3, 3).to(device) / 30
    x, weight = (value.bfloat16().to(memory_format=torch.channels_last_3d) for value in (x, weight))
    expected = F.conv3d(x.float(), weight.float(), padding=1)
    error = ((F.conv3d(x, weight, padding=1).float() - expected).abs().max() / expected.abs().max()).item()
    record_property("error", error)
    assert error < 2 * UNIT[torch.bfloat16]  # products are exact in float32, sums are in float32, the result is rounded once


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_those_of_the_cpu(device, exact, name, record_property):
    """In float32: norms and pads have kernels of their own on CUDA."""
    make, loss = NETWORKS[name]
    expected, found = gradients(make().double(), _double(loss)), gradients(make().to(device), loss)
    record_property("loss_error", error := abs(found[0] / expected[0] - 1))
    record_property("gradient_error", gradient_error := distance(found[1], expected[1]))
    # About 100 roundings one after the other; a convolution's sum of some 1,000 products is less exact than one rounding
    assert error < 1000 * UNIT[torch.float32] and gradient_error < 10000 * UNIT[torch.float32]


def _double(loss):
    """The loss with the inputs of float32, in float64."""

    def of(network):
        forward = network.forward
        network.forward = lambda *inputs: forward(*(i.double() if i.is_floating_point() else i for i in inputs))
        return loss(network).double()

    return of


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bf16_training_step_is_that_of_float32(device, exact, name, record_property):
    """As near as the rounding allows.

    Rounding the weights alone, each once, moves the gradient by d. The step rounds activations and their gradients as well:
    in a block about 8 results on the way there and 16 on the way back, where it has 2 weights. Errors that are independent
    add in squares, so about sqrt(1 + 12) d = 3.6 d is expected, and twice that allowed.
    """
    make, loss = NETWORKS[name]
    network = make().to(device)
    expected, exactly = gradients(network, loss)
    value, found = gradients(network, loss, half=True)
    rounded = copy.deepcopy(network)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    moved = distance(gradients(rounded, loss)[1], exactly)
    error = distance(found, exactly)
    record_property("gradient_error", error)
    record_property("of_rounded_weights", moved)
    record_property("loss_error", abs(value / expected - 1))
    assert error < 7.2 * moved
    assert abs(value / expected - 1) < 0.02
    assert error > 0  # it did compute in bfloat16


# Attention


@pytest.mark.parametrize("shape", [(150, 150, 32), (1000, 4, 64), (300, 300, 128)], ids=str)
@pytest.mark.parametrize("dtype", UNIT, ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["auto", "math", "xformers", *KERNELS])
def test_attention_is_that_of_float64(device, exact, kernel, dtype, shape, record_property):
    """Queries, keys and channels of a head; forward and backward.

    With logits s, one rounding of s or of the weights changes a result by up to (|s| + 1) u max|v|; there are three of them,
    with that of the result.
    """
    if kernel == "xformers" and (why := why_xformers_fails(device, dtype, shape[-1])):
        pytest.skip(f"xformers: {why}"[:300])
    queries, keys, channels = shape
    inputs = [noise(2, 3, n, channels, seed=i).to(device, dtype) for i, n in enumerate((queries, keys, keys))]
    q, k, v = (x.double().cpu().requires_grad_() for x in inputs)
    logits = q @ k.mT / math.sqrt(channels)
    expected = logits.softmax(-1) @ v
    weight = noise(*expected.shape, seed=9)
    wanted = torch.autograd.grad((expected * weight.to(dtype).double()).sum(), (q, k, v))
    inputs = [x.requires_grad_() for x in inputs]
    try:
        if kernel in KERNELS:
            with sdpa_kernel(KERNELS[kernel]):
                out = F.scaled_dot_product_attention(*inputs)
        else:
            out = attention(*inputs, kernel)
        found = torch.autograd.grad((out * weight.to(device, dtype)).sum(), inputs)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            pytest.skip("PyTorch has no such kernel for this device and type")
        raise
    error = (out.detach().double().cpu() - expected).abs().max().item()
    limit = 3 * UNIT[dtype] * (logits.abs().max() + 1) * v.abs().max()
    gradient_error = max(distance(*pair) for pair in zip(found, wanted))
    record_property("error", error)
    record_property("limit", limit.item())
    record_property("gradient_error", gradient_error)
    assert error < limit
    # In the backward pass some ten roundings follow one another, in float32 the sums of some hundred products count more
    assert gradient_error < (10 if dtype == torch.bfloat16 else 100) * UNIT[dtype]


# Compilation


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_levels_compiled_by_region(device, exact, half, record_property):
    """As training does under `--dynamo_use_regional_compilation`; on a CPU with the backend that compiles nothing."""
    torch._dynamo.reset()
    network = unet().to(device)
    expected, exactly = gradients(network, unet_loss, half)
    for level in (*network.down, *network.up):
        level.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    value, found = gradients(network, unet_loss, half)
    torch._dynamo.reset()
    record_property("gradient_error", error := distance(found, exactly))
    # Fused operations leave roundings to bfloat16 out
    assert error < (0.1 if half else 1e-4) and value == pytest.approx(expected, rel=0.02 if half else 1e-5)


def test_sampling_with_cuda_graphs(cuda, record_property):
    """`ldm3d generate --compile`: the same volumes, to rounding, twice the same bits, and graphs that are really replayed."""
    torch._dynamo.reset()
    expected, found = [], []
    for volumes, compiled in ((expected, False), (found, True)):
        model = make_pipeline(channels=16).to(cuda)
        model.compile() if compiled else model
        rows = model.parse([{"age": 20.0 + 5 * i} for i in range(3)])
        volumes += [[v.copy() for v in model.volumes(rows, model.sampling)] for _ in range(3)]
    error = max(distance(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(found[0], expected[0]))
    record_property("error", error)
    record_property("same_bits_as_uncompiled", error == 0)
    assert error < 0.02
    assert [v.tobytes() for v in found[1]] == [v.tobytes() for v in found[2]]
    from torch._inductor.cudagraph_trees import get_manager

    assert get_manager(cuda.index or 0, create_if_none_exists=False) is not None


# Data to the device and back


def read(sample: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, generator=rng) + sample}


@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_batches(cuda, workers):
    batches = TrainingBatches(read, 10, 4, 1, seed=0)
    plain, pinned = (list(batches.loader(0, 3, workers, pin)) for pin in (False, True))
    for one, other in zip(plain, pinned):
        assert all(value.is_pinned() for value in other.values())
        assert all(torch.equal(one[name], other[name].to(cuda, non_blocking=True).cpu()) for name in one)


def test_copies_to_the_host_arrive(device):
    values = [noise(64, 64, 64, seed=i).to(device) for i in range(8)]
    copies = [HostCopy(value * 2) for value in values]
    for value, copied in zip(values, copies):
        assert torch.equal(torch.from_numpy(copied.numpy()), (value * 2).cpu())


# Training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """`conftest.experiment`, smaller still, and trained on the device."""
    folder = tmp_path_factory.mktemp("tiny")
    write_dataset(folder / "data", subjects=12, shape=SIDES, spacing_mm=12, seed=3, workers=1)
    settings = tiny_settings(folder)
    settings["data"] |= {"grid": {"shape": list(SIDES), "spacing_mm": 12}, "splits": {"validation": 0.1, "test": 0.1}}
    settings["autoencoder"] |= {"network": {"latent_channels": 3, "downsampling": 4, "channels": [4, 8], "blocks": 1}}
    settings["autoencoder"]["linear_path_steps"] = 2
    settings["generation"] = {"sampler": "euler", "steps": 1}
    precision = {"mixed_precision": "auto" if torch.cuda.is_available() else "no"}
    for stage in STAGES:
        settings[stage]["training"] |= precision | {"steps": STEPS, "log_every": 1, "validate_every": STEPS, "batch_size": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command_line("prepare", folder / "config.yaml", "--workers", 1)
    train("autoencoder", folder / "config.yaml")
    command_line("encode", folder / "config.yaml")
    train("diffusion", folder / "config.yaml")
    return folder


def another_run(tiny: Path, folder: Path, stage: str) -> Path:
    """The config with its output elsewhere, and there all that a stage starts from."""
    folder.mkdir(exist_ok=True)
    settings = yaml.safe_load((tiny / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"output": str(folder)}))
    for name in ("prepared",) if stage == "autoencoder" else ("prepared", "autoencoder", "latents"):
        shutil.copytree(tiny / "run" / name, folder / name)
    return folder / "config.yaml"


def train(stage: str, config: Path, *settings: str, stop: Stop | None = None) -> None:
    """In this process, on the device; without pictures, which take longest."""
    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(f"ldm3d.training.{stage}")
    with patch.object(figures, "save"), patch.object(figures, "mosaic"), patch.object(figures, "curves"):
        module.train(load_config(config, settings, stage), stop or Stop())
    AcceleratorState._reset_state(reset_partial_state=True)


def checkpoint(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{stage}-training/checkpoints/step-{STEPS:08d}/tensors.safetensors")


@pytest.fixture
def deterministic(device, monkeypatch):
    """Within it, every kernel adds in a fixed order. Without it, training on a GPU does not promise its last bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(parallel, "use_fast_kernels", lambda device: None)  # cuDNN would choose by timing
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


def stopped_and_gone_on(tiny: Path, folder: Path, stage: str) -> None:
    """After the first step: before it, a stop would end stage 1 with nothing done."""
    config = another_run(tiny, folder, stage)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr(parallel, "asked_to_stop", lambda *_, **__: True)
        train(stage, config, stop=Stop("SIGUSR1") if stage == "diffusion" else Stop())
    assert done.value.code == REQUEUE
    train(stage, config)


@pytest.mark.parametrize("stage", STAGES)
def test_resumption_is_exact(tiny, tmp_path, device, deterministic, stage):
    train(stage, another_run(tiny, tmp_path / "whole", stage))
    stopped_and_gone_on(tiny, tmp_path / "stopped", stage)
    one, other = (checkpoint(tmp_path / name, stage) for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_resumption_as_it_ships(tiny, tmp_path, device, record_property, stage="diffusion"):
    """With cuDNN's fastest kernels: the same course, and whether it is the same bits is recorded."""
    stopped_and_gone_on(tiny, tmp_path, stage)
    one, other = checkpoint(tiny / "run", stage), checkpoint(tmp_path, stage)
    record_property("same_bits", all(torch.equal(one[name], other[name]) for name in one))
    losses = [read_metrics(f / f"{stage}-training/metrics.jsonl")[-1]["loss"] for f in (tiny / "run", tmp_path)]
    record_property("loss_error", abs(losses[1] / losses[0] - 1))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class WithoutWaits(Stop):
    """A stop after three steps; in the second and the third, CUDA raises an error where the host would wait for it."""

    steps = 0

    @property
    def asked(self) -> bool:
        self.steps += 1
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if self.steps < 3 else "default")
        self.signal = "SIGTERM" if self.steps == 3 else None
        return self.steps == 3


@pytest.mark.parametrize(
    "stage, settings",
    [
        ("autoencoder", ["training.optimizer=muon"]),
        ("diffusion", ["training.optimizer=adamw"]),
        ("diffusion", ["training.optimizer=muon", "diffusion.process={kind: vp-linear}"]),
    ],
    ids=["autoencoder-muon", "diffusion-adamw", "diffusion-muon"],
)
def test_the_host_waits_for_nothing(tiny, tmp_path, device, stage, settings):
    quiet = [f"training.{name}_every=100" for name in ("log", "validate", "preview", "checkpoint")]
    stop = WithoutWaits()
    try:
        with pytest.raises(SystemExit) as done:
            train(stage, another_run(tiny, tmp_path, stage), *settings, *quiet, stop=stop)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert done.value.code == REQUEUE and stop.steps == 3


def test_fsdp2_on_one_process(tiny, tmp_path, device, record_property):
    """configs/accelerate/fsdp.yaml with one process: the losses of a run without it. On a CPU by way of tests/sharded.py."""
    config = another_run(tiny, tmp_path, "diffusion")
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    environment = {**os.environ, **here, "RANK": "0", "LOCAL_RANK": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    program = f"import sharded; sharded.train_spread({str(config)!r}, {device.type!r})"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [[row["loss"] for row in read_metrics(f / "diffusion-training/metrics.jsonl")] for f in (tiny / "run", tmp_path)]
    record_property("loss_error", max(abs(b / a - 1) for a, b in zip(*losses)))
    assert losses[1] == pytest.approx(losses[0], rel=0.03 if device.type == "cuda" else 1e-4)  # bfloat16


# Generation


def test_a_volume_has_the_same_bits_in_any_series(device):
    model = make_pipeline(channels=16).to(device)
    rows = model.parse([{"age": 20.0 + 5 * i, "sex": "FM"[i % 2]} for i in range(7)])
    for kind in (torch.float32, torch.bfloat16):
        volumes = functools.partial(model.to(dtype=kind).volumes, sampling=model.sampling)
        torch.backends.cudnn.benchmark = True  # as after a training in the same process
        together = [volume.tobytes() for volume in volumes(rows)]
        assert [volume.tobytes() for volume in volumes(rows, batch_size=1)] == together
        alone = [next(volumes([rows[i]], numbers=[i])).tobytes() for i in (0, 3, 6)]
        torch.backends.cudnn.benchmark = False
        assert alone == [together[i] for i in (0, 3, 6)]
        assert len(set(together)) == 7
