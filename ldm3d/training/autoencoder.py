"""Stage 1: train the autoencoder.

    accelerate launch -m ldm3d.training.autoencoder CONFIG [--set key=value ...]

Reads prepared volumes, writes OUTPUT/autoencoder-training (checkpoints, metrics.jsonl, previews, TensorBoard) and, at the
end, OUTPUT/autoencoder with the latents' statistics in it. Started again with the same command it goes on.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm3d import figures
from ldm3d.config.sections import Config
from ldm3d.data.batches import evenly
from ldm3d.data.preparing import read_scan_table
from ldm3d.data.samples import VolumeSamples, load_volume
from ldm3d.errors import InputError
from ldm3d.metrics.reconstruction import psnr
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.models.pretrained import load_weights, make_network, weights_hash
from ldm3d.preemption import Stop
from ldm3d.processes import cores
from ldm3d.randomness import generator
from ldm3d.seen import GO_ON, sign
from ldm3d.training import command
from ldm3d.training.ema import EMA
from ldm3d.training.linear_path import train_linear_path, volumes_for
from ldm3d.training.loop import fit
from ldm3d.training.losses import VolumeLoss
from ldm3d.training.optimizer import learning_rate, make_optimizer
from ldm3d.training.parallel import same_start, start_accelerator
from ldm3d.training.task import MAIN, Task, Trained, batches_of

MAX_VALIDATION = 64  # volumes, evenly chosen; more would not change which checkpoint is best


def train(config: Config, stop: Stop) -> None:
    """Run, or go on with, the training that the config describes, until it is done or a stop is asked for."""
    training, run = config.autoencoder.training, config.autoencoder_run
    scans = read_scan_table(config)
    if not (scans["split"] == "train").any():
        raise InputError(f"no scan in the training split of {config.prepared_folder}; lower data.splits")
    accelerator = start_accelerator(training, run, config.seed)
    fit(AutoencoderTask(config, scans, accelerator), training, run, accelerator, stop)


class AutoencoderTask(Task):
    """The autoencoder and, if the config has one, its adversary.

    Args:
        config: of the experiment.
        scans: the table of prepared scans.
        accelerator: of the run.
    """

    title, shown = "autoencoder", "l1"

    def __init__(self, config: Config, scans, accelerator: Accelerator):
        self.config, self.scans, self.accelerator = config, scans, accelerator
        settings, training = config.autoencoder, config.autoencoder.training
        self.keys = {split: list(scans.loc[scans["split"] == split, "key"]) for split in ("train", "validation")}
        self.settings = {
            "autoencoder": settings.model_dump(mode="json"),
            "grid": config.data.grid.model_dump(mode="json"),
            "seed": config.seed,
        }
        model = make_network("Autoencoder", **settings.network.model_dump()).to(accelerator.device)
        rate = partial(learning_rate, training=training)
        average, optimizer = EMA(model, training.ema), make_optimizer(model, training)
        self.loss = VolumeLoss.of(settings, model.in_channels, accelerator)
        self.trained = {MAIN: Trained(model, optimizer, rate, training.gradient_clip, average), **self.loss.trained}
        self.settled, self.takes_other_scans = self.loss.settled, settings.changed_data == GO_ON
        samples = VolumeSamples(config, tuple(self.keys["train"]), model.latent_shape(config.data.grid.shape))
        self.batches = batches_of(samples, training, config.seed, accelerator)

    def begin(self) -> None:
        if self.config.autoencoder.network.linear_path:
            main = self.trained[MAIN]
            start_from_linear_path(main.network, self.config, self.keys["train"], self.accelerator)
            load_weights(main.average.network, main.network.state_dict(), "the linear path")

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The autoencoder's, and then its adversary's; batch: volume (n, C, X, Y, Z), noise (n, c, x, y, z)."""
        with self.accelerator.autocast():
            made, moments = self.trained[MAIN].module(batch["volume"], batch["noise"])
        return self.loss.in_turn(batch["volume"], made, step, moments)

    def score(self, average: LatentSpace, step: int) -> dict[str, float]:
        def loss(volume: Tensor, noise: Tensor) -> Tensor:
            with self.accelerator.autocast():
                made, moments = average(volume, noise)
            return self.loss(volume, made, step, moments)[0]

        keys = self.keys["validation"]
        return validate(loss, average, self.config, keys, self.accelerator) if keys else {}

    def preview(self, average: LatentSpace, path: Path) -> None:
        shown = (self.keys["validation"] or self.keys["train"])[:4]
        draw_reconstructions(average, self.config, shown, self.accelerator.device, path)

    def export(self, average: LatentSpace, which: str) -> None:
        export(self.config, average, self.keys["train"], which, self.accelerator)


def start_from_linear_path(model: Autoencoder, config: Config, keys: list[str], accelerator: Accelerator) -> None:
    """Fit the linear path to some volumes: the main process does, on the cores of all, and gives it to the others.

    So one process and several start from the same bits.
    """
    if accelerator.is_main_process:
        count = volumes_for(config.data.grid.shape)
        chosen = keys[:: max(1, len(keys) // count)][:count]
        print(f"fitting the linear path to {len(chosen)} volumes", flush=True)
        volumes = torch.stack([load_volume(config, key) for key in chosen])  # (n, C, X, Y, Z)
        threads = torch.get_num_threads()
        torch.set_num_threads(cores())
        train_linear_path(model, volumes, config.autoencoder.linear_path_steps, config.seed, accelerator.autocast)
        torch.set_num_threads(threads)
    same_start(model)


def export(config: Config, network: LatentSpace, keys: list[str], which: str, accelerator: Accelerator) -> None:
    """Write the averaged network, with its latents' statistics over the training split, as OUTPUT/autoencoder.

    `which` says in words what the network is.
    """
    # Sums over this process's share, then over all: (sum, sum of squares) of c channels, and how many values
    count, total = 0, torch.zeros(2, network.latent_channels, dtype=torch.float64)
    with torch.no_grad(), accelerator.autocast():
        own = keys[accelerator.process_index :: accelerator.num_processes]
        training = config.autoencoder.training
        together = max(1, training.batch_size // (training.accumulation * accelerator.num_processes))
        for first in range(0, len(own), together):
            volumes = torch.stack([load_volume(config, key) for key in own[first : first + together]])  # (n, C, X, Y, Z)
            mean, log_variance = network.encode(volumes.to(accelerator.device)).float().chunk(2, dim=1)
            # The second moment of a posterior sample: its variance counts
            moments = torch.stack([mean, mean.square() + log_variance.exp()])  # (2, n, c, x, y, z)
            total += moments.double().sum(dim=(1, 3, 4, 5)).cpu()
            count += mean[:, 0].numel()
    total = accelerator.reduce(total.float().to(accelerator.device), "sum").double().cpu()
    count = accelerator.reduce(torch.tensor(float(count), device=accelerator.device), "sum").item()
    mean, square = total / count
    network.latent_mean.copy_(mean)
    network.latent_std.copy_((square - mean.square()).clamp_min(1e-12).sqrt())
    if accelerator.is_main_process:
        network.save_pretrained(config.autoencoder_folder)
        sign(config.autoencoder_run, weights_hash(config.autoencoder_folder))
        print(f"autoencoder written to {config.autoencoder_folder} ({which})")
    accelerator.wait_for_everyone()


@torch.no_grad()
def reconstruct(network: LatentSpace, volumes: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode, clipped to [0, 1]."""
    return network.decode(network.sample(network.encode(volumes))).float().clamp(0, 1)


@torch.no_grad()
def validate(
    loss: Callable[[Tensor, Tensor], Tensor],
    network: LatentSpace,
    config: Config,
    keys: list[str],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Mean loss of held-out volumes, and the mean PSNR (dB) of their reconstructions.

    Shared over the processes, which all call the networks equally often: what is spread over them needs that.

    Args:
        loss: (volume (1, C, X, Y, Z), noise like its latent) -> what is trained, in autocast.
    """
    chosen, world = evenly(keys, MAX_VALIDATION), accelerator.num_processes
    total = torch.zeros(2, dtype=torch.float64)
    for turn in range(-(-len(chosen) // world)):
        number = turn * world + accelerator.process_index
        volume = load_volume(config, chosen[number % len(chosen)])[None].to(accelerator.device)
        noise = torch.randn((1, *network.latent_shape(volume.shape[2:])), generator=generator("validation", number))
        value = loss(volume, noise.to(accelerator.device)).item()
        with accelerator.autocast():
            quality = psnr(reconstruct(network, volume), volume).item()
        if number < len(chosen):
            total += torch.tensor([value, quality], dtype=torch.float64)
    means = accelerator.reduce(total.float().to(accelerator.device), "sum") / len(chosen)
    return dict(zip(("validation_loss", "validation_psnr_db"), means.tolist()))


def draw_reconstructions(network: LatentSpace, config: Config, keys: list[str], device, path) -> None:
    """Originals above their reconstructions, as a picture."""
    volumes = torch.stack([load_volume(config, key) for key in keys]).to(device)
    again = reconstruct(network, volumes)
    titles = ["original"] * len(keys) + [f"{quality:.1f} dB" for quality in psnr(again, volumes).tolist()]
    shown = [volume.cpu().numpy() for volume in torch.cat([volumes, again])]
    figures.save(figures.mosaic(shown, titles, config.data.grid.spacing_mm, columns=len(keys)), path)


def main() -> None:
    command.run(train, "Train the autoencoder of an experiment (stage 1).", "autoencoder")


if __name__ == "__main__":
    main()
