"""What is said of numbers over seeds: mean, spread, interval, paired test, gap closure. Pure functions of numpy arrays.

Every argument is one number per seed, in the order of the seeds; two of them are paired by that order.
"""

from dataclasses import dataclass

import numpy as np

_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Student's t at 0.975 for 1 to 30 degrees of freedom: numpy has no quantiles, scipy is no dependency."""
_EXACT_SEEDS = 16
"""Up to so many seeds all 2^n sign patterns are counted; beyond, as many are drawn."""
_DRAWS = 10_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % bootstrap interval over seeds."""

    value: float
    low: float
    high: float


class GapClosure(Estimate):
    """G."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]".replace("-0.00", "0.00")


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


def paired_p(values: np.ndarray, others: np.ndarray) -> float:
    """Two-sided p of the sign-flip permutation test: the share of sign patterns with a mean at least as far from 0.

    Under the null a seed's difference is as likely to be its negative. Exact up to 16 seeds, and never under 2 / 2^n:
    0.25 for three seeds, 0.0625 for five.
    """
    differences = np.asarray(values, float) - np.asarray(others, float)
    seeds = len(differences)
    if seeds <= _EXACT_SEEDS:
        patterns = np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1
    else:
        patterns = np.random.Generator(np.random.Philox(0)).integers(0, 2, (2**_EXACT_SEEDS, seeds))
    means = np.abs((1 - 2 * patterns) @ differences)
    # the pattern that was seen must count as itself, whatever the order of the sum has rounded
    return float(np.mean(means >= abs(differences.sum()) * (1 - 1e-9)))


def resampled_seeds(seeds: int) -> np.ndarray:
    """[draws, seeds]: whole seeds, drawn with replacement, for a bootstrap; always the same."""
    return np.random.Generator(np.random.Philox(0)).integers(0, seeds, (_DRAWS, seeds))


def gap_closure(method: np.ndarray, frozen: np.ndarray, first_order: np.ndarray) -> GapClosure | None:
    """G = mean(method - frozen) / mean(first_order - frozen), a ratio of means; None: the gap is not resolved.

    That is when it is under two standard errors, or there is one seed. The interval resamples whole seeds, paired.
    Source: methods.md section 2.
    """
    frozen = np.asarray(frozen, float)
    of_gap, of_method = np.asarray(first_order, float) - frozen, np.asarray(method, float) - frozen
    seeds = len(of_gap)
    if seeds < 2 or not abs(of_gap.mean()) >= 2 * of_gap.std(ddof=1) / seeds**0.5 or not of_gap.mean():
        return None
    drawn = resampled_seeds(seeds)
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may hold only seeds without a gap
        ratios = of_method[drawn].mean(1) / of_gap[drawn].mean(1)
    low, high = np.quantile(ratios[np.isfinite(ratios)], (0.025, 0.975))
    return GapClosure(float(of_method.mean() / of_gap.mean()) + 0.0, float(low), float(high))
