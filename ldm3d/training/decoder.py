"""Stage 3, which is optional: train the decoder alone, so that volumes are sharp.

    accelerate launch -m ldm3d.training.decoder CONFIG [--set key=value ...]

Reads prepared volumes and OUTPUT/autoencoder, whose encoder stays as it is, so that latents and whatever was trained on them
stay valid. Writes OUTPUT/decoder-training, at the end OUTPUT/decoder, an autoencoder of the same latents, and puts it into
OUTPUT/model where that is there; otherwise stage 2 takes it up. Started again with the same command it goes on.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm3d.config.sections import Config
from ldm3d.data.preparing import read_scan_table
from ldm3d.data.samples import PerturbedSamples
from ldm3d.errors import InputError
from ldm3d.experiment import save_experiment
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.pretrained import weights_hash
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop
from ldm3d.seen import GO_ON, sign
from ldm3d.training import command
from ldm3d.training.autoencoder import draw_reconstructions, validate
from ldm3d.training.ema import EMA
from ldm3d.training.loop import fit
from ldm3d.training.losses import VolumeLoss
from ldm3d.training.optimizer import learning_rate, make_optimizer
from ldm3d.training.parallel import start_accelerator
from ldm3d.training.task import MAIN, Task, Trained, batches_of

ORIGIN = "origin.txt"  # in OUTPUT/decoder: the hash of the autoencoder whose encoder it has


def train(config: Config, stop: Stop) -> None:
    """Run, or go on with, the training that the config describes, until it is done or a stop is asked for."""
    if config.decoder is None:
        raise InputError("the config has no section `decoder`; docs/training.md shows one")
    if not config.autoencoder_folder.is_dir():
        raise InputError(f"no autoencoder in {config.autoencoder_folder}; train it with ldm3d.training.autoencoder first")
    training, run = config.decoder.training, config.decoder_run
    accelerator = start_accelerator(training, run, config.seed)
    fit(DecoderTask(config, read_scan_table(config), accelerator), training, run, accelerator, stop)


class Decoder(nn.Module):
    """The decoder of an autoencoder as a network of its own; nothing else of it is trained."""

    def __init__(self, autoencoder: LatentSpace):
        super().__init__()
        self.autoencoder = autoencoder.requires_grad_(False)
        for module in autoencoder.decoder_modules():
            module.requires_grad_(True)

    def forward(self, z: Tensor) -> Tensor:
        """Normalised latents (N, c, x, y, z) to volumes (N, C, X, Y, Z), not clipped."""
        return self.autoencoder.decode_stage_2_outputs(z)


class DecoderTask(Task):
    """The decoder and, if the config has one, its adversary.

    A decoder that has only ever seen latents of real volumes shows every error of the U-Net; noise on the latents in training
    teaches it to overlook those (Zheng et al. 2025, sec. 4.3).

    Args:
        config: of the experiment.
        scans: the table of prepared scans.
        accelerator: of the run.
    """

    title, shown = "decoder", "l1"

    def __init__(self, config: Config, scans, accelerator: Accelerator):
        self.config, self.scans, self.accelerator = config, scans, accelerator
        settings, training = config.decoder, config.decoder.training
        self.keys = {split: list(scans.loc[scans["split"] == split, "key"]) for split in ("train", "validation")}
        self.settings = {
            "decoder": settings.model_dump(mode="json"),
            "autoencoder": weights_hash(config.autoencoder_folder),
            "seed": config.seed,
        }
        # Two copies, for the parameters of the one that is trained may be spread over processes
        self.autoencoder, copy = (
            LatentSpace.from_pretrained(config.autoencoder_folder, accelerator.device, torch.float32) for _ in range(2)
        )
        model = Decoder(copy)
        rate = partial(learning_rate, training=training)
        average, optimizer = EMA(model, training.ema), make_optimizer(model, training)
        self.loss = VolumeLoss.of(settings, model.autoencoder.in_channels, accelerator)
        self.trained = {MAIN: Trained(model, optimizer, rate, training.gradient_clip, average), **self.loss.trained}
        self.settled, self.takes_other_scans = self.loss.settled, config.autoencoder.changed_data == GO_ON
        samples = PerturbedSamples(config, tuple(self.keys["train"]), copy.latent_shape(config.data.grid.shape))
        self.batches = batches_of(samples, training, config.seed, accelerator)

    def latents(self, volume: Tensor, noise: Tensor) -> Tensor:
        """Normalised samples of the posteriors of volumes (n, C, X, Y, Z), by the encoder as it is."""
        with torch.no_grad(), self.accelerator.autocast():
            moments = self.autoencoder.encode(volume).float()
        return self.autoencoder.normalise(self.autoencoder.sample(moments, noise))

    def losses(self, batch: Mapping[str, Tensor], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """The decoder's, and then its adversary's; batch: see `PerturbedSamples`."""
        z = self.latents(batch["volume"], batch["noise"])
        strength = self.config.decoder.noise * batch["strength"][:, None, None, None, None]
        with self.accelerator.autocast():
            made = self.trained[MAIN].module(z + strength * batch["perturbation"])
        return self.loss.in_turn(batch["volume"], made, step)

    def score(self, average: Decoder, step: int) -> dict[str, float]:
        def loss(volume: Tensor, noise: Tensor) -> Tensor:
            z = self.latents(volume, noise)
            with self.accelerator.autocast():
                made = average(z)
            return self.loss(volume, made, step)[0]

        keys = self.keys["validation"]
        return validate(loss, average.autoencoder, self.config, keys, self.accelerator) if keys else {}

    def preview(self, average: Decoder, path: Path) -> None:
        shown = (self.keys["validation"] or self.keys["train"])[:4]
        draw_reconstructions(average.autoencoder, self.config, shown, self.accelerator.device, path)

    def export(self, average: Decoder, which: str) -> None:
        if not self.accelerator.is_main_process:
            return
        config = self.config
        average.autoencoder.save_pretrained(config.decoder_folder)
        sign(config.decoder_run, weights_hash(config.decoder_folder))
        (config.decoder_folder / ORIGIN).write_text(self.settings["autoencoder"] + "\n")
        print(f"autoencoder with the sharpened decoder written to {config.decoder_folder} ({which})")
        if config.model_folder.is_dir():
            pipeline = Pipeline.from_pretrained(config.model_folder, "cpu", torch.float32)
            pipeline.autoencoder = LatentSpace.from_pretrained(config.decoder_folder)
            pipeline.save_pretrained(config.model_folder)
            save_experiment(config, config.model_folder)
            print(f"and put into {config.model_folder}")


def best_decoder(config: Config, autoencoder: LatentSpace) -> LatentSpace:
    """The autoencoder of OUTPUT/decoder where it belongs to stage 1's, which is returned otherwise."""
    try:
        origin = (config.decoder_folder / ORIGIN).read_text().strip()
    except FileNotFoundError:
        return autoencoder
    if origin != weights_hash(config.autoencoder_folder):
        print(f"{config.decoder_folder} is the decoder of another autoencoder, and is not used; train it again")
        return autoencoder
    return LatentSpace.from_pretrained(config.decoder_folder)


def main() -> None:
    command.run(train, "Train the decoder of an experiment by itself (stage 3).", "decoder")


if __name__ == "__main__":
    main()
