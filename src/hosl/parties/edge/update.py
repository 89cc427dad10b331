"""Updates of weights in numpy: along random directions with torch's bits, and by gradients.

The directions and the order of their sums: `hosl.core.directions`, as `parties.engine.perturbation.descend_` has them.
So base weights and a journal give the same half in every runtime.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hosl.core.directions import Distribution, direction_sum, forget_tables


def descend_(
    trained: Mapping[str, np.ndarray],
    seeds: Sequence[int],
    scales: Sequence[float],
    distribution: Distribution,
) -> None:
    """theta -= sum_q scale_q u(seed_q), in place, tile by tile; no buffer of the weights' size. float32.

    Source: Alg. 1, line 8.
    """
    for name, weight in trained.items():
        flat = weight.reshape(-1)
        assert flat.base is not None, f"{name} is not contiguous: its update would be lost"
        for start, stop, total in direction_sum(
            name, weight.shape, seeds, scales, distribution, weight.dtype.type
        ):
            flat[start:stop] -= total
    forget_tables()


def descend_gradient_(weight: np.ndarray, gradient: np.ndarray, rate: float) -> None:
    """W -= rate * gradient, in place; `gradient` is overwritten."""
    gradient *= np.float32(rate)
    weight -= gradient.reshape(weight.shape)
