"""Statistics over seeds: mean, spread, interval, paired test, gap closure. Pure functions of numpy arrays.

Every argument is one number per seed, in the order of the seeds; two of them are paired by that order. Gap closure G is
the share of the performance gap recovered: 0 for a client that is left frozen, 1 for one trained by backpropagation.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

_EXACT_SEEDS = 16
"""Up to so many seeds all 2^n sign patterns are counted; beyond, as many are drawn."""


@dataclass(frozen=True)
class Estimate:
    """Figure with its 95 % interval over seeds."""

    value: float
    low: float
    high: float


class GapClosure(Estimate):
    """G: the share of the performance gap recovered."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-0.00", "0.00")


class NoGap(StrEnum):
    """Reason for which there is no gap closure, or no p; tables print it."""

    UNFINISHED = "n/a (not finished)"
    ONE_SEED = "n/a (one seed)"
    FEW_SHARED = "n/a (under two seeds in common)"
    NO_FROZEN = "n/a (no frozen row)"
    NO_FIRST_ORDER = "n/a (no first-order row)"
    FROZEN_DIVERGED = "n/a (frozen diverged)"
    FIRST_ORDER_DIVERGED = "n/a (first-order diverged)"
    OTHER_WORK = "n/a (other steps, batches or task)"
    FIRST_ORDER_OTHER_WORK = "n/a (first-order: other steps, batches or task)"
    UNRESOLVED = "n/a (gap not resolved)"
    """Under two standard errors."""
    REVERSED = "n/a (first-order is not better)"
    """Resolved, and the first-order client is the worse one: a G near 1 would be no praise."""


def spread(values: np.ndarray) -> tuple[float, float]:
    """(mean, standard deviation with n - 1); the latter is NaN for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def spread_text(values: np.ndarray, digits: int) -> str:
    """Mean ± standard deviation; of one seed its number, of none `-`."""
    if not len(values):
        return "-"
    mean, sd = spread(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """mean -+ t sd / sqrt(n), the 95 % interval of the mean. Requires: seeds about normal. NaN for one seed."""
    mean, sd = spread(values)
    half = t_quantile(len(values) - 1) * sd / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """Student's t at 0.975 for a whole number of degrees of freedom, from the distribution's finite sums.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4. Not scipy's: where scipy is installed, transformers loads it into
    every client process (docs/adr/0012-one-comparison.md).
    """
    low, high = 0.0, math.pi / 2  # of theta, t = sqrt(degrees) tan theta
    for _ in range(64):
        theta = (low + high) / 2
        low, high = (theta, high) if _within(theta, degrees) < 0.95 else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """The probability that |t| is at most sqrt(degrees) tan theta."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def p_floor(seeds: int) -> float:
    """The least that `paired_p` can be with so many seeds."""
    return 2 / 2**seeds if seeds <= _EXACT_SEEDS else 1 / (2**_EXACT_SEEDS + 1)


def paired_p(values: np.ndarray, others: np.ndarray) -> float:
    """Two-sided p of the sign-flip permutation test: the share of sign patterns with a mean at least as far from 0.

    Under the null a seed's difference is as likely to be its negative. Exact up to 16 seeds, and never under 2 / 2^n:
    0.25 for three seeds, 0.0625 for five. Beyond, 2^16 patterns are drawn; the one that was seen is one more.
    scipy.stats.permutation_test takes rounding for distance where accuracies tie (docs/adr/0012-one-comparison.md).
    """
    differences = np.asarray(values, float) - np.asarray(others, float)
    seeds = len(differences)
    if seeds <= _EXACT_SEEDS:
        patterns = np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1
    else:
        patterns = np.random.Generator(np.random.Philox(0)).integers(0, 2, (2**_EXACT_SEEDS, seeds))
    means = np.abs((1 - 2 * patterns) @ differences)
    # the pattern that was seen must count as itself, whatever the order of the sum has rounded
    as_far = means >= abs(differences.sum()) * (1 - 1e-9)
    if seeds <= _EXACT_SEEDS:
        return float(np.mean(as_far))
    return float((as_far.sum() + 1) / (len(as_far) + 1))


def gap_closure(
    method: np.ndarray, frozen: np.ndarray, first_order: np.ndarray, *, lower_is_better: bool
) -> GapClosure | NoGap:
    """G = mean(method - frozen) / mean(first_order - frozen), a ratio of means; or why there is none.

    The interval is G -+ t sd(r) / sqrt(n) / |mean gap|, r the seeds' residuals (method - frozen) - G (first_order -
    frozen): the delta method with Student's t. Requires: seeds about normal. Source: docs/adr/0010-intervals.md.
    """
    frozen = np.asarray(frozen, float)
    of_gap, of_method = np.asarray(first_order, float) - frozen, np.asarray(method, float) - frozen
    gap, seeds = float(of_gap.mean()), len(of_gap)
    if seeds < 2:
        return NoGap.ONE_SEED
    if not abs(gap) >= 2 * of_gap.std(ddof=1) / seeds**0.5 or not gap:
        return NoGap.UNRESOLVED
    if (gap < 0) != lower_is_better:
        return NoGap.REVERSED
    value = float(of_method.mean()) / gap + 0.0
    residuals = of_method - value * of_gap
    half = t_quantile(seeds - 1) * float(residuals.std(ddof=1)) / seeds**0.5 / abs(gap)
    return GapClosure(value, value - half, value + half)
