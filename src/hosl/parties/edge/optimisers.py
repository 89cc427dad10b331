"""SGD and AdamW in numpy: torch's formulas, and its names of their state, so that checkpoints fit either runtime."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from hosl.core.estimators import LARGEST_NUMBER
from hosl.errors import NonFiniteError
from hosl.parties.engine.optimisers import OptimiserSpec

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Those of torch's AdamW."""


class EdgeOptimiser:
    """The optimiser of a client's trained weights; its state is made when a weight first moves."""

    def __init__(self, spec: OptimiserSpec) -> None:
        self.spec = spec
        self.state: dict[str, dict[str, np.ndarray]] = {}
        """By parameter, the entries of its state as torch names them."""

    def step_(
        self, weights: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray], rate: float
    ) -> None:
        """One update of the weights that have gradients, in place. The gradients are overwritten.

        Raises:
            NonFiniteError: see `check_gradients`; no weight is changed then.
        """
        check_gradients(gradients.values())
        move_ = self._adamw_ if self.spec.name == "adamw" else self._sgd_
        for name, gradient in gradients.items():
            move_(name, weights[name], gradient.reshape(weights[name].shape), rate)

    def _sgd_(self, name: str, weight: np.ndarray, gradient: np.ndarray, rate: float) -> None:
        if self.spec.weight_decay:
            gradient += np.float32(self.spec.weight_decay) * weight
        if self.spec.momentum:
            state = self.state.setdefault(name, {})
            if "momentum_buffer" in state:
                state["momentum_buffer"] *= np.float32(self.spec.momentum)
                state["momentum_buffer"] += gradient
            else:
                state["momentum_buffer"] = gradient.copy()
            gradient = state["momentum_buffer"]
        weight -= np.float32(rate) * gradient

    def _adamw_(self, name: str, weight: np.ndarray, gradient: np.ndarray, rate: float) -> None:
        if name not in self.state:
            self.state[name] = {
                "step": np.zeros((), np.float32),
                "exp_avg": np.zeros_like(weight),
                "exp_avg_sq": np.zeros_like(weight),
            }
        state = self.state[name]
        state["step"] += np.float32(1)  # in place: it stays an array
        mean, square, step = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
        weight *= np.float32(1 - rate * self.spec.weight_decay)
        mean += np.float32(1 - _BETAS[0]) * (gradient - mean)
        square *= np.float32(_BETAS[1])
        np.square(gradient, out=gradient)
        gradient *= np.float32(1 - _BETAS[1])
        square += gradient
        scale = np.sqrt(square, out=gradient)
        scale /= np.float32(math.sqrt(1 - _BETAS[1] ** step))
        scale += np.float32(_EPSILON)
        np.divide(mean, scale, out=scale)
        scale *= np.float32(rate / (1 - _BETAS[0] ** step))
        weight -= scale


def check_gradients(gradients: Iterable[np.ndarray]) -> None:
    """Refuse gradients that would leave NaN or Inf in the weights, or in an optimiser's squares of them.

    Raises:
        NonFiniteError: if their norm is not below `LARGEST_NUMBER`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(sum(float(np.dot(flat, flat)) for flat in (g.reshape(-1) for g in gradients)))
    if not norm < LARGEST_NUMBER:
        raise NonFiniteError(
            "a gradient is NaN, infinite, or so large that its square is, though the loss is finite; nothing was "
            "updated: look for extreme values in the data or the activations, and lower the learning rates"
        )
