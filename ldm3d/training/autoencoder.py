"""Stage 1: train the autoencoder.

    accelerate launch -m ldm3d.training.autoencoder CONFIG [--set key=value ...]

Reads prepared volumes, writes OUTPUT/autoencoder-training (checkpoints, metrics.jsonl, previews, TensorBoard) and, at the
end, OUTPUT/autoencoder with the latents' statistics in it. Started again with the same command, it continues.
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm3d.account import stage_of
from ldm3d.base_model import take_autoencoder
from ldm3d.config.sections import Config
from ldm3d.data.batches import evenly
from ldm3d.data.preparing import read_scan_table
from ldm3d.errors import InputError
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.pretrained import load_weights, make_network, weights_hash
from ldm3d.preemption import Stop
from ldm3d.processes import cores
from ldm3d.seen import record_export
from ldm3d.training import command
from ldm3d.training.linear_path import train_linear_path, volumes_for
from ldm3d.training.loop import fit
from ldm3d.training.parallel import broadcast_weights, start_accelerator
from ldm3d.training.scales import voxel_scales
from ldm3d.training.task import MAIN, sampling_of
from ldm3d.training.volumes import VolumeTask

SCALED_VOLUMES = 8  # that the scales of the channels are measured on


def train(config: Config, stop: Stop) -> None:
    """Train as the config describes, from the last checkpoint if there is one, until the end or a request to stop."""
    if take_autoencoder(config):
        print(f"nothing to train: {config.autoencoder_folder} is the autoencoder of {config.base_model}")
        return
    training, run = config.autoencoder.training, config.autoencoder_run
    scans = read_scan_table(config)
    if not (scans["split"] == "train").any():
        raise InputError(f"no scan in the training split of {config.prepared_folder}; lower data.splits")
    accelerator = start_accelerator(training, run, config.seed)
    fit(AutoencoderTask(config, scans, accelerator), training, run, accelerator, stop)


class AutoencoderTask(VolumeTask):
    """The autoencoder and, if the config has one, its adversary.

    Args:
        config: of the experiment.
        scans: the table of prepared scans.
        accelerator: of the run.
    """

    title = "autoencoder"

    def __init__(self, config: Config, scans, accelerator: Accelerator):
        network = make_network("Autoencoder", **config.autoencoder_arguments).to(accelerator.device)
        super().__init__(config, config.autoencoder, scans, network, network, accelerator)
        self.settings = {
            "autoencoder": config.autoencoder.model_dump(mode="json"),
            "grid": config.data.grid.model_dump(mode="json"),
            "seed": config.seed,
            **({"channels": config.data.channels} if config.data.channels else {}),
            **sampling_of(config),
        }

    def begin(self, stop: Stop) -> bool:
        """Fit the linear path to some volumes on the main process, with the cores of all, and broadcast it.

        So one process and several start from the same bits.
        """
        finished = True
        if not self.config.autoencoder.network.linear_path:
            return finished
        main, keys = self.trained[MAIN], self.keys["train"]
        if self.accelerator.is_main_process:
            count = volumes_for(self.config.data.grid.shape)
            chosen = keys[:: max(1, len(keys) // count)][:count]
            print(f"fitting the linear path to {len(chosen)} volumes", flush=True)
            steps, threads = self.config.autoencoder.linear_path_steps, torch.get_num_threads()
            torch.set_num_threads(cores())
            volumes, autocast = self.volumes(chosen), self.accelerator.autocast
            finished = train_linear_path(main.network, volumes, steps, self.config.seed, autocast, stop)
            torch.set_num_threads(threads)
        broadcast_weights(main.network)
        load_weights(main.average.network, main.network.state_dict(), "the linear path")
        return finished

    def reconstruct(self, network: LatentSpace, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            return network(batch["volume"], batch["noise"])

    def export(self, average: LatentSpace, which: str) -> None:
        """Write the averaged network, with its latents' statistics over the training split, as OUTPUT/autoencoder."""
        config, accelerator, training = self.config, self.accelerator, self.config.autoencoder.training
        # This process's share, then all, of each channel: sum, sum of squares, and the number of values
        total = torch.zeros(3, average.latent_channels, dtype=torch.float64)
        own = self.keys["train"][accelerator.process_index :: accelerator.num_processes]
        together = max(1, training.batch_size // (training.accumulation * accelerator.num_processes))
        with torch.no_grad(), accelerator.autocast():
            for first in range(0, len(own), together):
                volumes = [torch.from_numpy(self.coded(key)) for key in own[first : first + together]]
                encoded = average.encode(torch.stack(volumes).to(accelerator.device)).float()
                lacking = average.lacking(encoded)[:, :, None, None, None]
                mean, log_variance = encoded.chunk(2, dim=1)
                # The second moment of a posterior sample includes its variance
                values = torch.stack([mean, mean.square() + log_variance.exp(), torch.ones_like(mean)])  # (3, n, c, x, y, z)
                total += values.masked_fill(lacking, 0).double().sum(dim=(1, 3, 4, 5)).cpu()
        mean, square, count = accelerator.reduce(total.float().to(accelerator.device), "sum").double().cpu()
        mean, square = mean / count, square / count
        average.latent_mean.copy_(mean)
        average.latent_std.copy_((square - mean.square()).clamp_min(1e-12).sqrt())
        if config.autoencoder.latent_scaling == "voxels":
            complete = list(filter(self.coded.complete, self.keys["train"]))
            volumes = self.volumes(evenly(complete, SCALED_VOLUMES)).to(accelerator.device)
            with accelerator.autocast():
                average.latent_std.div_(voxel_scales(average, volumes).to(accelerator.device))
        if accelerator.is_main_process:
            average.save_pretrained(config.autoencoder_folder)
            exported = weights_hash(config.autoencoder_folder)
            record_export(config.autoencoder_run, exported, stage_of(config.autoencoder))
            print(f"autoencoder written to {config.autoencoder_folder} ({which})")


def main() -> None:
    command.run(train, "Train the autoencoder of an experiment (stage 1).", "autoencoder")


if __name__ == "__main__":
    main()
