"""An interval for any smooth figure of values over seeds."""

from collections.abc import Callable

import numpy as np

from hosl.report.statistics import t_quantile


def jackknife_interval(figure: Callable[[np.ndarray], float], values: np.ndarray) -> tuple[float, float]:
    """figure(values) -+ t se, se from the figure with each seed left out in turn; 95 %, NaN for one seed.

    `values` has a seed per row. For figures that are smooth in the mean over seeds, such as its logarithm's slope.
    Source: Tukey 1958.
    """
    seeds = len(values)
    if seeds < 2:
        return float("nan"), float("nan")
    whole = figure(values)
    left_out = np.array([figure(np.delete(values, seed, axis=0)) for seed in range(seeds)])
    variance = (seeds - 1) / seeds * float(((left_out - left_out.mean()) ** 2).sum())
    half = t_quantile(seeds - 1) * variance**0.5
    return whole - half, whole + half
