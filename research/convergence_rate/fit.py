"""Exponents of a rate study: log-log slopes with intervals over seeds. Pure functions of records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from hosl.report.statistics import Estimate
from research.convergence_rate.config import THEORY, AxisName, RateProblem, axes
from research.convergence_rate.jackknife import jackknife_interval

Line: TypeAlias = Mapping[str, Any]
"""What one cell came to; see `study`."""


class Slope(Estimate):
    """An exponent."""

    def __str__(self) -> str:
        interval = "one seed" if math.isnan(self.low) else f"{self.low:+.2f}, {self.high:+.2f}"
        return f"{self.value:+.2f} [{interval}]".replace("-0.00", "+0.00")


@dataclass(frozen=True)
class Axis:
    """One axis of one problem, measured."""

    problem: str
    name: AxisName
    x: np.ndarray
    """T, Q or d_c [points]."""
    values: np.ndarray
    """Average squared gradient norm [seeds, points]; NaN where a cell diverged."""
    of_client: np.ndarray
    """The client's part of it."""
    transient: np.ndarray
    """(f_0 - f_T) / (eta T), as share of it: near 1, the descent from the start is all that is seen."""
    middle: int
    """Which point all axes share."""

    @property
    def finite(self) -> np.ndarray:
        """Which points have a value for every seed [points]."""
        return np.all(np.isfinite(self.values), axis=0, keepdims=True)[0]

    @property
    def theory(self) -> float:
        """The predicted exponent."""
        return THEORY[self.name]

    def slope(self, values: np.ndarray | None = None) -> Slope | None:
        """Of all points with a value for every seed; None where fewer than two have one."""
        kept = self.finite
        values = self.values if values is None else values
        return fit_slope(self.x[kept], values[:, kept]) if kept.sum() > 1 else None


def fit_slope(x: np.ndarray, values: np.ndarray) -> Slope:
    """b of log(mean over seeds) = a + b log x by least squares; its interval leaves out whole seeds in turn.

    Args:
        x: [points], positive.
        values: [seeds, points], positive; a row is one seed, whose cells share start and mini-batches.
    """
    centred = np.log(np.asarray(x, float))
    centred -= centred.mean()
    weights = centred / (centred @ centred)

    def slope(of_seeds: np.ndarray) -> float:
        return float(np.log(of_seeds.mean(0)) @ weights)

    return Slope(slope(values), *jackknife_interval(slope, values))


def two_terms(lines: Sequence[Line]) -> tuple[float, float, float]:
    """a and b of the bound's own two terms, a / (eta T) + b eta (1 + (d_c + 1) / Q), and the largest relative error.

    Fitted to the means over seeds of all points at once, least squares of relative errors; cells that diverged are left
    out. a is 2 (f_0 - f*) in the bound, b is L sigma^2. Source: paper.md section 5, steps 2 and 3.
    """
    by_point: dict[tuple[float, ...], list[float]] = {}
    for line in lines:
        if line["mean_square"] is not None:
            point = (line["steps"], line["directions"], line["client_size"], line["learning_rate"])
            by_point.setdefault(point, []).append(line["mean_square"])
    steps, directions, client_size, eta = np.array(list(by_point), float).T
    values = np.array([np.mean(of_seeds) for of_seeds in by_point.values()])
    terms = np.stack([1 / (eta * steps), eta * (1 + (client_size + 1) / directions)], axis=1)
    (a, b), *_ = np.linalg.lstsq(terms / values[:, None], np.ones(len(values)), rcond=None)
    return float(a), float(b), float(np.abs(terms @ (a, b) / values - 1).max())


def measured_axes(name: str, problem: RateProblem, lines: Sequence[Line]) -> list[Axis]:
    """The axes of a problem out of the lines of its grid, at the chosen c."""
    by_place = {(line["steps"], line["directions"], line["cut"], line["seed"]): line for line in lines}
    middle = (problem.middle.steps, problem.middle.directions, problem.middle.cut)
    found = []
    for axis, points in axes(problem).items():
        rows = [[by_place[(*point, seed)] for point in points] for seed in problem.seeds]
        key = {"T": "steps", "d_c": "client_size"}.get(axis, "directions")

        def of(value: str, rows: list[list[Line]] = rows) -> np.ndarray:
            return np.array(
                [[np.nan if line[value] is None else line[value] for line in row] for row in rows]
            )

        values = of("mean_square")
        transient = (of("loss_start") - of("loss_end")) / (of("learning_rate") * of("steps")) / values
        found.append(
            Axis(
                name, axis, np.array([line[key] for line in rows[0]], float), values, of("client_mean_square"),
                transient, points.index(middle),
            )
        )  # fmt: skip
    return found
