"""Look at an experiment before it runs: its scans and columns, what it will take, how long, and what is to be done first.

Nothing is written but temporary files. What other parts say when they run is asked of them here; it is not said anew.
"""

import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

from ldm3d.budget import Budget, estimate
from ldm3d.config.sections import Config
from ldm3d.data.batches import evenly
from ldm3d.data.bids import read_scans
from ldm3d.data.evenness import uneven_splits
from ldm3d.data.masks import find_masks
from ldm3d.data.oddities import cut_remedy, other_than_said, who
from ldm3d.data.people import split_columns, split_subjects
from ldm3d.data.placing import grid_of
from ldm3d.data.preparing import tolerated_mm, try_out
from ldm3d.data.splits import MIN_TEST_SUBJECTS, TEST, TRAIN, VALIDATION
from ldm3d.demo_clock import minutes, stage_seconds, training_seconds
from ldm3d.errors import InputError, some
from ldm3d.memory import free_bytes
from ldm3d.processes import cores, own_device

TRIED = 3  # scans that are prepared for a try
REPEATS = 2  # of each step that is timed, after one for warming up
MUCH_MISSING = 0.5  # share of a column


@dataclass
class Findings:
    """What was found.

    Attributes:
        said: heading -> lines.
        odd: what deserves a look, and stops nothing.
        todo: what would stop the run, with the way out.
    """

    said: dict[str, list[str]] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)
    todo: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Warnings within are odd, and an InputError is something to do."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            except InputError as error:
                self.todo += [str(error)] * (str(error) not in self.todo)
        self.odd += [str(each.message) for each in caught if each.category is UserWarning]

    def text(self) -> str:
        """All of it; the last line is "ready", or the list of what to do."""
        parts = [f"{heading}\n" + "\n".join(f"  {line}" for line in lines) for heading, lines in self.said.items()]
        for heading, items in (("what is odd", self.odd), ("what to do before the run", self.todo)):
            if items:
                parts.append(f"{heading}\n" + "\n".join("  - " + item.replace("\n", "\n    ") for item in items))
        return "\n".join([*parts, *([] if self.todo else ["ready"])])


def check(config: Config, timed: bool = True) -> Findings:
    """Check an experiment.

    Args:
        config: of the experiment.
        timed: whether steps of both trainings are timed, which takes a minute or, for large networks, several.
    """
    found, device = Findings(), torch.device(own_device())
    scans = _scans(config, found)
    scan_seconds = _try_scans(config, scans, found) if scans is not None else 0.0
    budget = estimate(config, 0 if scans is None else len(scans), device)
    fits = _memory(budget, device, found)
    if scans is not None:
        _disk(config, budget, found)
        if timed and fits and not found.todo:
            _times(config, scans, scan_seconds, found)
    return found


def _scans(config: Config, found: Findings) -> pd.DataFrame | None:
    """The scans with their splits; None if they cannot be read."""
    scans = None
    with found.collecting():
        scans = read_scans(config.data, config.covariates)
        splits = split_subjects(scans.assign(key=scans["path"]), config.data, config.covariates, {})
        scans = scans.drop(columns=[*split_columns(config.data, config.covariates)])
        scans["split"] = scans["subject"].map(splits)
    if scans is None or "split" not in scans:
        return None
    counts = {split: scans.loc[scans["split"] == split, "subject"].nunique() for split in (TRAIN, VALIDATION, TEST)}
    found.said["scans"] = [
        f"{len(scans)} of {scans['subject'].nunique()} subjects in {config.data.bids or config.data.table}",
        ", ".join(f"{count} subjects {split}" for split, count in counts.items()),
    ]
    if config.data.splits.test and counts[TEST] < MIN_TEST_SUBJECTS:
        found.odd.append(
            f"{counts[TEST]} subjects are held out for the test, too few to evaluate a model: raise data.splits.test"
        )
    if missing := [row for row in scans.itertuples() if not Path(row.path).is_file()]:
        message = f"{len(missing)} of {len(scans)} scans are no files ({some(map(who, missing))}): {missing[0].path}"
        (found.todo if len(missing) == len(scans) else found.odd).append(f"{message}; fetch them, or correct the paths")
    with found.collecting():
        masks = find_masks(config.data, scans["path"]) if config.data.mask else []
        if lacking := [mask for mask in masks if isinstance(mask, InputError)]:
            found.odd.append(f"{len(lacking)} of {len(scans)} scans have not the one mask that they need: {lacking[0]}")
    if uneven := {
        name: how
        for name, how in uneven_splits(scans, config.schema()).items()
        if name not in config.data.splits.stratify and not config.data.split_column
    }:
        said = "; ".join(f"{name} ({how})" for name, how in uneven.items())
        found.odd.append(
            f"people held out differ from those that train in {said}: data.splits.stratify: [{', '.join(uneven)}] shares them "
            "out alike"
        )
    lines = [_column(covariate, scans[covariate.name], found) for covariate in config.schema()]
    found.said["covariates"] = lines or ["none: an unconditional model"]
    with found.collecting():
        config.schema().fit(scans.loc[scans["split"] == TRAIN, config.schema().names].to_dict("records"))
    return scans


def _column(covariate, values: pd.Series, found: Findings) -> str:
    """A covariate's values in a line."""
    there = values.dropna()
    missing = len(values) - len(there)
    if covariate.kind == "continuous":
        what = f"{there.min():g} to {there.max():g} {covariate.unit}, mean {there.mean():.3g}" if len(there) else "no value"
    else:
        counts = there.value_counts()
        what = ", ".join(f"{category} {counts.get(category, 0)}" for category in covariate.categories)
        if never := [category for category in covariate.categories if category not in counts]:
            found.odd.append(f"{covariate.name}: no scan is {some(never)}; is it called otherwise in the table?")
    if missing > MUCH_MISSING * len(values):
        found.odd.append(f"{covariate.name} is missing for {missing} of {len(values)} scans")
    return f"{covariate.name}: {what}; {missing} missing"


def _try_scans(config: Config, scans: pd.DataFrame, found: Findings) -> float:
    """Prepare a few scans; seconds for each."""
    chosen = [row for row in scans.itertuples() if Path(row.path).is_file()]
    chosen = evenly(chosen, TRIED)
    if not chosen:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        start, results = time.perf_counter(), []
        with found.collecting():
            results = try_out(config, [row.path for row in chosen], Path(folder))
        seconds = (time.perf_counter() - start) / len(chosen)
    bad = [f"{who(row)}: {result['reason']}" for row, result in zip(chosen, results) if "reason" in result]
    if bad:
        text = f"{len(bad)} of {len(chosen)} scans that were tried cannot be prepared: " + "\n".join(bad)
        (found.todo if len(bad) == len(chosen) else found.odd).append(text)
    grid = grid_of(config.data.grid)
    tolerance = tolerated_mm(grid)
    cut = [
        f"{who(row)} {result['cut_mm']:g} mm" for row, result in zip(chosen, results) if result.get("cut_mm", 0) > tolerance
    ]
    if cut:
        found.odd.append(
            f"the grid cuts off foreground: {', '.join(cut)}; if that is more than the neck, {cut_remedy(grid.place)}"
        )
    tried = [(who(row), result) for row, result in zip(chosen, results) if "reason" not in result]
    others = other_than_said([name for name, _ in tried], [result for _, result in tried], config.data.skull_stripped)
    found.odd += [f"{len(which)} {what} ({some(which)})" for what, which in others.items() if which]
    found.odd += [note for result in results for note in result.get("notes", ())]
    return seconds


def _memory(budget: Budget, device: torch.device, found: Findings) -> bool:
    """Whether both trainings fit into the memory that is free."""
    free, fits = free_bytes(device), True
    lines = []
    for name, part, section in (
        ("autoencoder", budget.stage_1, "autoencoder"),
        ("diffusion model", budget.stage_2, "diffusion"),
    ):
        needed = part + budget.process
        lines.append(f"{name}: about {size(needed)} of {size(free)} free ({device.type})")
        if needed > free:
            fits = False
            found.todo.append(
                f"training the {name} takes about {size(needed)} and {size(free)} are free on this {device.type}: lower "
                f"{section}.training.batch_size, raise {section}.training.accumulation, or take smaller networks"
            )
    found.said["memory of each process"] = lines
    return fits


def _disk(config: Config, budget: Budget, found: Findings) -> None:
    folder = next(path for path in (config.output.absolute(), *config.output.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, sum(budget.disk.values())
    parts = ", ".join(f"{name} {size(part)}" for name, part in budget.disk.items())
    found.said["disk"] = [f"about {size(needed)} of {size(free)} free in {folder}", parts]
    there = sum(path.stat().st_size for path in config.output.rglob("*") if path.is_file()) if config.output.is_dir() else 0
    if needed - there > free:
        found.todo.append(
            f"the experiment takes about {size(needed)} in {config.output} and {size(free)} are free: free some space, or set "
            "output to another disk"
        )


def _times(config: Config, scans: pd.DataFrame, scan_seconds: float, found: Findings) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        units = training_seconds(config, REPEATS)
    except torch.OutOfMemoryError as error:  # of a GPU; on a CPU the estimate of the memory stands before it
        found.todo.append(f"a step of a training runs out of memory ({str(error).splitlines()[0]}): lower its batch_size")
        return
    finally:
        torch.set_num_threads(threads)
    counts = scans["split"].value_counts()
    # Forward alone takes a third of a step at most
    again = units[1] / config.autoencoder.training.batch_size
    stages = stage_seconds(config, len(scans), int(counts.get(TRAIN, 0)), int(counts.get(VALIDATION, 0)), units, again)
    stages = {"prepare": scan_seconds * len(scans) / cores(), **stages}
    found.said["time on this machine, from a few steps"] = [
        *(f"{name}: {duration(seconds)}" for name, seconds in stages.items()),
        f"together: {duration(sum(stages.values()))} on one process",
    ]


def size(number: float) -> str:
    """Bytes in words: "1.2 GB"."""
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """In words: minutes, and from two hours on hours."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else minutes(seconds)
