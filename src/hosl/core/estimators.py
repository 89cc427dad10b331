"""Coefficients from losses and projections: the factors of u in the client's update. Scalars only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hosl.core.array_types import Float
from hosl.errors import NonFiniteError

LARGEST_NUMBER = 1e18
"""The scale or gradient above which weights are ruined for certain: squares of larger ones are beyond float32."""
MOST_DIRECTIONS = 4096
"""The directions of one update, of one client or of a round: each costs a pass over the trained weights of all devices
that apply it; a client draws 16 by default."""


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A directional derivative as a client computes it from dL/dh."""

    rows: Float[np.ndarray, " rows"]
    """The contribution of each row of the batch, in nats, float64; their sum is c, since dL/dh is of the mean loss."""
    noise: float
    """Rounding floor of the sum: the error that rounding each activation once makes."""


def central_difference(loss_plus: float, loss_minus: float, epsilon: float) -> float:
    """Directional derivative of the loss along u: (L+ - L-) / (2 epsilon).

    Source: Alg. 1, line 5 (arXiv 2601.10940, Def. 3). Error: O(epsilon^2) where L is smooth, plus rounding
    of about 6e-8 L / epsilon in fp32 (4e-4 at L = 6, epsilon = 1e-3).

    Raises:
        NonFiniteError: if either loss is NaN or infinite.
    """
    if not (math.isfinite(loss_plus) and math.isfinite(loss_minus)):
        raise NonFiniteError(
            f"a probe's losses must be finite, got L+ = {loss_plus}, L- = {loss_minus}; lower the learning rates "
            "or epsilon, and look for extreme values in the data"
        )
    return difference_quotient(loss_plus, loss_minus, epsilon)


def difference_quotient(loss_plus: float, loss_minus: float, epsilon: float) -> float:
    """(L+ - L-) / (2 epsilon), whatever the losses; where one is NaN or infinite, `clipping` rejects the result."""
    return (loss_plus - loss_minus) / (2 * epsilon)


def loss_noise(losses: Sequence[float], epsilon: float) -> float:
    """Rounding floor of (L+ - L-) / (2 epsilon): 2^-24 |L| / epsilon, for losses in float32.

    Two losses, each off by up to half a unit in its last place, 2^-24 |L|. Rounding inside the halves comes on top.
    |L| is the mean over the losses that are finite; the result is 0 where none is.
    """
    finite = [abs(loss) for loss in losses if math.isfinite(loss)]
    return 2.0**-24 * sum(finite) / max(len(finite), 1) / epsilon


def mean_scales(coefficients: Sequence[float], learning_rate: float) -> tuple[float, ...]:
    """eta c_q / Q for each direction, rounded to float32: the scale of u_q in the update and in the journal.

    Source: Alg. 1, line 8. Rounding here, once, makes the journal's 4-byte entry exact.

    Raises:
        NonFiniteError: if a scale is NaN or beyond `LARGEST_NUMBER`.
    """
    eta_over_q = learning_rate / max(len(coefficients), 1)
    scales = [eta_over_q * c_q for c_q in coefficients]
    if not all(abs(scale) < LARGEST_NUMBER for scale in scales):
        raise NonFiniteError(
            f"an update would move the weights by {max(map(abs, scales)):.0e} times a direction; nothing was updated: "
            "lower the learning rates, and look for extreme values in the data"
        )
    return tuple(float(np.float32(scale)) for scale in scales)
