"""What an audit finds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from ldm3d.evaluation.subgroups import VolumeScores
from ldm3d.privacy.calibration import Threshold
from ldm3d.privacy.membership import Membership
from ldm3d.privacy.nearest import Similarity
from ldm3d.statistics.conformal import Rate

ALARM = 0.05  # p-value below which a finding is not attributed to chance


@dataclass(frozen=True)
class AuditedVolume:
    """One synthetic volume.

    Attributes:
        name, asked: see `Volumes`.
        similarity: to the training subjects.
        p: probability that a new subject's volume is as similar to one of them; see `ldm3d.statistics.conformal`.
        subject: the training subject that it is most similar to.
        copy, plain: whether it counts as a copy, and as a plain one.
    """

    name: str
    asked: str
    similarity: Similarity
    p: float
    subject: str
    copy: bool
    plain: bool

    def to_dict(self) -> dict[str, Any]:
        ratios = {f"{space}_ratio": nearest.ratio for space, nearest in self.similarity.nearest.items()}
        similarity = {"score": self.similarity.score, "space": self.similarity.space, "p": self.p}
        outcome = {"nearest_subject": self.subject, "copy": self.copy, "plain": self.plain}
        return {"name": self.name, "asked": self.asked or None} | similarity | outcome | ratios


@dataclass(frozen=True)
class SpaceResult:
    """Distances in one space.

    Attributes:
        held_out_ratio, synthetic_ratio: (lowest, median) of the distance to the nearest training subject in units of that to
            the next ones.
        authentic, held_out_authentic: AuthPct, the share of volumes whose nearest training volume has a nearer neighbour
            among the other training subjects (Alaa et al. 2022); of synthetic volumes, and of one of each held-out subject.
        c_t: see `ldm3d.privacy.audit.data_copying`.
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
    """Everything that an audit finds.

    Attributes:
        threshold: below which a volume counts as a copy.
        volumes: every synthetic volume.
        held_out_scores: of every held-out volume, after the autoencoder.
        spaces: by name.
        membership: of membership inference; None if there are too few held-out subjects.
        training_scans, training_subjects: their numbers.
        suspects: the synthetic volumes with the lowest scores, each with its training volume; for pictures, on the main
            process alone.
        scores: to be compared between groups of people: whether some are copied, or identified by their loss, more often.
    """

    threshold: Threshold
    volumes: list[AuditedVolume]
    held_out_scores: list[float]
    spaces: dict[str, SpaceResult]
    membership: Membership | None
    training_scans: int
    training_subjects: int
    suspects: list[tuple[AuditedVolume, NDArray, NDArray]] = field(default_factory=list, repr=False)
    scores: Sequence[VolumeScores] = field(default_factory=list, repr=False)

    @property
    def groups(self) -> list[str]:
        """The groups of subjects whose covariates were requested."""
        return sorted({each.asked for each in self.volumes} - {""})

    def copies(self, asked: str | None = None) -> Rate | None:
        """Share of copies among all volumes, or among those with the covariates of one group; None if there are none."""
        chosen = [each for each in self.volumes if asked in (None, each.asked)]
        return Rate(sum(each.copy for each in chosen), len(chosen)) if chosen else None

    @property
    def plain(self) -> int:
        """Number of plain copies."""
        return sum(each.plain for each in self.volumes)

    @property
    def copied_subjects(self) -> Rate:
        """Share of the training subjects of whom there is a copy."""
        return Rate(len({each.subject for each in self.volumes if each.copy}), self.training_subjects)

    @property
    def chance(self) -> float:
        """Probability of as many copies by chance."""
        return self.threshold.chance(self.copies().count, len(self.volumes))

    @property
    def has_copies(self) -> bool:
        """Whether there is a plain copy, or significantly more volumes below the threshold than expected."""
        return self.plain > 0 or self.chance < ALARM

    @property
    def verdict(self) -> str:
        """In one line, with the threshold."""
        copies = self.copies()
        outcome = f"COPIES: {self.plain} plain ones;" if self.has_copies else "no copies beyond the held-out rate:"
        return (
            f"{outcome} {copies.count} of {copies.total} volumes ({copies.value:.1%}) are below the similarity threshold "
            f"(score {self.threshold.score:.2f}); {self.threshold.false_rate:.1%} are expected of subjects that the model was "
            f"not trained on (p = {self.chance:.2g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        shares = {group: self.copies(group).to_dict() for group in self.groups}
        threshold = self.threshold
        rates = {"expected_false_rate": threshold.false_rate, "false_rate_interval": list(threshold.false_interval)}
        return {
            "verdict": self.verdict,
            "copies_found": self.has_copies,
            "threshold": threshold.to_dict() | rates,
            "training": {"scans": self.training_scans, "subjects": self.training_subjects},
            "copies": self.copies().to_dict() | {"plain": self.plain, "chance": self.chance, "by_covariates_of": shares},
            "training_subjects_copied": self.copied_subjects.to_dict(),
            "spaces": {name: space.to_dict() for name, space in self.spaces.items()},
            "membership": self.membership and self.membership.to_dict(),
            "volumes": [each.to_dict() for each in sorted(self.volumes, key=lambda each: each.similarity.score)],
            "held_out_scores": sorted(self.held_out_scores),
        }
