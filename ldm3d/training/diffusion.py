"""Stage 2: train the U-Net on cached latents.

    accelerate launch -m ldm3d.training.diffusion CONFIG [--set key=value ...]

Reads OUTPUT/autoencoder and OUTPUT/latents, writes OUTPUT/diffusion-training (checkpoints, metrics.jsonl, previews,
TensorBoard) and, at the end, the pipeline OUTPUT/model. Started again with the same command it goes on.
"""

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Adam

from ldm3d import figures
from ldm3d.config import Config, ProcessConfig
from ldm3d.covariates import CovariateSchema, describe, drop_covariates
from ldm3d.data.latents import read_latents
from ldm3d.data.loading import TrainingBatches, generator
from ldm3d.description import Sampling
from ldm3d.diffusion.process import Process, make_process, times_from_quantiles
from ldm3d.diffusion.vdm import Schedule, variational_losses
from ldm3d.errors import InputError, exit_on_input_error
from ldm3d.experiment import latents_origin, save_experiment
from ldm3d.geometry import Grid
from ldm3d.models.autoencoder import LatentSpace
from ldm3d.models.pretrained import make_network
from ldm3d.models.unet import TIMESTEPS, LatentUNet, pad_to
from ldm3d.pipeline import Pipeline
from ldm3d.preemption import Stop, preemption
from ldm3d.training import checkpoint
from ldm3d.training.ema import EMA
from ldm3d.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from ldm3d.training.run import (
    FiniteSteps,
    Metrics,
    agreed,
    asked_to_stop,
    circumstances,
    leave,
    parse_command_line,
    progress_bar,
    ready_to_spread,
    say_changes,
    start_accelerator,
)
from ldm3d.training.sharding import whole

SCHEDULE_LEARNING_RATE = 0.01  # of a vdm's gamma, if the config does not say it
VALIDATION_REPEATS = 4  # times at which each held-out latent is scored: the loss depends on the time more than on the latent


def train(config: Config, stop: Stop) -> None:
    """Run, or go on with, the training that the config describes, until it is done or a stop is asked for."""
    settings, training, run = config.diffusion, config.diffusion.training, config.diffusion_run
    origin = latents_origin(config)
    autoencoder = LatentSpace.from_pretrained(config.autoencoder_folder)
    moments, scans = read_latents(config.latents_folder, origin)
    rows = scans[[c.name for c in config.covariates]].to_dict("records")
    split = {name: [i for i, s in enumerate(scans["split"]) if s == name] for name in ("train", "validation")}
    if not split["train"]:
        raise InputError("no scan in the training split; lower data.splits and run `ldm3d prepare` again")
    schema = config.schema().fit([rows[i] for i in split["train"]])
    contexts = schema.encode(rows)  # (scans, K, 2)

    accelerator = start_accelerator(training, run, config.seed)
    rank, world = accelerator.process_index, accelerator.num_processes
    autoencoder.to(accelerator.device)
    schedule = make_schedule(settings.process, accelerator)  # None: nothing of the process is learned
    process = make_process(**settings.process.model_dump(exclude_none=True)) if schedule is None else schedule
    channels = autoencoder.latent_channels
    of_data = {"in_channels": channels, "out_channels": channels, "num_categories": schema.num_categories}
    model = make_network("UNet", **of_data, **settings.network.model_dump()).to(accelerator.device)
    padded = model.padded_shape(moments.shape[2:])
    ema = EMA(model, training.ema)
    optimizer = make_optimizer(model, training)
    chosen = {"ema": ema.network} if schedule is None else {"ema": ema.network, "schedule": schedule}  # what makes a pipeline
    networks = {"model": model, **chosen}

    described = {
        "diffusion": settings.model_dump(mode="json"),
        "covariates": schema.to_dict(),
        "latents": origin,
        "seed": config.seed,
    }
    newest = agreed(checkpoint.newest_intact(run) if accelerator.is_main_process else None)
    restored = checkpoint.restore(run, newest, networks, as_json(described))
    step, best = (restored[1]["step"], restored[1]["best"]) if restored else (0, None)

    def read(sample: int, rng: torch.Generator) -> dict[str, Tensor]:
        index = split["train"][sample]
        posterior = torch.from_numpy(moments[index].copy())  # (2c, x, y, z)
        return {
            "moments": posterior,
            "context": contexts[index],
            "posterior_noise": torch.randn(posterior[:channels].shape, generator=rng),
            "noise": torch.randn((channels, *padded), generator=rng),
            "drop": torch.rand(len(schema) + 2, generator=rng),
        }

    batches = TrainingBatches(read, len(split["train"]), training.batch_size, training.accumulation, config.seed, rank, world)
    network = ready_to_spread(model, accelerator)  # the bare one, for its parameters and for checkpoints
    model, optimizer = accelerator.prepare(network, optimizer)
    optimizers = {"optimizer": (network, optimizer.optimizer)}
    if schedule is not None:  # bare: 64 numbers, whose gradient `learn` brings together itself
        rate = settings.process.schedule_learning_rate
        schedule_optimizer = Adam(schedule.parameters(), SCHEDULE_LEARNING_RATE if rate is None else rate, fused=True)
        optimizers["schedule_optimizer"] = (schedule, schedule_optimizer)
    if restored:
        checkpoint.restore_optimizers(restored[0], optimizers)
        say_changes(restored[1]["circumstances"], accelerator)
    finite = FiniteSteps(
        accelerator,
        training.max_skipped_steps,
        lambda step: [scans["subject"][split["train"][sample]] for sample in batches.samples(step)],
        restored[1]["skipped_steps"] if restored else 0,
    )
    metrics = Metrics(run, accelerator, step)
    bar = progress_bar(accelerator, "diffusion", step, training.steps)

    loader = batches.loader(step, training.steps, training.workers, pin_memory=accelerator.device.type == "cuda")
    logged = torch.zeros((), device=accelerator.device)  # mean loss over the parts of a batch
    for micro, batch in enumerate(loader, start=step * training.accumulation):
        step = micro // training.accumulation
        set_learning_rate(optimizer, learning_rate(step, training))
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        # x (n, c, *padded)
        x = pad_to(autoencoder.normalise(autoencoder.sample(batch["moments"], batch["posterior_noise"])), padded)
        context = drop_covariates(batch["context"], batch["drop"], settings.drop_covariates)
        time = settings.time_sampling
        t = times_from_quantiles(time.kind, batch["quantile"].clamp(1e-5, 1 - 1e-5), time.location, time.scale)
        with accelerator.accumulate(model):
            loss = diffusion_loss(model, process, settings, x, batch["noise"], t, context, accelerator)
            accelerator.backward(loss)
            logged += loss.detach() / training.accumulation
            if accelerator.sync_gradients:
                if schedule is not None:
                    learn(schedule, schedule_optimizer, logged, accelerator)
                gradient_norm = accelerator.clip_grad_norm_(network.parameters(), training.gradient_clip)
                finite.step(optimizer, step, gradient_norm, loss)
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        ema.update(network, step)
        step += 1  # steps done
        last = step == training.steps
        bar.update()
        row = {}
        if step % training.log_every == 0 or last:
            values = {"loss": logged, "gradient_norm": whole(gradient_norm)}
            row = {name: accelerator.reduce(value, "mean").item() for name, value in values.items()}
            row["learning_rate"] = learning_rate(step - 1, training)
            row["skipped_steps"] = finite.check()
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        logged = torch.zeros_like(logged)
        if split["validation"] and (step % training.validate_every == 0 or last):
            held_out = split["validation"]
            row["validation_loss"] = validate(
                ema.network, process, settings, autoencoder, moments[held_out], contexts[held_out], accelerator
            )
            if best is None or row["validation_loss"] < best["validation_loss"]:
                best = {"step": step, "validation_loss": row["validation_loss"]}
        if row:
            metrics.add(step, row)
        stopping = not last and asked_to_stop(stop, accelerator, meeting=step % training.log_every == 0)
        if step % training.checkpoint_every == 0 or last or stopping or (best and best["step"] == step):
            metrics.to_disk()
            kept = {"settings": as_json(described), "circumstances": circumstances(accelerator)}
            state = {"best": best, **finite.state(), **kept}
            best_step = best and best["step"]
            checkpoint.save_checkpoint(run, step, networks, optimizers, state, best_step, accelerator.is_main_process)
            accelerator.wait_for_everyone()
        if (step % training.preview_every == 0 or last) and accelerator.is_main_process:
            pipeline = make_pipeline(config, autoencoder, ema.network, schema, process)
            draw_sweep(pipeline, run / f"preview-{step:08d}.png", accelerator)
            metrics.draw()
        if stopping:
            leave(stop, run, step, accelerator)
    bar.close()
    metrics.close()
    if accelerator.is_main_process:
        best = checkpoint.load_best(run, best, chosen)
        make_pipeline(config, autoencoder, ema.network, schema, process).save_pretrained(config.model_folder)
        save_experiment(config, config.model_folder)
        which = f" (best of validation, step {best['step']}: loss {best['validation_loss']:.4f})" if best else ""
        print(f"model written to {config.model_folder}{which}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_schedule(settings: ProcessConfig, accelerator: Accelerator) -> Schedule | None:
    """gamma(t) of a vdm, still a straight line; None for the processes that nobody learns."""
    if settings.kind != "vdm":
        return None
    ends = settings.model_dump(include={"gamma_min", "gamma_max"}, exclude_none=True)
    return Schedule(**ends).to(accelerator.device)


def learn(schedule: Schedule, optimizer: Adam, loss: Tensor, accelerator: Accelerator) -> None:
    """One step of a schedule towards less variance of the batch's loss, alike on every process; none if it is not finite.

    The gradient of a squared loss is a product of the loss and its gradient. Both have to be the whole batch's, so they are
    averaged over accumulated parts and processes before they are multiplied: a part has but its own stretch of the
    low-discrepancy times, and the square of its loss would be mostly the square of where that stretch lies.

    Args:
        loss: mean over this process's parts of the batch, whose gradient is in `schedule.logits.grad`.
    """
    scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0  # of float16's gradients
    schedule.logits.grad = accelerator.reduce(schedule.logits.grad / scale, "mean")
    schedule.learn_variance(accelerator.reduce(loss, "mean"))
    optimizer.found_inf = (~schedule.logits.grad.isfinite().all()).float()  # where it is 1, a fused optimiser does nothing
    optimizer.step()
    optimizer.zero_grad()


def diffusion_loss(
    unet, process: Process | Schedule, settings, x: Tensor, noise: Tensor, t: Tensor, context: Tensor, accelerator: Accelerator
) -> Tensor:
    """Weighted mean squared error of the predicted target, E w(t) |net(z_t, t, context) - target|^2.

    With a schedule that is learned, the bound's diffusion term in nats per dimension instead: `variational_losses`.

    x, noise (N, c, x, y, z); t (N,); context (N, K, 2).
    """

    def predict(z: Tensor, network_time: Tensor) -> Tensor:
        with accelerator.autocast():
            return unet(z, TIMESTEPS * network_time, context).float()

    if isinstance(process, Schedule):
        return variational_losses(process, predict, settings.target, x, noise, t).mean()
    output = predict(process.add_noise(x, noise, t), process.network_time(t))
    error = (output - process.target(settings.target, x, noise, t)).square().flatten(1).mean(dim=1)
    return (process.loss_weight(settings.loss_weight, settings.target, t) * error).mean()


@torch.no_grad()
def validate(
    unet: LatentUNet,
    process: Process | Schedule,
    settings,
    autoencoder: LatentSpace,
    moments,
    contexts: Tensor,
    accelerator: Accelerator,
) -> float:
    """Loss on held-out latents with all covariates given; the same noise and times every time, so that steps compare."""
    device, total, batch_size = accelerator.device, 0.0, 16
    mean = autoencoder.normalise(autoencoder.sample(torch.from_numpy(moments.copy()).to(device)))
    mean = pad_to(mean, unet.padded_shape(mean.shape[2:]))
    numbers = range(accelerator.process_index, len(mean) * VALIDATION_REPEATS, accelerator.num_processes)
    for first in range(0, len(numbers), batch_size):
        chosen = torch.tensor(numbers[first : first + batch_size])
        sample = chosen % len(mean)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator("validation", int(n))) for n in chosen]).to(
            device
        )
        # Quantiles spread over all pairs, in an order that has nothing to do with the samples' own
        u = ((chosen.double() * 0.6180339887498949 + 0.5) % 1).float().clamp(1e-5, 1 - 1e-5)
        t = times_from_quantiles(settings.time_sampling.kind, u, settings.time_sampling.location, settings.time_sampling.scale)
        x, context = mean[sample.to(device)], contexts[sample].to(device)
        loss = diffusion_loss(unet, process, settings, x, noise.to(device), t.to(device), context, accelerator)
        total += loss.item() * len(chosen)
    total = accelerator.reduce(torch.tensor(total, device=device), "sum").item()
    return total / (len(mean) * VALIDATION_REPEATS)


def make_pipeline(
    config: Config, autoencoder: LatentSpace, unet: LatentUNet, schema: CovariateSchema, process: Process | Schedule
) -> Pipeline:
    """The pipeline of these networks with the config's defaults for generation, on as many threads as the training has."""
    if isinstance(process, Schedule):
        process = process.process()
    grid = Grid.centred(config.data.grid.shape, config.data.grid.spacing_mm)
    sampling = Sampling(**config.generation.model_dump())
    target, stripped = config.diffusion.target, config.data.skull_stripped
    return Pipeline(
        autoencoder, unet, schema, grid, process, target, sampling, stripped, threads=None, suffix=config.data.suffix
    )


def draw_sweep(pipeline: Pipeline, path, accelerator: Accelerator, columns: int = 6) -> None:
    """One sample over the seen range of the first continuous covariate, the others left open, as a picture."""
    swept = next((c for c in pipeline.schema if c.seen), None)
    rows = [{}] * columns
    if swept:
        low, high = swept.seen
        rows = [{swept.name: low + (high - low) * i / (columns - 1)} for i in range(columns)]
    requests = pipeline.parse(rows)
    with accelerator.autocast():
        # Number 0 for all: the same noise, so that what differs is the covariate's doing
        volumes = [next(pipeline.volumes([row], pipeline.sampling)) for row in requests]
    titles = [describe(row) for row in requests]
    figures.save(figures.mosaic(volumes, titles, pipeline.grid.spacing_mm, columns=3), path)


def as_json(values):
    """Tuples as lists, as they come back from a JSON file."""
    if isinstance(values, dict):
        return {key: as_json(value) for key, value in values.items()}
    return [as_json(value) for value in values] if isinstance(values, list | tuple) else values


@exit_on_input_error
def main() -> None:
    with preemption() as stop:
        train(parse_command_line("Train the diffusion model of an experiment (stage 2).", "diffusion"), stop)


if __name__ == "__main__":
    main()
