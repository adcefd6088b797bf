"""How one covariate follows from others among people: what becomes of a person's ventricles if the person is older.

A person keeps the place among people alike, as in a structural causal model (Pawlowski et al. 2020: abduction, action,
prediction): who has large ventricles for 60 years has large ones for 70. Mean and spread both depend on the others, for
the spread of ventricles grows with age, and so large ones grow faster than small ones.

Legend: y a covariate (N,); x (N, q) what it follows from, as numbers, standardised; y ~ N(a'(1, x), exp(b'(1, x))).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm3d.errors import InputError

PEOPLE = 10  # at least, for each number that is fitted to them: with fewer than for all, the spread is the same for all x
ROUNDS = 50
LARGEST = 1.0  # step of a log variance in a round


@dataclass(frozen=True)
class Following:
    """The law of y given x.

    Attributes:
        mean: a, (1 + q,).
        log_variance: b, (1 + q,).
        usual: (q,), mean of x over people, which stands where one of them is not known.
    """

    mean: tuple[float, ...]
    log_variance: tuple[float, ...]
    usual: tuple[float, ...]

    # For the check of a file's values by pydantic in `ldm3d.covariates`
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 (no field)

    @classmethod
    def fit(cls, x: NDArray, y: NDArray) -> "Following":
        """By maximum likelihood (Harvey 1976): weighted least squares and Fisher scoring in turn.

        Fewer than 20 (1 + q) people say too little of how the spread depends on x, which then does not.

        Raises:
            InputError: fewer than 10 (1 + q) people.
        """
        count, q = x.shape
        if count < (least := PEOPLE * (1 + q)):
            raise InputError(f"{count} people with all values are too few; at least {least} are needed")
        design = np.column_stack([np.ones(count), x])
        mean = np.linalg.lstsq(design, y, rcond=None)[0]
        smallest = 1e-6 * y.var()
        log_variance = np.zeros(1 + q)
        log_variance[0] = np.log(np.square(y - design @ mean).mean() + smallest)
        for _ in range(ROUNDS if count >= 2 * least else 0):
            variance = np.exp(design @ log_variance) + smallest
            mean = np.linalg.solve(design.T @ (design / variance[:, None]), design.T @ (y / variance))
            step = np.linalg.lstsq(design, np.square(y - design @ mean) / variance - 1, rcond=None)[0]
            log_variance += step * min(1.0, LARGEST / (np.abs(step).max() + 1e-12))
            if np.abs(step).max() < 1e-6:
                break
        return cls(*(tuple(float(v) for v in each) for each in (mean, log_variance, x.mean(axis=0))))

    def moved(self, y: float, before: Sequence[float | None], after: Sequence[float | None]) -> float:
        """y of the same person where x is another: as many standard deviations from the mean as it was.

        Args:
            y: now.
            before, after: x, (q,); None where it is not known.
        """
        one, other = (self._row(x) for x in (before, after))
        mean, log_variance = np.array(self.mean), np.array(self.log_variance)
        return float(other @ mean + (y - one @ mean) * np.exp((other - one) @ log_variance / 2))

    def _row(self, x: Sequence[float | None]) -> NDArray:
        return np.array([1.0, *(usual if value is None else value for value, usual in zip(x, self.usual))])
