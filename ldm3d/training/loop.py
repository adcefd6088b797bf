"""The training loop: one for all tasks.

Each step follows from (settings, seed, step) alone. A run that is stopped or killed after any step and started again with the
same command ends with the same bits as an uninterrupted one.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ldm3d.config.training import TrainingConfig
from ldm3d.preemption import Stop
from ldm3d.training import checkpoint, parallel
from ldm3d.training.choice import Choice
from ldm3d.training.finite import FiniteSteps
from ldm3d.training.metrics import Metrics, progress_bar
from ldm3d.training.optimizer import set_learning_rate
from ldm3d.training.sharding import gather
from ldm3d.training.task import MAIN, Task
from ldm3d.training.trackers import start_trackers, writes_tensorboard


def fit(task: Task, training: TrainingConfig, run: Path, accelerator: Accelerator, stop: Stop) -> None:
    """Train a task, from its last checkpoint if there is one, and export it; or stop on request.

    Args:
        task: what is trained.
        training: number of steps, and the intervals of logs, validations, previews and checkpoints.
        run: folder of checkpoints, metrics and previews.
        accelerator: from `start_accelerator`.
        stop: checked after every step.

    Raises:
        InputError: the run's checkpoints are another task's, or its loss is NaN too often.
        SystemExit: with `REQUEUE`, after a stop.
    """
    newest = parallel.broadcast_from_main(checkpoint.newest_intact(run) if accelerator.is_main_process else None)
    restored = checkpoint.restore(run, newest, task.networks(), task.settings)
    tensors, state = restored or ({}, {"step": 0, "best": None, "skipped_steps": 0})
    parallel.record_scans(run, task.scans, accelerator, begun=restored is not None, go_on=task.takes_other_scans)
    if restored is None and not parallel.broadcast_from_main(task.begin(stop)):
        parallel.exit_for_requeue(stop, run, 0, accelerator)
    for each in task.trained.values():
        each.distribute(accelerator)
    if restored:
        checkpoint.restore_optimizers(tensors, task.optimizers())
        parallel.report_changes(state, task.settings, accelerator)
    step, choice, main = state["step"], Choice(training.keep, state["best"], task.settled), task.trained[MAIN]
    finite = FiniteSteps(accelerator, training.max_skipped_steps, task.subjects, state["skipped_steps"])
    start_trackers(accelerator, training, run)
    metrics = Metrics(run, accelerator, step, writes_tensorboard(training))
    bar = progress_bar(accelerator, task.title, step, training.steps)
    loader = task.batches.loader(step, training.steps, training.workers, pin_memory=accelerator.device.type == "cuda")
    logged: dict[str, Tensor] = {}  # means over the parts of a batch
    for micro, batch in enumerate(loader, start=step * training.accumulation):
        step = micro // training.accumulation
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        with accelerator.accumulate(*(each.module for each in task.trained.values())):
            for name, loss, values in task.losses(batch, step):
                each = task.trained[name]
                accelerator.backward(loss)
                add_means(logged, values, training.accumulation)
                if accelerator.sync_gradients:
                    if each is main:
                        task.before_step(logged["loss"])
                    norm = accelerator.clip_grad_norm_(each.network.parameters(), each.clip)
                    if each.rate:
                        set_learning_rate(each.stepper, each.rate(step))
                    finite.step(each.stepper, step, norm)
                    if each is main:
                        main_norm = norm
                each.stepper.zero_grad()
        if not accelerator.sync_gradients:
            continue

        for each in task.trained.values():
            if each.average:
                each.average.update(each.network, step)
        step += 1  # steps done
        last = step == training.steps
        bar.update()
        row = {}
        if step % training.log_every == 0 or last:
            logged["gradient_norm"] = gather(main_norm)
            row = {name: accelerator.reduce(value, "mean").item() for name, value in logged.items()}
            row |= {"learning_rate": main.rate(step - 1), "skipped_steps": finite.check()}
            bar.set_postfix({task.shown: f"{row[task.shown]:.4f}"}, refresh=False)
        logged = {}
        if step % training.validate_every == 0 or last:
            with main.average.gathered() as average:
                scored = task.score(average, step - 1)
            if scored:
                choice.add(step, scored["validation_loss"])
            row |= scored
        if row:
            metrics.add(step, row)
        stopping = not last and parallel.asked_to_stop(stop, accelerator, communicate=step % training.log_every == 0)
        if step % training.checkpoint_every == 0 or last or stopping or choice.step == step:
            metrics.to_disk()
            kept = {"settings": task.settings, "circumstances": parallel.circumstances(accelerator)}
            state = {"best": choice.best, **finite.state(), **kept}
            checkpoint.save_checkpoint(
                run, step, task.networks(), task.optimizers(), state, choice.step, accelerator.is_main_process
            )
            accelerator.wait_for_everyone()
        if step % training.preview_every == 0 or last:
            with main.average.gathered() as average:
                if accelerator.is_main_process:
                    task.preview(average, run / f"preview-{step:08d}.png")
                    metrics.draw()
        if stopping:
            parallel.exit_for_requeue(stop, run, step, accelerator)
    bar.close()
    metrics.close()
    with main.average.gathered() as average:
        task.export(average, choice.load(run, {**task.chosen(), "ema": average}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


@torch.no_grad()
def add_means(logged: dict[str, Tensor], values: Mapping[str, Tensor], parts: int) -> None:
    """Add the values of one part of a batch to the means over all parts."""
    for name, value in values.items():
        logged[name] = logged.get(name, 0) + value / parts
