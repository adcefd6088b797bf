"""Stage 1: train the autoencoder.

    accelerate launch -m ldm3d.training.autoencoder CONFIG [--set key=value ...]

Reads prepared volumes, writes OUTPUT/autoencoder-training (checkpoints, metrics.jsonl, previews, TensorBoard) and, at the
end, OUTPUT/autoencoder with the latents' statistics in it. Started again with the same command it goes on.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm3d import figures
from ldm3d.config import Config
from ldm3d.data.loading import TrainingBatches
from ldm3d.data.preprocess import load_prepared, read_scan_table
from ldm3d.errors import InputError, exit_on_input_error
from ldm3d.evaluation.metrics import psnr
from ldm3d.models.autoencoder import Autoencoder, LatentSpace
from ldm3d.models.pretrained import load_weights, make_network, weights_hash
from ldm3d.preemption import Stop, preemption
from ldm3d.processes import cores
from ldm3d.seen import GO_ON, sign
from ldm3d.training import checkpoint
from ldm3d.training.ema import EMA
from ldm3d.training.linear_path import train_linear_path, volumes_for
from ldm3d.training.losses import kl_divergence
from ldm3d.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from ldm3d.training.run import (
    FiniteSteps,
    Metrics,
    agreed,
    asked_to_stop,
    circumstances,
    leave,
    note_seen,
    parse_command_line,
    progress_bar,
    ready_to_spread,
    same_start,
    say_changes,
    start_accelerator,
)
from ldm3d.training.sharding import whole

MAX_VALIDATION = 64  # volumes; more would not change which checkpoint is best


def train(config: Config, stop: Stop) -> None:
    """Run, or go on with, the training that the config describes, until it is done or a stop is asked for."""
    settings, training, run = config.autoencoder, config.autoencoder.training, config.autoencoder_run
    scans = read_scan_table(config)
    keys = {split: list(scans.loc[scans["split"] == split, "key"]) for split in ("train", "validation")}
    subjects = list(scans.loc[scans["split"] == "train", "subject"])
    if not keys["train"]:
        raise InputError(f"no scan in the training split of {config.prepared_folder}; lower data.splits")
    accelerator = start_accelerator(training, run, config.seed)
    rank, world = accelerator.process_index, accelerator.num_processes

    model = make_network("Autoencoder", **settings.network.model_dump()).to(accelerator.device)
    ema = EMA(model, training.ema)
    optimizer = make_optimizer(model, training)
    networks = {"model": model, "ema": ema.network}
    adversary = adversary_optimizer = perceptual = None
    if settings.adversarial or settings.perceptual:
        from ldm3d.training.monai_losses import Adversary, PerceptualLoss
    if settings.adversarial:
        adversary = Adversary(settings.adversarial, model.in_channels).to(accelerator.device)
        rate = settings.adversarial.learning_rate
        adversary_optimizer = torch.optim.AdamW(adversary.parameters(), rate, (0.5, 0.9), fused=True)
        networks["adversary"] = adversary
    if settings.perceptual:
        perceptual = PerceptualLoss(settings.perceptual.weights).to(accelerator.device)

    described = {"autoencoder": settings.model_dump(mode="json"), "grid": config.data.grid.model_dump(mode="json")}
    described["seed"] = config.seed
    newest = agreed(checkpoint.newest_intact(run) if accelerator.is_main_process else None)
    restored = checkpoint.restore(run, newest, networks, described)
    step, best = (restored[1]["step"], restored[1]["best"]) if restored else (0, None)
    note_seen(run, scans, accelerator, begun=restored is not None, go_on=settings.changed_data == GO_ON)
    if restored is None and settings.network.linear_path:
        start_from_linear_path(model, config, keys["train"], accelerator)
        load_weights(ema.network, model.state_dict(), "the linear path")

    latent_shape = model.latent_shape(config.data.grid.shape)

    def read(sample: int, rng: torch.Generator) -> dict[str, Tensor]:
        return {"volume": load_volume(config, keys["train"][sample]), "noise": torch.randn(latent_shape, generator=rng)}

    batches = TrainingBatches(read, len(keys["train"]), training.batch_size, training.accumulation, config.seed, rank, world)
    network = ready_to_spread(model, accelerator)  # the bare one, for its parameters and for checkpoints
    model, optimizer = accelerator.prepare(network, optimizer)
    optimizers = {"optimizer": (network, optimizer.optimizer)}
    if adversary:
        optimizers["adversary_optimizer"] = (adversary, adversary_optimizer)
        adversary, adversary_optimizer = accelerator.prepare(adversary, adversary_optimizer)
    if restored:
        checkpoint.restore_optimizers(restored[0], optimizers)
        say_changes(restored[1]["circumstances"], accelerator)
    finite = FiniteSteps(
        accelerator,
        training.max_skipped_steps,
        lambda step: [subjects[sample] for sample in batches.samples(step)],
        restored[1]["skipped_steps"] if restored else 0,
    )
    metrics = Metrics(run, accelerator, step)
    bar = progress_bar(accelerator, "autoencoder", step, training.steps)

    loader = batches.loader(step, training.steps, training.workers, pin_memory=accelerator.device.type == "cuda")
    logged: dict[str, Tensor] = {}  # means over the parts of a batch
    for micro, batch in enumerate(loader, start=step * training.accumulation):
        step = micro // training.accumulation
        adversarial = adversary is not None and step >= settings.adversarial.start
        set_learning_rate(optimizer, learning_rate(step, training))
        volume = batch["volume"].to(accelerator.device, non_blocking=True)  # (n, C, X, Y, Z)
        noise = batch["noise"].to(accelerator.device, non_blocking=True)  # (n, c, x, y, z)
        with accelerator.accumulate(model):
            with accelerator.autocast():
                reconstruction, moments = model(volume, noise)
            error = reconstruction.float() - volume
            l1, kl = error.abs().mean(), kl_divergence(moments) / volume[0].numel()
            loss = settings.l1 * l1 + settings.l2 * error.square().mean() + settings.kl * kl
            if perceptual:
                loss = loss + settings.perceptual.weight * perceptual(reconstruction.float(), volume).mean()
            if adversarial:
                adversary.requires_grad_(False)
                with accelerator.autocast():
                    fooled = adversary(None, reconstruction)
                loss = loss + settings.adversarial.weight * fooled.float()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(network.parameters(), training.gradient_clip)
                finite.step(optimizer, step, gradient_norm, loss)
            optimizer.zero_grad()
            if adversarial:
                adversary.requires_grad_(True)
                with accelerator.autocast():
                    caught = adversary(volume, reconstruction.detach())
                accelerator.backward(caught.float())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(adversary.parameters(), math.inf)
                    finite.step(adversary_optimizer, step, norm, caught)
                adversary_optimizer.zero_grad()
        parts = {"loss": loss, "l1": l1, "kl_per_voxel": kl}
        if adversarial:
            parts |= {"adversarial": fooled, "discriminator": caught}
        for name, value in parts.items():
            logged[name] = logged.get(name, 0) + value.detach() / training.accumulation
        if not accelerator.sync_gradients:
            continue

        ema.update(network, step)
        step += 1  # steps done
        last = step == training.steps
        bar.update()
        row = {}
        if step % training.log_every == 0 or last:
            logged["gradient_norm"] = whole(gradient_norm)
            row = {name: accelerator.reduce(value, "mean").item() for name, value in logged.items()}
            row["learning_rate"] = learning_rate(step - 1, training)
            row["skipped_steps"] = finite.check()
            bar.set_postfix(l1=f"{row['l1']:.4f}", refresh=False)
        logged = {}
        if keys["validation"] and (step % training.validate_every == 0 or last):
            quality = validate(ema.network, config, keys["validation"][:MAX_VALIDATION], accelerator)
            row["validation_psnr_db"] = quality
            if best is None or quality > best["psnr_db"]:
                best = {"step": step, "psnr_db": quality}
        if row:
            metrics.add(step, row)
        stopping = not last and asked_to_stop(stop, accelerator, meeting=step % training.log_every == 0)
        if step % training.checkpoint_every == 0 or last or stopping or (best and best["step"] == step):
            metrics.to_disk()
            kept = {"settings": described, "circumstances": circumstances(accelerator)}
            state = {"best": best, **finite.state(), **kept}
            best_step = best and best["step"]
            checkpoint.save_checkpoint(run, step, networks, optimizers, state, best_step, accelerator.is_main_process)
            accelerator.wait_for_everyone()
        if (step % training.preview_every == 0 or last) and accelerator.is_main_process:
            shown = (keys["validation"] or keys["train"])[:4]
            draw_reconstructions(ema.network, config, shown, accelerator.device, run / f"preview-{step:08d}.png")
            metrics.draw()
        if stopping:
            leave(stop, run, step, accelerator)
    bar.close()
    metrics.close()
    export(config, ema.network, keys["train"], best, accelerator)
    accelerator.end_training()


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


def export(config: Config, network: LatentSpace, keys: list[str], best: dict | None, accelerator: Accelerator) -> None:
    """Write the best averaged network, with its latents' statistics over the training split, as OUTPUT/autoencoder."""
    best = checkpoint.load_best(config.autoencoder_run, best, {"ema": network})
    # Sums over this process's share, then over all: (sum, sum of squares) of c channels, and how many values
    count, total = 0, torch.zeros(2, network.latent_channels, dtype=torch.float64)
    with torch.no_grad(), accelerator.autocast():
        for key in keys[accelerator.process_index :: accelerator.num_processes]:
            volume = load_volume(config, key)[None].to(accelerator.device)
            mean, log_variance = network.encode(volume).float().chunk(2, dim=1)
            # The second moment of a posterior sample: its variance counts
            moments = torch.stack([mean, mean.square() + log_variance.exp()])  # (2, 1, c, x, y, z)
            total += moments.double().sum(dim=(1, 3, 4, 5)).cpu()
            count += mean[0, 0].numel()
    total = accelerator.reduce(total.float().to(accelerator.device), "sum").double().cpu()
    count = accelerator.reduce(torch.tensor(float(count), device=accelerator.device), "sum").item()
    mean, square = total / count
    network.latent_mean.copy_(mean)
    network.latent_std.copy_((square - mean.square()).clamp_min(1e-12).sqrt())
    if accelerator.is_main_process:
        network.save_pretrained(config.autoencoder_folder)
        sign(config.autoencoder_run, weights_hash(config.autoencoder_folder))
        chosen = f" (best of validation, step {best['step']}: {best['psnr_db']:.2f} dB)" if best else ""
        print(f"autoencoder written to {config.autoencoder_folder}{chosen}")
    accelerator.wait_for_everyone()


def load_volume(config: Config, key: str) -> Tensor:
    """A prepared volume as (1, X, Y, Z)."""
    return torch.from_numpy(load_prepared(config, key))[None]


@torch.no_grad()
def reconstruct(network: LatentSpace, volumes: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode, clipped to [0, 1]."""
    return network.decode(network.sample(network.encode(volumes))).float().clamp(0, 1)


def validate(network: LatentSpace, config: Config, keys: list[str], accelerator: Accelerator) -> float:
    """Mean PSNR (dB) of held-out volumes, shared over the processes."""
    total = torch.zeros(2, device=accelerator.device)
    with accelerator.autocast():
        for key in keys[accelerator.process_index :: accelerator.num_processes]:
            volume = load_volume(config, key)[None].to(accelerator.device)
            total += torch.tensor([psnr(reconstruct(network, volume), volume).item(), 1.0], device=accelerator.device)
    total = accelerator.reduce(total, "sum")
    return (total[0] / total[1]).item()


def draw_reconstructions(network: LatentSpace, config: Config, keys: list[str], device, path) -> None:
    """Originals above their reconstructions, as a picture."""
    volumes = torch.stack([load_volume(config, key) for key in keys]).to(device)
    again = reconstruct(network, volumes)
    titles = ["original"] * len(keys) + [f"{quality:.1f} dB" for quality in psnr(again, volumes).tolist()]
    shown = [volume.cpu().numpy() for volume in torch.cat([volumes, again])[:, 0]]
    figures.save(figures.mosaic(shown, titles, config.data.grid.spacing_mm, columns=len(keys)), path)


@exit_on_input_error
def main() -> None:
    with preemption() as stop:
        train(parse_command_line("Train the autoencoder of an experiment (stage 1).", "autoencoder"), stop)


if __name__ == "__main__":
    main()
