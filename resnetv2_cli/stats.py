"""Statistics of the runs of one row, and of its differences from another row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median, stdev

CONFIDENCE = 0.95
POWER = 0.8  # chance of detecting a difference that exists, with ``seeds_needed`` seeds
MOST_SEEDS = 10_000
SAME = 1e-9  # points; differences that are closer differ only by rounding


def quantile(degrees: int) -> float:
    """Student's t that CONFIDENCE of all draws are below in absolute value."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, degrees))


@dataclass(frozen=True)
class Summary:
    """Errors of the seeds of one row, in percent; infinity is a run that diverged.

    If a run diverged, only the median exists; ``std`` (with n - 1) and ``interval`` need two runs.
    """

    errors: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.errors)

    @property
    def diverged(self) -> int:
        return sum(math.isinf(e) for e in self.errors)

    @property
    def median(self) -> float | None:
        return median(self.errors) if self.errors else None

    @property
    def mean(self) -> float | None:
        return mean(self.errors) if self.errors and not self.diverged else None

    @property
    def std(self) -> float | None:
        return stdev(self.errors) if self.n > 1 and not self.diverged else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean over seeds (Student's t)."""
        if self.mean is None or self.std is None:
            return None
        half = quantile(self.n - 1) * self.std / math.sqrt(self.n)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Pairs:
    """Differences of two rows, seed by seed, in points of percent: this one minus the baseline.

    A seed gives both rows the same order of images and the same crops, so part of the noise is
    common to both and cancels in the difference. If seeds ``diverged`` in either row, there are no
    statistics: those of the remaining seeds would flatter the row that lost some.
    """

    differences: tuple[float, ...]
    diverged: int = 0

    @classmethod
    def of(cls, ours: Mapping[int, float], baseline: Mapping[int, float]) -> "Pairs":
        """From the seeds that both rows have: finite differences, and the number of others."""
        both = [ours[seed] - baseline[seed] for seed in sorted(set(ours) & set(baseline))]
        finite = tuple(difference for difference in both if math.isfinite(difference))
        return cls(finite, len(both) - len(finite))

    @property
    def n(self) -> int:
        """The number of seeds that the mean and the test use."""
        return len(self.differences)

    @property
    def mean(self) -> float | None:
        return mean(self.differences) if self.differences and not self.diverged else None

    @property
    def std(self) -> float | None:
        """Also None if all are equal, as with few seeds and images: the true spread is not 0."""
        if self.mean is None or max(self.differences) - min(self.differences) < SAME:
            return None
        return stdev(self.differences)

    @property
    def p(self) -> float | None:
        """Two-sided p of the paired t-test: probability of such a difference by seeds alone."""
        if self.mean is None or self.std is None:
            return None
        from scipy.stats import t

        return float(2 * t.sf(abs(self.mean) * math.sqrt(self.n) / self.std, self.n - 1))


def seeds_needed(std: float, difference: float) -> int | None:
    """The least number of seeds with which a paired test detects a true difference 8 times in 10.

    ``std``: of the differences between the rows, seed by seed, in points; ``difference``: the one
    to be detected, in points. None if even MOST_SEEDS are too few.
    """

    def enough(n: int) -> bool:
        return power(n, std, difference) >= POWER

    low, high = 1, 2
    while not enough(high):
        if high == MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def power(n: int, std: float, difference: float) -> float:
    """Chance that a paired t-test over n seeds calls a true difference significant."""
    from scipy.stats import ncf

    # By the square of t, an F: SciPy's noncentral t works up to shifts of 8, its F to some 1e7.
    bound, shift = quantile(n - 1), difference * math.sqrt(n) / std
    chance = float(ncf.sf(bound**2, 1, n - 1, shift**2))
    return chance if math.isfinite(chance) else 1.0
