"""Stage 3, which is optional: train the decoder alone, so that volumes are sharp.

    accelerate launch -m ldm3d.training.decoder CONFIG [--set key=value ...]

Reads prepared volumes and OUTPUT/autoencoder. The encoder stays as it is, so latents and U-Nets trained on them stay valid.
Writes OUTPUT/decoder-training and, at the end, OUTPUT/decoder, an autoencoder of the same latents. It replaces the autoencoder
of OUTPUT/model if that exists; otherwise stage 2 uses it. Started again with the same command, it continues.
"""

from collections.abc import Mapping

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
from ldm3d.seen import record_export
from ldm3d.training import command
from ldm3d.training.loop import fit
from ldm3d.training.parallel import start_accelerator
from ldm3d.training.task import sampling_of
from ldm3d.training.volumes import VolumeTask

ORIGIN = "origin.txt"  # in OUTPUT/decoder: the hash of the autoencoder whose encoder it has


def train(config: Config, stop: Stop) -> None:
    """Train as the config describes, from the last checkpoint if there is one, until the end or a request to stop."""
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


class DecoderTask(VolumeTask):
    """The decoder and, if the config has one, its adversary.

    A decoder that was trained on latents of real volumes alone shows every error of the U-Net. Noise on the latents
    in training makes it robust to them (Zheng et al. 2025, sec. 4.3).

    Args:
        config: of the experiment.
        scans: the table of prepared scans.
        accelerator: of the run.
    """

    title = "decoder"
    sample_class = PerturbedSamples

    def __init__(self, config: Config, scans, accelerator: Accelerator):
        # Two copies, because the parameters of the trained one may be sharded
        self.autoencoder, copy = (
            LatentSpace.from_pretrained(config.autoencoder_folder, accelerator.device, torch.float32) for _ in range(2)
        )
        super().__init__(config, config.decoder, scans, Decoder(copy), copy, accelerator)
        self.settings = {
            "decoder": config.decoder.model_dump(mode="json"),
            "autoencoder": weights_hash(config.autoencoder_folder),
            "seed": config.seed,
            **sampling_of(config),
        }

    def reconstruct(self, network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        """Latents are samples of the posteriors by the encoder as it is; in training, with the noise of `PerturbedSamples`."""
        with torch.no_grad(), self.accelerator.autocast():
            moments = self.autoencoder.encode(batch["volume"]).float()
        z = self.autoencoder.normalise(self.autoencoder.sample(moments, batch["noise"]))
        if "perturbation" in batch:
            strength = self.config.decoder.noise * batch["strength"][:, None, None, None, None]
            z = z + strength * batch["perturbation"]
        with self.accelerator.autocast():
            return network(z), None

    def space(self, network: Decoder) -> LatentSpace:
        return network.autoencoder

    def export(self, average: Decoder, which: str) -> None:
        if not self.accelerator.is_main_process:
            return
        config = self.config
        average.autoencoder.save_pretrained(config.decoder_folder)
        record_export(config.decoder_run, weights_hash(config.decoder_folder))
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
