"""What is said of numbers over seeds: mean, spread, interval, paired test, gap closure. Pure functions of numpy arrays.

Every argument is one number per seed, in the order of the seeds; two of them are paired by that order.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Student's t at 0.975 for 1 to 30 degrees of freedom: numpy has no quantiles, scipy is no dependency."""
_EXACT_SEEDS = 16
"""Up to so many seeds all 2^n sign patterns are counted; beyond, as many are drawn."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval over seeds."""

    value: float
    low: float
    high: float


class GapClosure(Estimate):
    """G."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-0.00", "0.00")


class NoGap(StrEnum):
    """Why there is no G; how tables say it."""

    ONE_SEED = "n/a (one seed)"
    UNRESOLVED = "n/a (gap not resolved)"
    """Under two standard errors."""
    REVERSED = "n/a (first-order is not better)"
    """Resolved, and the first-order client is the worse one: a G near 1 would be no praise."""


def spread(values: np.ndarray) -> tuple[float, float]:
    """(mean, standard deviation with n - 1); the latter is NaN for one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """mean -+ t sd / sqrt(n), the 95 % interval of the mean. Requires: seeds about normal. NaN for one seed."""
    mean, sd = spread(values)
    half = t_quantile(len(values) - 1) * sd / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """Student's t at 0.975; beyond 30 degrees by the first two terms in 1/degrees, within 3e-4."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def p_floor(seeds: int) -> float:
    """The least that `paired_p` can be with so many seeds."""
    return 2 / 2**seeds if seeds <= _EXACT_SEEDS else 1 / (2**_EXACT_SEEDS + 1)


def paired_p(values: np.ndarray, others: np.ndarray) -> float:
    """Two-sided p of the sign-flip permutation test: the share of sign patterns with a mean at least as far from 0.

    Under the null a seed's difference is as likely to be its negative. Exact up to 16 seeds, and never under 2 / 2^n:
    0.25 for three seeds, 0.0625 for five. Beyond, 2^16 patterns are drawn; the one that was seen is one more.
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
