"""Checkpoints of a training run: safetensors and JSON in a folder that appears whole or not at all.

RUN/checkpoints/step-00000500/tensors.safetensors   weights, averages and optimiser states, by name
                              state.json            the step, figures so far, settings
Two are kept: the last and the best.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm3d.errors import InputError
from ldm3d.models.pretrained import load_weights
from ldm3d.training.sharding import spread_like, whole

TENSORS, STATE = "tensors.safetensors", "state.json"

# Changing these between two starts of a run is fine; any other setting makes it another run
FREE_SETTINGS = ("steps", "log_every", "validate_every", "preview_every", "checkpoint_every", "workers")


def optimizer_tensors(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as whole tensors named after the network's parameters."""
    return {
        f"{name}/{key}": whole(value)
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(network: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(network.named_parameters())
    for name, value in tensors.items():
        name, _, key = name.rpartition("/")
        parameter = parameters[name]
        if value.ndim:  # shaped like the parameter: to its device, memory format and processes
            value = spread_like(value.to(parameter.device), parameter)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif optimizer.defaults.get("fused"):  # the one kind of optimiser whose step counters lie beside the parameters
            value = value.to(parameter.device)
        optimizer.state[parameter][key] = value


def save_checkpoint(
    run: Path,
    step: int,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, tuple[nn.Module, Optimizer]],
    state: Mapping[str, Any],
    best_step: int | None,
    is_writer: bool = True,
) -> None:
    """Write the checkpoint of `step`, then remove those that are neither it nor the best one.

    Every process has to call this, for what is spread over processes is brought together first; one writes.

    Args:
        run: folder of the training run.
        step: optimiser steps done.
        networks: by name; their averages are networks, too.
        optimizers: by name, each with the network whose parameters it moves.
        state: JSON values to be given back by `load_checkpoint`.
        best_step: the step of the best checkpoint so far; None if there is none.
        is_writer: whether this process is the one that writes.
    """
    tensors = {f"{name}/{key}": whole(value) for name, net in networks.items() for key, value in net.state_dict().items()}
    for name, (network, optimizer) in optimizers.items():
        tensors |= {f"{name}/{key}": value for key, value in optimizer_tensors(network, optimizer).items()}
    if not is_writer:
        return
    folder = _folder(run, step)
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial / TENSORS)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise InputError(
            f"cannot write {partial}: {error}; free some space and run the same command again: it goes on from the "
            "checkpoint before, which is untouched"
        ) from None
    (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    for name in (TENSORS, STATE):
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for other in checkpoints(run):
        if other not in (folder, _folder(run, best_step or step)):
            shutil.rmtree(other)


def _folder(run: Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def load_checkpoint(run: Path, step: int | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """(tensors by the names given to `save_checkpoint`, state) of a step, or of the last checkpoint; None if there is none.

    Raises:
        InputError: damaged.
    """
    found = checkpoints(run) if step is None else [_folder(run, step)]
    if not found:
        return None
    try:
        flat, state = load_file(found[-1] / TENSORS), json.loads((found[-1] / STATE).read_text())
    except (SafetensorError, ValueError, FileNotFoundError) as error:
        raise InputError(f"checkpoint {found[-1]} is damaged ({error}); delete it to go on from the one before") from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        owner, _, key = name.partition("/")
        tensors.setdefault(owner, {})[key] = value
    return tensors, state


def restore(
    run: Path, networks: Mapping[str, nn.Module], settings: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Bring networks to the last checkpoint; its tensors by name, for `restore_optimizers`, and its state. None if new.

    Raises:
        InputError: the checkpoint was made with other settings; the message lists which.
    """
    loaded = load_checkpoint(run)
    if loaded is None:
        return None
    tensors, state = loaded
    changed = differences(state["settings"], settings)
    if changed:
        raise InputError(
            f"{run} holds a run with other settings: {'; '.join(changed[:6])}. Take back the change, choose another "
            f"`output`, or delete {run} to start anew"
        )
    for name, network in networks.items():
        load_weights(network, tensors[name], run)
    return tensors, state


def restore_optimizers(
    tensors: Mapping[str, Mapping[str, Tensor]], optimizers: Mapping[str, tuple[nn.Module, Optimizer]]
) -> None:
    """The second half of `restore`, once the networks are on their devices and spread as they will be."""
    for name, (network, optimizer) in optimizers.items():
        load_optimizer_tensors(network, optimizer, tensors.get(name, {}))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Settings that differ, as "key: old -> new"; `FREE_SETTINGS` may."""
    if where.rpartition(".")[2] in FREE_SETTINGS:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} -> {new}"]
