"""Does a model give its training subjects away? By copies among what it makes, or by what its loss tells.

Held-out subjects are the yardstick throughout: what lies as near to a training subject as they do is no copy, and what a loss
says of them it says of anybody. They are looked at after the autoencoder, through which every generated volume came. A subject
may have several scans; none is both trained on and held out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm3d.errors import InputError
from ldm3d.evaluation.subgroups import Judged
from ldm3d.generation.sampling import grouped
from ldm3d.pipeline import Pipeline
from ldm3d.privacy.calibration import Threshold, calibrate
from ldm3d.privacy.descriptors import Descriptors, descriptors_of
from ldm3d.privacy.embedding import Embedding, train_embedding
from ldm3d.privacy.guard import Guard, embed, likeness_of
from ldm3d.privacy.membership import Membership, infer_members, losses_of
from ldm3d.privacy.nearest import SPACES, Likeness, Reference
from ldm3d.privacy.volumes import Volumes
from ldm3d.processes import ALONE, Processes, share_work
from ldm3d.statistics.conformal import Rate, p_values

ALARM = 0.05  # probability of what was found by chance, below which it is not called chance
MOST_ATTACKED = 200  # subjects of each group whose losses are taken
SMALL, SMALL_AUTHENTIC = 0.05, 0.1  # gaps between groups of people that are called small: of shares of copies, and of AuthPct


@dataclass(frozen=True)
class Looked:
    """One synthetic volume.

    Attributes:
        name, asked: see `Volumes`.
        likeness: to the training subjects.
        p: probability that a new subject's volume is as much like one of them; see `ldm3d.statistics.conformal`.
        subject: whom it is like.
        copy, plain: whether it counts as a copy, and as a plain one.
    """

    name: str
    asked: str
    likeness: Likeness
    p: float
    subject: str
    copy: bool
    plain: bool

    def to_dict(self) -> dict[str, Any]:
        found = {
            "name": self.name,
            "asked": self.asked or None,
            "score": self.likeness.score,
            "space": self.likeness.space,
            "p": self.p,
            "nearest_subject": self.subject,
            "copy": self.copy,
            "plain": self.plain,
        }
        return found | {f"{space}_ratio": nearest.ratio for space, nearest in self.likeness.nearest.items()}


@dataclass(frozen=True)
class InSpace:
    """What distances in one space say.

    Attributes:
        held_out_ratio, synthetic_ratio: (lowest, median) of the distance to the nearest training subject in units of that to
            the next ones.
        authentic, held_out_authentic: AuthPct, the share of volumes whose nearest training volume has a nearer neighbour
            among the other training subjects (Alaa et al. 2022); of synthetic volumes, and of one of each held-out subject.
        c_t: see `data_copying`.
    """

    held_out_ratio: tuple[float, float]
    synthetic_ratio: tuple[float, float]
    authentic: Rate
    held_out_authentic: Rate
    c_t: float

    def to_dict(self) -> dict[str, Any]:
        pairs = {name: dict(zip(("lowest", "median"), getattr(self, name))) for name in ("held_out_ratio", "synthetic_ratio")}
        shares = {"authentic": self.authentic.to_dict(), "held_out_authentic": self.held_out_authentic.to_dict()}
        return {**pairs, **shares, "c_t": self.c_t}


@dataclass
class Audit:
    """What was found.

    Attributes:
        threshold: what counts as a copy.
        looked: every synthetic volume.
        held_out_scores: of every held-out volume, after the autoencoder.
        spaces: by name.
        membership: of the attack by losses; None where there are too few held-out subjects for it.
        training_scans, training_subjects: how many.
        suspects: the synthetic volumes with the lowest scores, and each with its training volume; for pictures, on
            the main process alone.
        judged: what can be judged by group of people: whether some are copied, or named by their loss, more than others.
    """

    threshold: Threshold
    looked: list[Looked]
    held_out_scores: list[float]
    spaces: dict[str, InSpace]
    membership: Membership | None
    training_scans: int
    training_subjects: int
    suspects: list[tuple[Looked, NDArray, NDArray]] = field(default_factory=list, repr=False)
    judged: list[Judged] = field(default_factory=list, repr=False)

    def copies(self, asked: str | None = None) -> Rate | None:
        """Share of copies among all volumes, or those that were asked with one group's covariates; None if there are none."""
        chosen = [each for each in self.looked if asked in (None, each.asked)]
        return Rate(sum(each.copy for each in chosen), len(chosen)) if chosen else None

    @property
    def plain(self) -> int:
        """Plain copies."""
        return sum(each.plain for each in self.looked)

    @property
    def copied_subjects(self) -> Rate:
        """Share of the training subjects of whom there is a copy."""
        return Rate(len({each.subject for each in self.looked if each.copy}), self.training_subjects)

    @property
    def chance(self) -> float:
        """Probability of as many copies by chance."""
        return self.threshold.chance(self.copies().count, len(self.looked))

    @property
    def has_copies(self) -> bool:
        """Whether there is a plain copy, or are more volumes below the threshold than chance would have."""
        return self.plain > 0 or self.chance < ALARM

    @property
    def verdict(self) -> str:
        """In one line, with the threshold."""
        copies = self.copies()
        what = f"COPIES: {self.plain} plain ones;" if self.has_copies else "no copies beyond the held-out rate:"
        return (
            f"{what} {copies.count} of {copies.total} volumes ({copies.value:.1%}) are too near to a training subject "
            f"(score below {self.threshold.score:.2f}); of new subjects' {self.threshold.false_rate:.1%} would be "
            f"(p = {self.chance:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        shares = {
            group: rate.to_dict()
            for group in sorted({each.asked for each in self.looked} - {""})
            if (rate := self.copies(group))
        }
        return {
            "verdict": self.verdict,
            "copies_found": self.has_copies,
            "threshold": self.threshold.to_dict()
            | {"expected_false_rate": self.threshold.false_rate, "false_rate_interval": list(self.threshold.false_interval)},
            "training": {"scans": self.training_scans, "subjects": self.training_subjects},
            "copies": self.copies().to_dict() | {"plain": self.plain, "chance": self.chance, "by_covariates_of": shares},
            "training_subjects_copied": self.copied_subjects.to_dict(),
            "spaces": {name: space.to_dict() for name, space in self.spaces.items()},
            "membership": self.membership and self.membership.to_dict(),
            "volumes": [each.to_dict() for each in sorted(self.looked, key=lambda each: each.likeness.score)],
            "held_out_scores": sorted(self.held_out_scores),
        }


def audit(
    pipeline: Pipeline,
    training: Volumes,
    held_out: Volumes,
    synthetic: Volumes,
    level: float = 0.05,
    seed: int = 0,
    embedding_steps: int = 300,
    shown: int = 5,
    processes: Processes = ALONE,
) -> tuple[Audit, Guard]:
    """Audit a model.

    Args:
        pipeline: the model.
        training: what it was trained on, all of it: a copy of what is left out is not found.
        held_out: of subjects that it has never seen.
        synthetic: what it made, or is to make.
        level: share of new subjects' volumes that may be called copies, see `calibrate`.
        seed: of the embedding and of the attack's noise.
        embedding_steps: of its training.
        shown: suspects to keep volumes of.
        processes: that share the work; all of them have to call this, and all get the same answer.

    Raises:
        InputError: fewer than four training subjects, nobody held out, one subject in both, or no synthetic volume.
    """
    both = sorted(set(training.names) & set(held_out.names))
    if both:
        raise InputError(
            f"{', '.join(both[:3])}: {len(both)} subjects are both trained on and held out; leave them out of one"
        )
    if not (len(training) and len(held_out) and len(synthetic)):
        raise InputError(
            f"{len(training)} training, {len(held_out)} held-out and {len(synthetic)} synthetic volumes; the audit needs some "
            "of each, and data that holds all the scans that the model was trained on"
        )
    names = {name: i for i, name in enumerate(dict.fromkeys(training.names))}
    subjects = torch.tensor([names[name] for name in training.names])
    seen = _look(pipeline, training, processes, "training volumes", views=False)
    coarse = torch.cat([each.coarse for each in seen])
    embedding = _train(coarse, subjects, embedding_steps, seed, pipeline, processes)
    features = {"latent": torch.cat([each.latent for each in seen]), "image": torch.cat([each.image for each in seen])}
    reference = Reference(features | {"embedding": embed(embedding, coarse)}, subjects)

    on_held_out, on_synthetic = (
        [likeness_of(reference, embedding, each) for each in _look(pipeline, volumes, processes, title)]
        for volumes, title in ((_decoded(held_out, pipeline), "held-out volumes"), (synthetic, "synthetic volumes"))
    )
    threshold = calibrate(on_held_out, held_out.names, level)
    scores = [each.score for each in on_held_out]
    looked = [
        Looked(
            name,
            asked,
            likeness,
            p,
            training.names[likeness.row],
            threshold.is_copy(likeness),
            threshold.is_plain(likeness),
        )
        for name, asked, likeness, p in zip(
            synthetic.names,
            synthetic.asked or [""] * len(synthetic),
            on_synthetic,
            p_values([each.score for each in on_synthetic], scores, held_out.names),
        )
    ]
    firsts = [on_held_out[i] for i in held_out.first_scans()]
    spaces = {space: _in_space(reference, space, on_held_out, firsts, on_synthetic) for space in SPACES}
    membership = _attack(pipeline, training, held_out, seed, processes)
    found = Audit(threshold, looked, scores, spaces, membership, len(training), reference.count)
    if synthetic.rows is not None:
        authentic = {space: [reference.is_authentic(each, space) for each in on_synthetic] for space in SPACES}
        found.judged += _of_synthetic(looked, authentic, synthetic)
    found.judged += _of_training(found, training, seed)
    if processes.is_main:
        for i in sorted(range(len(looked)), key=lambda i: looked[i].likeness.score)[:shown]:
            (made,), (original,) = synthetic.read([i]), training.read([looked[i].likeness.row])
            found.suspects.append((looked[i], made, pipeline.cropped(original)))
    return found, Guard(reference, embedding, threshold, pipeline.model_hash)


def _decoded(volumes: Volumes, pipeline: Pipeline) -> Volumes:
    """The same after the autoencoder: as smooth as generated ones, or smoothness alone would look like nearness."""

    def read(numbers: Sequence[int]) -> Iterator[NDArray]:
        for volume in volumes.read(numbers):
            batch = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None]
            yield pipeline.reconstruct(batch)[0].cpu().numpy()

    return replace(volumes, read=read)


def _look(pipeline: Pipeline, volumes: Volumes, processes: Processes, title: str, views: bool = True) -> list[Descriptors]:
    """Descriptors of all volumes, which are let go."""

    def work(numbers: list[int]) -> list[Descriptors]:
        return [descriptors_of(pipeline, volume, views) for volume in volumes.read(numbers)]

    groups = list(grouped(range(len(volumes)), pipeline.group_size))  # whole batches: a part of one costs as much
    return [each for group in share_work(work, groups, processes, title) for each in group]


def _train(
    coarse: torch.Tensor, subjects: torch.Tensor, steps: int, seed: int, pipeline: Pipeline, processes: Processes
) -> Embedding:
    """The embedding, trained by the main process, for all."""
    trained = None
    if processes.is_main:
        trained = train_embedding(coarse, subjects, steps, seed=seed, device=pipeline.device).state_dict()
    embedding = Embedding(coarse.shape[1:])
    embedding.load_state_dict(processes.gather(trained)[0])
    return embedding.eval().requires_grad_(False)


def _in_space(
    reference: Reference,
    space: str,
    held_out: Sequence[Likeness],
    firsts: Sequence[Likeness],
    synthetic: Sequence[Likeness],
) -> InSpace:
    ratios = [np.array([each.nearest[space].ratio for each in group]) for group in (held_out, synthetic)]
    authentic = [Rate(sum(reference.is_authentic(each, space) for each in group), len(group)) for group in (synthetic, firsts)]
    distances = ([each.nearest[space].distance for each in group] for group in (firsts, synthetic))
    return InSpace(*((float(r.min()), float(np.median(r))) for r in ratios), *authentic, data_copying(*distances))


def _of_synthetic(looked: Sequence[Looked], authentic: Mapping[str, Sequence[bool]], synthetic: Volumes) -> list[Judged]:
    """Shares of synthetic volumes, by what was asked of them."""
    given = synthetic.rows, [tuple(row.values()) for row in synthetic.rows]  # one request made twice is one person's
    return [
        Judged("copies among volumes", np.array([float(each.copy) for each in looked]), *given, "low", SMALL),
        *(
            Judged(f"AuthPct, {space} space", np.array(values, dtype=float), *given, "high", SMALL_AUTHENTIC)
            for space, values in authentic.items()
        ),
    ]


def _of_training(found: Audit, training: Volumes, seed: int) -> list[Judged]:
    """Shares of training subjects, by who they are."""
    copied = {each.subject for each in found.looked if each.copy}
    shares = {"training subjects copied": (training.first_scans(), lambda i: training.names[i] in copied)}
    if found.membership:
        chosen = training.first_scans(MOST_ATTACKED, seed)
        named = dict(zip(chosen, found.membership.each_named))
        shares["training subjects named by their loss"] = chosen, named.get
    return [
        Judged(
            name,
            np.array([float(is_so(i)) for i in own]),
            *([of[i] for i in own] for of in (training.rows, training.names)),
            "low",
            SMALL,
        )
        for name, (own, is_so) in shares.items()
    ]


def data_copying(held_out: Sequence[float], synthetic: Sequence[float]) -> float:
    """C_T (Meehan et al. 2020, section 3.1, in one cell): Mann-Whitney's z of distances to the training set.

    Args:
        held_out, synthetic: distance of each volume to its nearest training volume; (n,) and (m,).

    Returns:
        Well below 0, say -3: synthetic volumes are nearer than held-out ones, as copies are. Well above 0: further, as
        those of a model that has learned too little are. 0 on average for volumes of the training distribution.
    """
    p, q = np.asarray(held_out), np.asarray(synthetic)
    u = (q[:, None] > p).sum() + 0.5 * (q[:, None] == p).sum()
    n, m = len(p), len(q)
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def _attack(pipeline: Pipeline, training: Volumes, held_out: Volumes, seed: int, processes: Processes) -> Membership | None:
    losses = []
    for volumes, title in ((training, "losses of training subjects"), (held_out, "losses of held-out subjects")):

        def work(i: int, volumes: Volumes = volumes) -> NDArray:
            (volume,) = volumes.read([i])
            return losses_of(pipeline, volume, volumes.rows[i], seed)

        chosen = volumes.first_scans(MOST_ATTACKED, seed)
        if len(chosen) < 2:
            return None
        losses.append(np.array(share_work(work, chosen, processes, title)))
    return infer_members(*losses)
