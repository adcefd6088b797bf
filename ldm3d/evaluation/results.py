"""What an evaluation finds: figures of all parts, and what later parts need of earlier ones."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from numpy.typing import NDArray

from ldm3d.covariates import CovariateSchema, Value
from ldm3d.data.splits import TRAIN
from ldm3d.evaluation import subgroups
from ldm3d.evaluation.anatomy import Anatomy
from ldm3d.evaluation.discriminability import Discriminability
from ldm3d.evaluation.likelihood import COLUMNS
from ldm3d.evaluation.realism_metrics import REALISM_METRICS
from ldm3d.evaluation.samples import QUALITIES
from ldm3d.evaluation.segmentation_utility import SegmentationUtility
from ldm3d.evaluation.subgroups import Gap, VolumeScores
from ldm3d.evaluation.support import OutsideTraining
from ldm3d.evaluation.sweeps import Sweep
from ldm3d.evaluation.truth import Truth
from ldm3d.evaluation.utility import Utility
from ldm3d.rulers.categories import Hits
from ldm3d.statistics.agreement import Comparison
from ldm3d.statistics.bootstrap import mean_interval
from ldm3d.statistics.equivalence import Finding


@dataclass
class Evaluation:
    """Everything that `ldm3d.evaluation.assess` finds.

    Attributes:
        psnr_db, ssim: of the reconstruction of each held-out volume, over the whole grid.
        psnr_foreground_db, ssim_foreground: the same in the foreground of the original; the lights are of these.
        comparisons: of kind "real" and "reconstructed", measured against the table; "kept", measured on reconstructions
            against the same on the originals; "generated", measured against the request.
        sweeps: over each continuous covariate.
        real, reconstructed, generated: a few volumes (C, X, Y, Z) of the same subjects, the first of `order`, for pictures.
        order: indices of all held-out volumes, in the order in which they are used if not all are.
        requests: of the generated volumes: the covariates of held-out volumes in this order, repeated if there are fewer.
        subjects, people: covariates of each held-out volume, and its person.
        synthetic: whether each held-out volume is itself known to be synthetic (phantoms, rendered brains); empty: none is.
        scores: of each volume, to be compared between groups of people.
        realism_gaps: gaps between groups in the metrics of `realism`, not yet corrected for their number.
        gaps: all gaps between groups, from `analyse_subgroups`.
        measured: covariate -> "real", "reconstructed" and "generated" -> what was measured on each volume, NaN for nothing.
        training, training_people: covariates of each training volume, and its person; None if they are not available.
        outside: requests outside of the training data; `joint`: whether combinations of values were checked.
        features: "real" (held-out), "reconstructed" and "generated" -> (N, D), if features were computed.
        realism: metrics of the generated volumes beside the held-out ones.
        realism_of_reconstructions: the same of the held-out volumes after the autoencoder, without metrics of pairs.
        anatomy: what a segmentation says of them; None without a segmenter.
        discriminability: what a classifier says of generated and reconstructed volumes; None if it was not trained.
        predicted: covariates that were predicted by regression, and the number of training volumes; None: none.
        categories: how often the requested category was recognised.
        utility: of each covariate; None if it was not assessed.
        segmentation: downstream utility of a model that draws scans of label maps; None if it was not assessed.
        truth: how near volumes come to each subject's own, of a model that takes images; None of others.
        likelihood: a row for each scored volume, see `ldm3d.evaluation.likelihood.score`; None if it was not assessed.
    """

    psnr_db: NDArray
    ssim: NDArray
    psnr_foreground_db: NDArray
    ssim_foreground: NDArray
    comparisons: list[Comparison] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    real: list[NDArray] = field(default_factory=list)
    reconstructed: list[NDArray] = field(default_factory=list)
    generated: list[NDArray] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    requests: list[dict[str, Value]] = field(default_factory=list)
    subjects: list[dict[str, Value]] = field(default_factory=list)
    people: list[Hashable] = field(default_factory=list)
    synthetic: list[bool] = field(default_factory=list)
    scores: list[VolumeScores] = field(default_factory=list)
    realism_gaps: list[Gap] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    measured: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    training: list[dict[str, Value]] | None = None
    training_people: list[Hashable] | None = None
    outside: list[OutsideTraining] = field(default_factory=list)
    joint: bool = False
    features: dict[str, NDArray] = field(default_factory=dict)
    realism: list[Finding] = field(default_factory=list)
    realism_of_reconstructions: list[Finding] = field(default_factory=list)
    anatomy: Anatomy | None = None
    discriminability: Discriminability | None = None
    predicted: tuple[list[str], int] | None = None
    categories: list[Hits] = field(default_factory=list)
    utility: list[Utility] | None = None
    segmentation: SegmentationUtility | None = None
    truth: Truth | None = None
    likelihood: pd.DataFrame | None = None

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON values."""
        found = {
            "reconstruction": {"volumes": len(self.psnr_db), **{name: self.quality(name) for name in QUALITIES}},
            "held_out": {"order": self.order, "generated_for": self.sources},
            "fidelity": [c.to_dict() for c in self.comparisons],
            "fairness": [gap.to_dict() for gap in self.gaps],
            "beyond_training": [each.to_dict() for each in self.outside],
            "sweeps": [each.to_dict() for each in self.sweeps],
            "likeness": [_named(finding) for finding in self.realism],
            "likeness_of_reconstructions": [_named(finding) for finding in self.realism_of_reconstructions],
        }
        if self.anatomy:
            found["anatomy"] = self.anatomy.to_dict()
        if self.discriminability:
            found["discriminability"] = self.discriminability.to_dict()
        if self.truth:
            found["truth"] = self.truth.to_dict()
        if self.predicted:
            found["predicted"] = dict(zip(("covariates", "training_volumes"), self.predicted))
        if self.categories:
            found["categories"] = [each.to_dict() for each in self.categories]
        if self.utility is not None:
            found["downstream"] = [each.to_dict() for each in self.utility]
        if self.segmentation:
            found["downstream_segmentation"] = self.segmentation.to_dict()
        if self.likelihood is not None:
            found["likelihood"] = {"volumes": len(self.likelihood), "times": self.likelihood.attrs["times"]} | {
                name: {"mean": float(self.likelihood[name].mean()), "interval": self.likelihood_interval(name)}
                for name in COLUMNS
            }
        return found

    def quality(self, name: str) -> dict[str, float]:
        """Mean of one of `QUALITIES` with its 95% interval, and its standard deviation."""
        values = getattr(self, name)
        low, high = mean_interval(values, self.people or None)
        return {"mean": float(values.mean()), "low": low, "high": high, "std": float(values.std())}

    def likelihood_interval(self, name: str) -> tuple[float, float]:
        """95% interval of the mean of a column of `likelihood`."""
        return mean_interval(self.likelihood[name].to_numpy(), [self.people[i] for i in self.order[: len(self.likelihood)]])

    def is_synthetic(self, i: int) -> bool:
        """Whether a held-out volume is itself known to be synthetic."""
        return bool(self.synthetic) and self.synthetic[i]

    def has_training_of(self, account: Mapping[str, Any] | None) -> bool:
        """Whether `training` is that of the whole training, as its account (`ldm3d.account`) counts scans, and not a part."""
        own = len(self.training or ())
        return own > 0 and (account is None or own >= account["data"]["scans"].get(TRAIN, 0))

    @property
    def sources(self) -> list[int]:
        """Index of the held-out volume whose covariates were requested of each generated one."""
        return [self.order[i % len(self.order)] for i in range(len(self.requests))]

    @property
    def requested_people(self) -> list[Hashable]:
        """The person whose covariates were requested of each generated volume."""
        return [self.people[i] for i in self.sources]

    def analyse_subgroups(self, schema: CovariateSchema) -> None:
        """Find `gaps`."""
        self.gaps = subgroups.gaps(schema, subgroups.groupings(schema, self.subjects), self.scores, self.realism_gaps)

    def find(self, covariate: str, kind: str) -> Comparison | None:
        return next((c for c in self.comparisons if (c.covariate, c.kind) == (covariate, kind)), None)


def _named(finding: Finding) -> dict[str, Any]:
    """A finding of realism, with the title of its metric."""
    return {**finding.to_dict(), "title": REALISM_METRICS[finding.name].title}
