"""What the trainings on volumes share: stage 1 (the autoencoder) and stage 3 (its decoder). Volumes are (N, C, X, Y, Z)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm3d import figures
from ldm3d.config.sections import AutoencoderConfig, Config, DecoderConfig
from ldm3d.data.batches import evenly
from ldm3d.data.coded import CodedVolumes
from ldm3d.data.samples import VolumeSamples
from ldm3d.metrics.reconstruction import psnr
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.randomness import generator
from ldm3d.seen import GO_ON
from ldm3d.training.losses import VolumeLoss
from ldm3d.training.task import MAIN, Task, Trained, batches_of

MAX_VALIDATION = 64  # volumes, evenly chosen; more would not change which checkpoint is best


class VolumeTask(Task):
    """A network that makes volumes, and its adversary if the config has one; a subclass adds `reconstruct` and `export`.

    Args:
        config: of the experiment.
        settings: the config's section of this training.
        scans: the table of prepared scans.
        network: to train; on the accelerator's device.
        space: its latent space.
        accelerator: of the run.
    """

    shown = "l1"
    sample_class = VolumeSamples

    def __init__(
        self,
        config: Config,
        settings: AutoencoderConfig | DecoderConfig,
        scans,
        network: nn.Module,
        space: LatentSpace,
        accelerator: Accelerator,
    ):
        self.config, self.scans, self.accelerator = config, scans, accelerator
        self.coded = CodedVolumes.of(config, scans)
        scans = scans[[key in self.coded for key in scans["key"]]]
        self.keys = {split: list(scans.loc[scans["split"] == split, "key"]) for split in ("train", "validation")}
        main = Trained.of(network, settings.training)
        self.loss = VolumeLoss.of(settings, space.in_channels, accelerator)
        self.trained = {MAIN: main, **self.loss.trained}
        self.settled, self.takes_other_scans = self.loss.settled, config.autoencoder.changed_data == GO_ON
        shape = space.latent_shape(config.data.grid.shape)
        samples = self.sample_class(config, tuple(self.keys["train"]), shape, self.coded.filled)
        rows = scans[scans["split"] == "train"]
        self.batches = batches_of(samples, settings.training, config, accelerator, rows)

    def reconstruct(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(volumes made of a batch, posterior moments if the loss counts them), in autocast.

        Args:
            network: `MAIN`, or its average.
            batch: `volume` (n, C, X, Y, Z) and `noise` (n, c, x, y, z); in training, all that `sample_class` reads.
        """
        raise NotImplementedError

    def space(self, network: nn.Module) -> LatentSpace:
        """The autoencoder that a network is, or is a part of."""
        return network

    def volumes(self, keys: Sequence[str]) -> Tensor:
        """What the autoencoder is of, (n, C, X, Y, Z), on the CPU; where a contrast is missing, the scan itself."""
        return torch.stack([torch.from_numpy(self.coded.filled(key)) for key in keys])

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        made, moments = self.reconstruct(self.trained[MAIN].module, batch)
        return self.loss.in_turn(batch["volume"], made, step, moments)

    @torch.no_grad()
    def score(self, average: nn.Module, step: int) -> dict[str, float]:
        """Mean loss of held-out volumes, and the mean PSNR (dB) of their reconstructions.

        The processes share the volumes. All call the network equally often, which sharded parameters need.
        """
        chosen, accelerator, space = evenly(self.keys["validation"], MAX_VALIDATION), self.accelerator, self.space(average)
        if not chosen:
            return {}
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(chosen), accelerator.num_processes):
            number = first + accelerator.process_index
            volume = self.volumes([chosen[number % len(chosen)]]).to(accelerator.device)
            noise = torch.randn((1, *space.latent_shape(volume.shape[2:])), generator=generator("validation", number))
            batch = {"volume": volume, "noise": noise.to(accelerator.device)}
            made, moments = self.reconstruct(average, batch)
            loss, _ = self.loss(volume, made, step, moments)
            with accelerator.autocast():
                quality = psnr(clipped_reconstruction(space, volume), volume)
            if number < len(chosen):
                total += torch.tensor([loss.item(), quality.item()], dtype=torch.float64)
        means = accelerator.reduce(total.float().to(accelerator.device), "sum") / len(chosen)
        return dict(zip(("validation_loss", "validation_psnr_db"), means.tolist()))

    def preview(self, average: nn.Module, path: Path) -> None:
        """Originals above their reconstructions."""
        keys = (self.keys["validation"] or self.keys["train"])[:4]
        volumes = self.volumes(keys).to(self.accelerator.device)
        again = clipped_reconstruction(self.space(average), volumes)
        titles = ["original"] * len(keys) + [f"{quality:.1f} dB" for quality in psnr(again, volumes).tolist()]
        shown = [volume.cpu().numpy() for volume in torch.cat([volumes, again])]
        figures.save(figures.mosaic(shown, titles, self.config.data.grid.spacing_mm, columns=len(keys)), path)


@torch.no_grad()
def clipped_reconstruction(space: LatentSpace, volumes: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode, clipped to [0, 1]."""
    return space.decode(space.sample(space.encode(volumes))).float().clamp(0, 1)
