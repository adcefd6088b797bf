"""At full size: every stage of ldm3d beside MONAI's published brain model, in seconds and peak memory.

    python benchmarks/full_size.py [--quick] [--only step decode ...] [--shape 160 224 160]

ldm3d's side is configs/brain-1mm.yaml with its own sampler, steps and guidance, from a request to an array through
`Pipeline`; MONAI's is the configuration of the model zoo's brain_image_synthesis_latent_diffusion_model (Pinaya et al. 2022):
AutoencoderKL and the 553 M parameters of DiffusionModelUNet under MONAI's own LatentDiffusionInferer and DDIMScheduler, 50
steps. Weights are random on both sides, which changes no time. Both run in bfloat16 where the machine multiplies it, training
under autocast.

Each figure comes from its own process, sides in alternation; memory is the peak above what the loaded weights take. A
process that outgrows --limit-gb or --limit-seconds is ended, and its row says "not measured". With --quick, generation makes
3 steps only; the time of those that are left out is added from the median U-Net call, and the row says so.

Parts: step (one U-Net call), sample, decode, encode, generate (a volume, request to array), train-autoencoder and
train-diffusion (one step of batch 1 each; MONAI's without the perceptual and adversarial losses of its bundle); with a GPU
also batches (volumes a second), compiled (torch.compile for ldm3d's sampling) and utilisation (of ldm3d's trainings and
sampling).
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from monai.inferers import DiffusionInferer, LatentDiffusionInferer
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from protocol import GB, denoiser_calls, device, free_memory, in_own_process, measure, summarise, timed, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm3d.config.read import load_config
from ldm3d.config.sections import Config
from ldm3d.covariates import CovariateSchema
from ldm3d.description import Sampling
from ldm3d.diffusion.denoiser import TIMESTEPS, call_network
from ldm3d.diffusion.objective import make_objective
from ldm3d.diffusion.schedules import make_process
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import Autoencoder
from ldm3d.models.conditioning import Conditions
from ldm3d.models.unet import Block, UNet
from ldm3d.pipeline import Pipeline
from ldm3d.precision import bf16_is_fast, dtype
from ldm3d.training.losses import kl_divergence
from ldm3d.training.optimizer import make_optimizer

CONFIG = Path(__file__).parents[1] / "configs" / "brain-1mm.yaml"
PARTS = ("step", "sample", "decode", "encode", "generate", "train-autoencoder", "train-diffusion")
QUICK_PARTS = ("step", "decode", "generate")
GPU_PARTS = ("batches", "compiled", "utilisation")
QUICK_STEPS, MONAI_STEPS = 3, 50
ENOUGH_SECONDS = 20.0  # a call that takes longer is not repeated
KL = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS + GPU_PARTS, help="parts; all that the machine can do if not given")
    parser.add_argument("--quick", action="store_true", help="step, decode and generate only, generation from 3 of its steps")
    parser.add_argument("--shape", type=int, nargs=3, help="of the volume, multiples of 32; the config's if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-seconds", type=float, default=900, help="of one process")
    parser.add_argument("--limit-gb", type=float, help="of one process; 85%% of the free memory if not given")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(perform(**arguments.task)))
        return

    shape = arguments.shape or load_config(CONFIG).data.grid.shape
    common = {"shape": shape, "repeats": arguments.repeats, "quick": arguments.quick}
    limits = (arguments.limit_seconds, arguments.limit_gb or 0.85 * free_memory())
    rows = []
    header = f"{'part':>17} {'side':>6} {'variant':>18} {'seconds':>9} {'min':>8} {'max':>8} {'runs':>4} {'weights GB':>10}"
    print(f"{header} {'peak GB above':>13}")
    for part in arguments.only or (QUICK_PARTS if arguments.quick else PARTS + GPU_PARTS):
        for task in tasks(part):
            if part in GPU_PARTS and device().type == "cpu" and not arguments.only:
                found = {"not_measured": "needs a GPU"}
            else:
                found = in_own_process(__file__, {**task, **common}, *limits)
            rows.append({**task, "call": task["part"], "part": part, "shape": shape, **found})
            print(line(rows[-1]), flush=True)
            write("full-size", rows)
    print(*ratios(rows), sep="\n")
    print(write("full-size", rows))


def tasks(part: str) -> list[dict]:
    """What has to be measured for a part, sides in alternation."""
    sides = ("ldm3d", "monai")
    if part == "batches":
        return [{"part": "generate", "side": side, "batch": n} for n in (1, 2, 4, 8, 16) for side in sides]
    if part == "compiled":
        return [{"part": "sample", "side": "ldm3d", "compiled": how} for how in ("no", "whole", "blocks")]
    if part == "utilisation":
        calls = [
            ("train-diffusion", 4),
            ("train-diffusion", 16),
            ("train-diffusion", 64),
            ("train-autoencoder", 8),
            ("sample", 8),
        ]
        return [{"part": call, "side": "ldm3d", "batch": n, "of_rate": True} for call, n in calls]
    return [{"part": part, "side": side} for side in sides]


def line(row: dict) -> str:
    variant = " ".join(f"{key} {row[key]}" for key in ("batch", "compiled") if key in row)
    start = f"{row['call']:>17} {row['side']:>6} {variant:>18}"
    if "not_measured" in row:
        return f"{start} not measured: {row['not_measured']}"
    text = f"{start} {row['median']:9.2f} {row['min']:8.2f} {row['max']:8.2f} {row['repeats']:4} {row['weights_gb']:10.2f}"
    text += f" {row['peak_gb']:13.2f}"
    if "extrapolated" in row:
        text += f"  extrapolated: {row['extrapolated']}"
    if "of_matmul_rate" in row:
        text += f"  {row['of_matmul_rate']:.0%} of the measured {row['matmul_tflops']:.0f} TFLOP/s"
    elif row.get("batch", 1) > 1:
        text += f"  {row['batch'] / row['median']:.3f} volumes a second"
    return text


def ratios(rows: list[dict]) -> list[str]:
    """MONAI's figure over ldm3d's, wherever both are there."""
    found = {(row["part"], row["side"]): row for row in rows if "median" in row}
    lines = []
    for part, key, what in (
        ("generate", "median", "a volume, end to end: seconds"),
        ("step", "median", "one U-Net call: seconds"),
        ("decode", "median", "decode: seconds"),
        ("encode", "median", "encode: seconds"),
        ("train-autoencoder", "median", "a stage-1 training step: seconds"),
        ("train-diffusion", "median", "a stage-2 training step: seconds"),
        ("decode", "peak_gb", "decode: memory above the weights"),
        ("generate", "peak_gb", "a volume, end to end: memory above the weights"),
    ):
        ours, theirs = found.get((part, "ldm3d")), found.get((part, "monai"))
        if ours and theirs:
            value = f"{theirs[key]:.3g} / {ours[key]:.3g} = {theirs[key] / ours[key]:.1f}"
            lines.append(f"MONAI / ldm3d, {what}: {value}")
    return lines


def perform(
    part: str,
    side: str,
    shape: list[int],
    repeats: int,
    quick: bool,
    batch: int = 1,
    compiled: str = "no",
    of_rate: bool = False,
    path: Path = CONFIG,
) -> dict:
    """Measure one part of one side; `of_rate`: as a share of the rate of matrix products; `path`: the config of our side."""
    torch.manual_seed(0)
    if device().type == "cuda":  # as ldm3d's training and generation set them
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = part.startswith("train")
    config = load_config(path)
    chosen = Ours(config, tuple(shape), quick, batch, compiled) if side == "ldm3d" else Monai(tuple(shape), quick, batch)
    call = getattr(chosen, part.replace("-", "_"))()
    if of_rate:
        return utilisation(chosen, call, repeats)
    found = measure(call, repeats, ENOUGH_SECONDS)
    found["weights_gb"] = sum(p.numel() * p.element_size() for n in chosen.networks for p in n.parameters()) / GB
    if part in ("sample", "generate") and chosen.steps < chosen.all_steps:
        # The first call of a run is slower: it is not what the left-out ones would have taken
        done = chosen.calls(chosen.steps)
        missing = chosen.calls(chosen.all_steps) - done
        rest = missing * statistics.median(chosen.unet_seconds[1:] or chosen.unet_seconds)
        found |= {key: found[key] + rest for key in ("median", "min", "max")}
        found["extrapolated"] = f"from {done} of {done + missing} U-Net calls"
        found["unet_call_seconds"] = summarise(chosen.unet_seconds)
    return found


def utilisation(side: "Side", call: Callable[[], object], repeats: int) -> dict:
    """A call's FLOP/s as a share of what large matrix products reach on the same machine."""
    with FlopCounterMode(display=False) as counter:
        call()
    found = measure(call, repeats, ENOUGH_SECONDS)
    rate = matmul_rate()
    reached = counter.get_total_flops() / found["median"]
    weights = sum(p.numel() * p.element_size() for network in side.networks for p in network.parameters()) / GB
    shares = {"tflop": counter.get_total_flops() / 1e12, "matmul_tflops": rate / 1e12, "of_matmul_rate": reached / rate}
    return {**found, "weights_gb": weights, **shares}


@functools.cache
def matmul_rate(n: int | None = None) -> float:
    """FLOP/s of a product of large matrices (n, n) in the precision that is fast here; the best of ten."""
    n = n or (8192 if device().type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device(), dtype=half()) for _ in range(2))
    a @ b  # the first call chooses a kernel
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(10))


def half() -> torch.dtype:
    return dtype("auto", device())


def autocast() -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16_is_fast(device()))


class Side:
    """One side's parts: each method loads what it needs and returns the call that is measured.

    Args:
        shape: (X, Y, Z) of the volume.
        quick: generation in QUICK_STEPS steps.
        batch: volumes at a time.
    """

    factor = 8  # voxels to a latent, along an axis

    def __init__(self, shape: tuple[int, ...], quick: bool, batch: int):
        self.shape, self.batch = shape, batch
        self.steps = min(QUICK_STEPS, self.all_steps) if quick else self.all_steps
        self.networks: list[nn.Module] = []
        self.unet_seconds: list[float] = []

    def load(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
        self.networks.append(network.to(device(), dtype))
        return network

    def watch(self, unet: nn.Module) -> None:
        """Keep the seconds of every call."""
        forward = unet.forward

        def watched(*args, **kwargs):
            answer = []
            self.unet_seconds.append(timed(lambda: answer.append(forward(*args, **kwargs))))
            return answer[0]

        unet.forward = watched

    def volume(self) -> Tensor:
        return torch.rand(self.batch, 1, *self.shape, device=device())

    def latent(self, channels: int) -> Tensor:
        return torch.randn(self.batch, channels, *(n // self.factor for n in self.shape), device=device())

    @staticmethod
    def train(network: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            loss().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step


class Ours(Side):
    """ldm3d as the config has it."""

    def __init__(self, config: Config, shape: tuple[int, ...], quick: bool, batch: int, compiled: str):
        grid = config.data.grid.model_copy(update={"shape": shape})
        self.config = config.model_copy(update={"data": config.data.model_copy(update={"grid": grid})})
        self.process = make_process(**config.diffusion.process.model_dump(exclude_none=True))
        self.all_steps, self.compiled = config.generation.steps, compiled
        self.factor = config.autoencoder.network.downsampling
        super().__init__(shape, quick, batch)

    def calls(self, steps: int) -> int:
        return denoiser_calls(self.config.generation.sampler, steps, self.process)

    def autoencoder(self) -> Autoencoder:
        return Autoencoder(**self.config.autoencoder.network.model_dump(exclude={"kind"}))

    def unet(self, schema: CovariateSchema) -> UNet:
        channels = self.config.autoencoder.network.latent_channels
        return UNet(channels, channels, schema.num_categories, **self.config.diffusion.network.model_dump(exclude={"kind"}))

    def schema(self) -> CovariateSchema:
        """Fitted to the ends of every range, so that requests are standardised to about 1."""
        covariates = self.config.schema()
        return covariates.fit([{c.name: (c.range or c.categories)[end] for c in covariates} for end in (0, -1)])

    def pipeline(self):
        schema = self.schema()
        autoencoder, unet = self.load(self.autoencoder().eval(), half()), self.load(self.unet(schema).eval(), half())
        if self.compiled == "whole":
            unet.compile(mode="reduce-overhead")
        elif self.compiled == "blocks":
            for block in (module for module in unet.modules() if isinstance(module, Block)):
                block.compile()
        if self.steps < self.all_steps:
            self.watch(unet)
        grid = Grid.centred(self.config.data.grid.shape, self.config.data.grid.spacing_mm)
        sampling = Sampling(**self.config.generation.model_dump()).replace(steps=self.steps)
        target = self.config.diffusion.target
        pipeline = Pipeline(autoencoder, unet, schema, grid, self.process, target, sampling, group=self.batch, threads=None)
        request = {c.name: (c.range or c.categories)[0] for c in schema}
        return pipeline, pipeline.parse([request] * self.batch)

    @torch.no_grad()
    def step(self):
        schema = self.schema()
        unet = self.load(self.unet(schema).eval(), half())
        z = self.latent(unet.arguments["in_channels"]).to(half())
        context = torch.ones(self.batch, len(schema), 2, device=device(), dtype=half())
        timesteps = torch.full((self.batch,), 0.5 * TIMESTEPS, device=device())
        return torch.no_grad()(lambda: unet(z, timesteps, context))

    def sample(self):
        pipeline, requests = self.pipeline()
        return lambda: pipeline.latents(requests, pipeline.sampling, range(self.batch))

    def generate(self):
        pipeline, requests = self.pipeline()
        return lambda: list(pipeline.volumes(requests, pipeline.sampling, batch_size=self.batch))

    def decode(self):
        pipeline, _ = self.pipeline()
        z = self.latent(pipeline.autoencoder.latent_channels)
        return lambda: pipeline.decode(z)

    def encode(self):
        network, volume = self.load(self.autoencoder().eval(), half()), self.volume().to(half())
        return torch.no_grad()(lambda: network.encode(volume))

    def train_autoencoder(self):
        network, volume = self.load(self.autoencoder()), self.volume()
        noise = self.latent(network.latent_channels)

        def loss() -> Tensor:
            with autocast():
                reconstruction, moments = network(volume, noise)
            return (reconstruction.float() - volume).abs().mean() + KL * kl_divergence(moments) / volume[0].numel()

        return self.train(network, make_optimizer(network, self.config.autoencoder.training), loss)

    def train_diffusion(self):
        schema, settings = self.schema(), self.config.diffusion
        network, objective = self.load(self.unet(schema)), make_objective(**settings.objective())
        accelerator = Accelerator(mixed_precision="bf16" if bf16_is_fast(device()) else "no")
        x = self.latent(network.arguments["in_channels"])
        conditions = Conditions(torch.ones(self.batch, len(schema), 2, device=device()))
        u = torch.full((self.batch,), 0.5, device=device())

        def predict(z: Tensor, time: Tensor) -> Tensor:
            with accelerator.autocast():
                return call_network(network, z, time, conditions)

        def loss() -> Tensor:
            return objective.losses(predict, x, torch.randn_like(x), u).mean()

        return self.train(network, make_optimizer(network, settings.training), loss)


class Conditioned(nn.Module):
    """The published model's two ways of conditioning at once: covariates as channels behind the latent, and as a token."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        if device().type == "cpu":  # where PyTorch has no average pooling in bfloat16
            for pool in (module for module in unet.modules() if isinstance(module, nn.AvgPool3d)):
                pool.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
                pool.register_forward_hook(lambda _, _inputs, output: output.to(unet.out[2].conv.weight.dtype))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        channels = context.transpose(1, 2)[..., None, None].expand(-1, -1, *x.shape[2:])  # (N, 4, x, y, z)
        return self.unet(torch.cat([x, channels], dim=1), timesteps, context)


class Monai(Side):
    """MONAI's published brain model under MONAI's inferers."""

    def __init__(self, shape: tuple[int, ...], quick: bool, batch: int):
        self.all_steps = MONAI_STEPS
        super().__init__(shape, quick, batch)

    def calls(self, steps: int) -> int:
        return steps

    def autoencoder(self) -> AutoencoderKL:
        return AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=(64, 128, 128, 128),
            latent_channels=3,
            num_res_blocks=2,
            norm_num_groups=32,
            attention_levels=(False, False, False, False),
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    def unet(self) -> Conditioned:
        return Conditioned(
            DiffusionModelUNet(
                spatial_dims=3,
                in_channels=7,
                out_channels=3,
                channels=(256, 512, 768),
                num_res_blocks=2,
                attention_levels=(False, True, True),
                num_head_channels=(0, 512, 768),
                norm_num_groups=32,
                resblock_updown=True,
                with_conditioning=True,
                transformer_num_layers=1,
                cross_attention_dim=4,
            )
        )

    def scheduler(self) -> DDIMScheduler:
        scheduler = DDIMScheduler(
            schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0205, num_train_timesteps=1000, clip_sample=False
        )
        scheduler.set_timesteps(MONAI_STEPS)
        scheduler.timesteps = scheduler.timesteps[: self.steps]
        return scheduler

    def context(self, dtype: torch.dtype) -> Tensor:
        return torch.full((self.batch, 1, 4), 0.5, device=device(), dtype=dtype)

    def step(self):
        unet, z, context = self.load(self.unet().eval(), half()), self.latent(3).to(half()), self.context(half())
        timesteps = torch.full((self.batch,), 500.0, device=device())
        return torch.no_grad()(lambda: unet(z, timesteps, context))

    def sample(self):
        unet, z, scheduler = self.load(self.unet().eval(), half()), self.latent(3).to(half()), self.scheduler()
        if self.steps < self.all_steps:
            self.watch(unet)
        inferer, context = DiffusionInferer(scheduler), self.context(half())
        return lambda: inferer.sample(z, unet, scheduler, conditioning=context, verbose=False)

    def generate(self):
        autoencoder, unet = self.load(self.autoencoder().eval(), half()), self.load(self.unet().eval(), half())
        if self.steps < self.all_steps:
            self.watch(unet)
        z, scheduler, context = self.latent(3).to(half()), self.scheduler(), self.context(half())
        inferer = LatentDiffusionInferer(scheduler, scale_factor=1.0)

        def call() -> Tensor:
            volume = inferer.sample(z, autoencoder, unet, scheduler, conditioning=context, verbose=False)
            return volume.float().cpu().numpy()

        return call

    def decode(self):
        network, z = self.load(self.autoencoder().eval(), half()), self.latent(3).to(half())
        return torch.no_grad()(lambda: network.decode_stage_2_outputs(z))

    def encode(self):
        network, volume = self.load(self.autoencoder().eval(), half()), self.volume().to(half())
        return torch.no_grad()(lambda: network.encode(volume))

    def train_autoencoder(self):
        network, volume = self.load(self.autoencoder()), self.volume()

        def loss() -> Tensor:
            with autocast():
                reconstruction, mean, sigma = network(volume)
            moments = torch.cat([mean, 2 * sigma.log()], dim=1)
            return (reconstruction.float() - volume).abs().mean() + KL * kl_divergence(moments) / volume[0].numel()

        return self.train(network, torch.optim.Adam(network.parameters(), 1e-4), loss)

    def train_diffusion(self):
        network, x, context = self.load(self.unet()), self.latent(3), self.context(torch.float32)
        scheduler, steps = self.scheduler(), torch.full((self.batch,), 500, device=device())

        def loss() -> Tensor:
            noise = torch.randn_like(x)
            with autocast():
                output = network(scheduler.add_noise(x, noise, steps), steps, context)
            return nn.functional.mse_loss(output.float(), noise)

        return self.train(network, torch.optim.Adam(network.parameters(), 2.5e-5), loss)


if __name__ == "__main__":
    main()
