"""Downstream utility for segmentation: do volumes that a model draws from label maps help where few scans have one?

A network is trained on few real people with their label maps, alone and with every second volume made from the same label
maps, in several ways; it is tested on other people. A label map that a volume is drawn of comes along. Both are mirrored and
shifted, so that the fair comparison is with real scans that are mirrored and shifted as much.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import ndimage

from ldm3d.config.conditions import LabelsCondition
from ldm3d.config.sections import Config
from ldm3d.data.conditions import ScanImages
from ldm3d.description import Sampling
from ldm3d.errors import InputError
from ldm3d.evaluation.selection import in_turn
from ldm3d.generation.given import Images
from ldm3d.generation.given_scans import Given
from ldm3d.metrics.labels import with_background
from ldm3d.models.segmentation import SegmentationUNet
from ldm3d.pipeline import Pipeline
from ldm3d.randomness import generator
from ldm3d.rulers.segmenter import Load, dice
from ldm3d.statistics.bootstrap import SAMPLES, Interval, interval, resamples

SIZES, SEEDS = (10, 20, 50), range(5)  # people to train on, and of all that is random
TESTED, COPIES = 20, 2  # tested people, and drawn volumes a person and seed
SHIFT = 2  # voxels at most, along each axis
REAL, MOVED, DRAWN, ALL = "real", "real, mirrored and shifted", "drawn by the model", "all real"
KINDS = (REAL, MOVED, DRAWN)

Pair = tuple[NDArray, NDArray]  # volume (1, X, Y, Z) in [0, 1], and shares (1 + groups, X, Y, Z)
Second = Callable[[int, np.random.Generator], Pair]  # what every second volume is
Draw = Callable[[int, NDArray, int], NDArray]  # person, shares of groups (G, X, Y, Z), number -> volume (1, X, Y, Z) likewise


class Train(Protocol):
    """Of a segmenter: as `ldm3d.training.segmenter.train_segmenter`."""

    def __call__(
        self, load: Load, count: int, groups: Mapping[str, Sequence[int]], *, seed: int, paint: Second | None
    ) -> SegmentationUNet: ...


@dataclass(frozen=True, eq=False)
class SegmentationUtility:
    """Downstream utility for segmentation.

    Attributes:
        groups: of labels.
        people: the tested person of each column.
        scores: (people trained on, one of `KINDS` or `ALL`) -> mean Dice over groups, (seeds, tested).
    """

    groups: Sequence[str]
    people: Sequence[Hashable]
    scores: Mapping[tuple[int, str], NDArray]

    def mean(self, size: int, kind: str, beside: str | None = None) -> tuple[float, Interval]:
        """Mean Dice, or its difference from that of another kind, with the 95% interval over trainings and tested people."""
        values = self.scores[size, kind] - (0 if beside is None else self.scores[size, beside])
        weights = resamples(self.people)
        weights /= weights.sum(axis=1, keepdims=True)
        random = generator("segmentation utility", len(values))
        chosen = torch.randint(len(values), (SAMPLES, len(values)), generator=random).numpy()
        return float(values.mean()), interval((weights * values[chosen].mean(axis=1)).sum(axis=1))

    def to_dict(self) -> list[dict[str, Any]]:
        """A row for each number of people and each kind."""
        found = []
        for size, kind in self.scores:
            row = {"people": size, "trained_on": kind, "dice": self.mean(size, kind)}
            row |= {f"beyond {other}": self.mean(size, kind, other) for other in (REAL, MOVED) if (size, other) in self.scores}
            row["seeds"] = [round(float(each), 4) for each in self.scores[size, kind].mean(axis=1)]
            found.append(row)
        return found


def segmentation_utility(
    train: Train,
    load: Load,
    count: int,
    draw: Draw,
    tested: Load,
    people: Sequence[Hashable],
    groups: Mapping[str, Sequence[int]],
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = SEEDS,
    more: Mapping[str, Second] | None = None,
    crop: Callable[[NDArray], NDArray] = np.asarray,
    progress: Callable[[int, int], None] | None = None,
) -> SegmentationUtility:
    """Train segmenters on few people in each of `KINDS`, and one on all; test them on others.

    Args:
        train: makes a network.
        load: number of a person to train on, from 0, -> volume and shares.
        count: of these people; sizes of more are left out.
        draw: of the model that is judged.
        tested: number of a tested person -> volume and shares.
        people: who they are.
        groups: name -> labels, in the order of the shares.
        sizes: how many people.
        seeds: with each of them they are drawn anew, and all that is random.
        more: further kinds of what every second volume is, by name.
        crop: of volumes and shares to where the model draws.
        progress: called with (trainings done, all).

    Raises:
        InputError: fewer people than the least size, or none to test on.
    """
    sizes = [size for size in sizes if size <= count]
    if not sizes or not people:
        raise InputError(f"{count} people with label maps to train on and {len(people)} to test on: too few for a segmenter")
    scores: dict[tuple[int, str], list[NDArray]] = {}
    cropped = lambda pair: (crop(pair[0]), crop(pair[1]))  # noqa: E731
    total, done = trainings(count, sizes, seeds, len(more or {})), 0

    def test(size: int, kind: str, chosen: Sequence[int], seed: int, second: Second | None) -> None:
        nonlocal done
        among = (lambda i, random: cropped(second(chosen[i], random))) if second else None
        network = train(lambda i: cropped(load(chosen[i])), len(chosen), groups, seed=seed, paint=among)
        found = np.array([*dice(network, lambda i: cropped(tested(i)), range(len(people))).values()])  # (groups, tested)
        scores.setdefault((size, kind), []).append(np.nanmean(found, axis=0))
        done += 1
        if progress:
            progress(done, total)

    for seed in seeds:
        order = torch.randperm(count, generator=generator("segmentation utility", "people", seed)).tolist()
        drawn = _Drawn(load, draw, count, seed)
        kinds: dict[str, Second | None] = {REAL: None, MOVED: lambda i, random: moved(load(i), random), DRAWN: drawn}
        for size in sizes:
            for kind, second in {**kinds, **(more or {})}.items():
                test(size, kind, order[:size], seed, second)
        test(count, ALL, order, seed, None)
    return SegmentationUtility(list(groups), people, {key: np.stack(rows) for key, rows in scores.items()})


def trainings(count: int, sizes: Sequence[int] = SIZES, seeds: Sequence[int] = SEEDS, more: int = 0) -> int:
    """How many networks are trained, if there are `count` people; `more`: further kinds."""
    return len(seeds) * (sum(size <= count for size in sizes) * (len(KINDS) + more) + 1)


def utility_of_model(
    pipeline: Pipeline,
    config: Config,
    trained: pd.DataFrame,
    held_out: pd.DataFrame,
    train: Train,
    sampling: Sampling,
    tested: int = TESTED,
    more: Callable[[Sequence[str]], Mapping[str, Second]] | None = None,
    **options: Any,
) -> SegmentationUtility:
    """`segmentation_utility` of a model that draws scans given their label maps and covariates.

    Args:
        pipeline, config, trained, held_out: see `ldm3d.evaluation.assess.assess`.
        train: makes a network.
        sampling: how volumes are drawn.
        tested: how many held-out people at most.
        more: keys of the people to train on -> see `segmentation_utility`, whose `options` these are.

    Raises:
        InputError: the model is given no label map, or other images, too.
    """
    condition = labels_of(pipeline)
    if condition is None:
        raise InputError("the model is not one that draws scans of label maps alone (diffusion.conditions of kind labels)")
    known, others = (ScanImages(config, table) for table in (trained, held_out))
    own = [*{trained["subject"].iloc[i]: i for i in reversed(known.complete)}.values()][::-1]  # the first scan of each person
    apart = others.complete

    def pair(scans: ScanImages, i: int) -> Pair:
        return scans.made(i)[:1], with_background(scans.given(i)[0][condition.name].numpy())

    rows = pipeline.parse(trained[pipeline.schema.names].to_dict("records"))
    people = [str(held_out["subject"].iloc[i]) for i in apart]
    chosen = in_turn(people, sampling.seed)[:tested]

    def draw(i: int, shares: NDArray, number: int) -> NDArray:
        given = Given({condition.name: torch.from_numpy(np.ascontiguousarray(shares))}, {}, {})
        of_one = pipeline.given(Images(pipeline.conditions, lambda _: given, {"evaluation": "segmentation"}, None))
        volume = next(iter(of_one.volumes([rows[own[i]]], sampling, numbers=[number])))[:1]
        return np.pad(volume, [(0, 0), *pipeline.crop])

    return segmentation_utility(
        train,
        lambda i: pair(known, own[i]),
        len(own),
        draw,
        lambda i: pair(others, apart[chosen[i]]),
        [people[i] for i in chosen],
        condition.groups,
        more=more([known.keys[i] for i in own]) if more else None,
        crop=pipeline.cropped,
        **options,
    )


def labels_of(pipeline: Pipeline) -> LabelsCondition | None:
    """The label map that is all that a model is given; None for other models."""
    (condition,) = pipeline.conditions if len(pipeline.conditions) == 1 else (None,)
    return condition if isinstance(condition, LabelsCondition) and not pipeline.labels else None


class _Drawn:
    """Volumes that the model draws of a person's label map, kept, and each time mirrored and shifted with it.

    Only afterwards: registered label maps that are moved are unlike all that the model was trained on.
    """

    def __init__(self, load: Load, draw: Draw, count: int, seed: int):
        self.load, self.draw, self.count, self.seed = load, draw, count, seed
        self.kept: dict[tuple[int, int], Pair] = {}

    def __call__(self, i: int, random: np.random.Generator) -> Pair:
        copy = int(random.integers(COPIES))
        if (i, copy) not in self.kept:
            shares = self.load(i)[1]
            self.kept[i, copy] = self.draw(i, shares[1:], (self.seed * self.count + i) * COPIES + copy), shares
        return moved(self.kept[i, copy], random)


def moved(pair: Pair, random: np.random.Generator) -> Pair:
    """A volume and its shares, mirrored half of the time along the first axis, and shifted; the border voxels are repeated."""
    mirrored, shift = bool(random.integers(2)), random.integers(-SHIFT, SHIFT + 1, 3)

    def move(values: NDArray) -> NDArray:
        values = values[:, ::-1] if mirrored else values
        return np.asarray(ndimage.shift(values, (0, *shift), order=0, mode="nearest"))

    return move(pair[0]), move(pair[1])
