"""Checkpoints of a training run: safetensors and JSON, in a folder that gets its name when it is complete.

RUN/checkpoints/step-00000500/tensors.safetensors   weights, averages and optimiser states, by name
                              state.json            the step, figures so far, settings
                              SHA256SUMS            of both, as `sha256sum --check` reads them
Three are kept: the last two, in case the last is damaged, and the best.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm3d.config.data import DataConfig
from ldm3d.config.sections import Config
from ldm3d.covariates import CovariateSchema
from ldm3d.errors import FULL, InputError, differences
from ldm3d.models.pretrained import load_weights
from ldm3d.training.sharding import gather, shard_like

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"

# Changing these between two starts of a run is fine; any other setting makes it another run
ROUNDING = ("accumulation", "activation_checkpointing", "attention_backend")  # a changed one is announced
FREE_SETTINGS = (
    *("steps", "log_every", "validate_every", "preview_every", "checkpoint_every", "workers", "max_skipped_steps", "keep"),
    *("changed_data", "tracker"),
    *(*ROUNDING, "mixed_precision"),  # a changed precision is announced, too
)

SECTIONS = {name: TypeAdapter(f.annotation) for name, f in {**DataConfig.model_fields, **Config.model_fields}.items()}


def optimizer_tensors(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's state, named after the network's parameters; sharded tensors stay so."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(network: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(network.named_parameters())
    for name, value in tensors.items():
        name, _, key = name.rpartition("/")
        parameter = parameters[name]
        if value.ndim:  # shaped like the parameter: on its device, in its memory format, sharded like it
            value = shard_like(value.to(parameter.device), parameter)
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        else:  # a step counter: on the same device, so that skipping a step needs no word from the host
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

    Every process has to call this, because sharded tensors are gathered, one after the other. One process writes, and the
    others keep nothing.

    Args:
        run: folder of the training run.
        step: optimiser steps done.
        networks: by name; their averages are networks, too.
        optimizers: by name, each with the network whose parameters it updates.
        state: JSON values that `load_checkpoint` returns.
        best_step: the step of the best checkpoint so far; None if there is none.
        is_writer: whether this process is the one that writes.
    """
    kept = {f"{name}/{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    for name, (network, optimizer) in optimizers.items():
        kept |= {f"{name}/{key}": value for key, value in optimizer_tensors(network, optimizer).items()}
    tensors = {}
    for name, value in kept.items():
        value = gather(value.detach())  # one at a time, to fit a GPU's memory
        if is_writer:
            tensors[name] = value.cpu().contiguous()
    if not is_writer:
        return
    folder = _folder(run, step)
    partial = folder.with_name(f"partial-{folder.name}")
    for leftover in folder.parent.glob("partial-*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / TENSORS)
        (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        (partial / SUMS).write_text("".join(f"{_sha256(partial / name)}  {name}\n" for name in (TENSORS, STATE)))
        for path in (*partial.iterdir(), partial):
            _to_disk(path)
    except (SafetensorError, OSError) as error:  # safetensors raises the first when the disk is full
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        shutil.rmtree(partial)
        raise InputError(
            f"cannot write {partial}: {error}; free some space and run the same command again: it continues from the "
            "checkpoint before, which is untouched"
        ) from None
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _to_disk(folder.parent)
    recent = checkpoints(run)[-2:]
    for other in checkpoints(run):
        if other not in (*recent, _folder(run, best_step or step)):
            shutil.rmtree(other)


def _folder(run: Path, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:08d}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def newest_intact(run: Path) -> int | None:
    """The step of the newest checkpoint with valid checksums; None if there is none. One process may call this.

    Damaged ones are announced and renamed.
    """
    for folder in reversed(checkpoints(run)):
        damage = _damage(folder)
        if damage is None:
            return int(folder.name.removeprefix("step-"))
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"checkpoint {folder} is damaged ({damage}): set aside as {aside.name}, taking the one before", flush=True)
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its checksums; None if nothing is."""
    try:
        sums = dict(reversed(line.split("  ", 1)) for line in (folder / SUMS).read_text().splitlines())
    except (OSError, ValueError):
        sums = {}
    if sums.keys() != {TENSORS, STATE}:
        return f"{SUMS} is missing or not what was written"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != expected:
            return f"{name} or {SUMS} is not what was written"
    return None


def load_checkpoint(run: Path, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by the names given to `save_checkpoint`, state) of a step.

    Raises:
        InputError: missing or damaged.
    """
    folder = _folder(run, step)
    try:
        flat, state = load_file(folder / TENSORS), json.loads((folder / STATE).read_text())
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(
            f"checkpoint {folder} cannot be read ({error}). All processes must see the same folder; if they do, delete this "
            "checkpoint to go on from an older one"
        ) from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        owner, _, key = name.partition("/")
        tensors.setdefault(owner, {})[key] = value
    return tensors, state


def restore(
    run: Path, step: int | None, networks: Mapping[str, nn.Module], settings: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """Load networks from the checkpoint of a step; returns its tensors by name, for `restore_optimizers`, and its state.

    Returns None if `step`, from `newest_intact`, is None.

    Raises:
        InputError: the checkpoint was made with other settings; the message lists which.
    """
    if step is None:
        return None
    tensors, state = load_checkpoint(run, step)
    state["settings"] = with_defaults(state["settings"])
    changed = differences(state["settings"], settings, FREE_SETTINGS)
    if changed:
        raise InputError(
            f"{run} holds a run with other settings: {'; '.join(changed[:6])}. Take back the change (where a new version of "
            f"ldm3d made it, end the run with the version before), choose another `output`, or delete {run} to start anew"
        )
    for name, network in networks.items():
        try:
            load_weights(network, tensors[name], run)
        except InputError as error:
            raise InputError(
                f"{error}. The settings are the same, so another version of ldm3d began this run: end it with that version, "
                f"choose another `output`, or delete {run} to start anew"
            ) from None
    return tensors, state


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings in today's format: keys that are newer than the checkpoint get their defaults.

    A section that today's config refuses stays as it is.
    """
    filled = dict(settings)
    for name, section in SECTIONS.items():
        with contextlib.suppress(KeyError, ValidationError):
            filled[name] = section.dump_python(section.validate_python(settings[name]), mode="json")
    with contextlib.suppress(KeyError, ValueError):
        filled["covariates"] = as_json(CovariateSchema.from_dict(settings["covariates"]).to_dict())
    return filled


def as_json(values: Any) -> Any:
    """Tuples as lists, as they come back from a JSON file."""
    if isinstance(values, dict):
        return {key: as_json(value) for key, value in values.items()}
    return [as_json(value) for value in values] if isinstance(values, list | tuple) else values


def rounding_changes(old: Any, new: Any) -> list[str]:
    """The changed settings among those that affect rounding alone, in the words of `differences`."""
    found = differences(old, new)
    return [text for text in found if text.partition(":")[0].rpartition(".")[2] in ROUNDING]


def load_best(run: Path, best: Mapping[str, Any] | None, networks: Mapping[str, nn.Module]) -> Mapping[str, Any] | None:
    """Load networks of a finished run from its best checkpoint; None, and a message, if it is damaged or there is none."""
    if best is None:
        return None
    damage = _damage(_folder(run, best["step"]))
    if damage:
        print(f"the best checkpoint, step {best['step']}, is damaged ({damage}): taking the last one", flush=True)
        return None
    tensors, _ = load_checkpoint(run, best["step"])
    for name, network in networks.items():
        load_weights(network, tensors[name], run)
    return best


def restore_optimizers(tensors: dict[str, dict[str, Tensor]], optimizers: Mapping[str, tuple[nn.Module, Optimizer]]) -> None:
    """The second half of `restore`, once the networks are on their devices and sharded.

    It empties `tensors`, since a checkpoint takes three to four times the memory of the networks.
    """
    for name, (network, optimizer) in optimizers.items():
        load_optimizer_tensors(network, optimizer, tensors.pop(name, {}))
    tensors.clear()
