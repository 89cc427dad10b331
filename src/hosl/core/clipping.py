"""Coefficient control: a step's measured coefficients are rejected, clipped, normalised. Scalars only.

Pure: `judge` decides about one step, `after` is the control of the next one. The only state is the magnitudes of the
last coefficients, for their running median; a checkpoint keeps it (`state`, `restored`). Source: methods.md (k). When
to use which setting: docs/concepts/step-control.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, stdev
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from hosl.core.array_types import Float
from hosl.errors import NonFiniteError

Normalise: TypeAlias = Literal["none", "spread"]
"""spread: coefficients are divided by their standard deviation over the step's directions (FZOO, arXiv 2506.09034)."""

WINDOW = 100
"""The number of accepted coefficients in the running median."""

WARM_UP = 10
"""The number of accepted coefficients that are needed before anything is clipped."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Judged:
    """A step's probes after coefficient control."""

    accepted: tuple[int, ...]
    """The indices q of the directions that contribute."""
    measured: tuple[float, ...]
    """c_q of the accepted directions, as measured."""
    coefficients: tuple[float, ...]
    """The numbers that the update uses in place of c_q."""
    rejected: int
    """The number of directions that contribute nothing because their c_q is NaN or infinite."""

    def of(self, seeds: Sequence[_T]) -> list[_T]:
        """The elements of `seeds` whose directions were accepted."""
        return [seeds[q] for q in self.accepted]


@dataclass(frozen=True, slots=True)
class CoefficientControl:
    """The treatment of a step's coefficients. By default only NaN and Inf are rejected."""

    clip: float | None = None
    """|c_q| is limited to this multiple of the running median of |c|; None: no limit."""
    row_clip: float | None = None
    """A row's part of a projection is limited to this multiple of the median over its batch; None: no limit."""
    normalise: Normalise = "none"
    recent: tuple[float, ...] = ()
    """|c| of the last accepted coefficients, as measured, oldest first; at most `WINDOW`."""

    def judge(self, measured: Sequence[float]) -> Judged:
        """Treat the c_q of one step: NaN and Inf are rejected, the others clipped, then normalised.

        Raises:
            NonFiniteError: if every direction is rejected.
        """
        accepted = tuple(q for q, c_q in enumerate(measured) if math.isfinite(c_q))
        if not accepted:
            raise NonFiniteError(
                f"all {len(measured)} probes of a step were rejected: losses and projections must be finite, got "
                f"coefficients {list(measured)}; lower the learning rates or zo.epsilon, and look for extreme values "
                "in the data"
            )
        kept = tuple(measured[q] for q in accepted)
        used = clipped(kept, self.limit)
        if self.normalise == "spread":
            used = over_spread(used)
        return Judged(accepted, kept, used, len(measured) - len(accepted))

    def total(self, rows: Float[np.ndarray, " rows"]) -> float:
        """c_q, the sum of the contributions of the batch's rows, each limited where `row_clip` is set.

        NaN where a row is NaN or infinite: the direction is then rejected.
        """
        if not np.isfinite(rows).all():
            return math.nan
        limit = None if self.row_clip is None else self.row_clip * float(np.median(np.abs(rows)))
        return math.fsum(clipped(rows.tolist(), limit))

    @property
    def limit(self) -> float | None:
        """The largest |c_q| of the next step; None: no limit, or not yet."""
        if self.clip is None or len(self.recent) < WARM_UP:
            return None
        return self.clip * median(self.recent)

    def after(self, measured: Sequence[float]) -> "CoefficientControl":
        """The control of the next step, once these coefficients have been applied."""
        if self.clip is None:
            return self
        return replace(self, recent=(*self.recent, *(abs(c_q) for c_q in measured))[-WINDOW:])

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint; empty where nothing is clipped."""
        return {} if self.clip is None else {"recent_coefficients": list(self.recent)}

    def restored(self, state: Mapping[str, Any]) -> "CoefficientControl":
        """This control with the state of a checkpoint; an empty state starts anew."""
        return replace(self, recent=tuple(state.get("recent_coefficients", ())))


PLAIN = CoefficientControl()
"""The control that rejects NaN and Inf and changes nothing else."""


def clipped(coefficients: Sequence[float], limit: float | None) -> tuple[float, ...]:
    """The coefficients with their magnitudes limited; signs stay."""
    if limit is None:
        return tuple(coefficients)
    return tuple(max(-limit, min(limit, c_q)) for c_q in coefficients)


def over_spread(coefficients: Sequence[float]) -> tuple[float, ...]:
    """c_q / s with s^2 = sum_q (c_q - mean c)^2 / (Q - 1): the step of FZOO, in which the scale of the loss cancels.

    Source: arXiv 2506.09034, Alg. 1; there s is the spread of the losses, ours of the difference quotients: epsilon
    cancels. Fewer than two coefficients, or equal ones, have no spread: zeros, the client stays where it is.
    """
    spread = stdev(coefficients) if len(coefficients) > 1 else 0.0
    if not spread > 0:
        return tuple(0.0 for _ in coefficients)
    return tuple(c_q / spread for c_q in coefficients)
