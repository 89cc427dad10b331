"""A zeroth-order client whose directions lie along its own activations.

For a linear layer u = a b^T, with random signs a and, for b, the direction in which the layer's inputs are largest. A
linear layer's gradient is delta^T X: nothing of it lies outside the span of its inputs X, so a random b is mostly lost.
b is the leading right singular vector of X, by power iteration, of unit length. Biased: only the part of the gradient
along b is ever seen, 42 % of its energy in a toy (methods.md (i)). Source: AGZO (arXiv 2601.17261), at rank one.

A seed does not give b again: a journal would need in_features numbers for each layer and step, and they would tell of
the data. So there is no journal, and checkpoints hold the weights.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from hosl.core.directions import low_rank_factors
from hosl.core.estimators import mean_scales
from hosl.core.targets import Batch
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.perturbation import Probe, descend_

POWER_ITERATIONS = 3


class ActivationGuidedClient(ZerothOrderClient):
    """Implements `ZerothOrderClientSide`; every direction is guided. One forward pass more per step, for the inputs.

    What is no linear layer's weight (biases, norms, Conv1D) has directions of the low-rank distribution.
    """

    _batch: Batch | None = None
    """Whose inputs `_columns` describe, at the weights at hand."""
    _columns: Mapping[str, torch.Tensor]

    def guided(self, seed: int) -> bool:
        """Whether the direction of this seed lies along the activations."""
        return True

    def _probe_along(self, batch: Batch, seed: int, epsilon: float) -> Probe:
        if not self.guided(seed):
            return super()._probe_along(batch, seed, epsilon)
        if self._batch is not batch:
            self._batch, self._columns = batch, self._leading_inputs(batch)
        return Probe(seed, epsilon, "low-rank", self._columns)

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c -= eta_c / Q sum_q c_q u_q. Source: paper.md l.8."""
        scales = mean_scales(coefficients, learning_rate)
        updates = list(zip(seeds, scales, strict=True))
        guided = [(seed, scale) for seed, scale in updates if self.guided(seed)]
        full_space = [(seed, scale) for seed, scale in updates if not self.guided(seed)]
        self._descend_along(guided)
        descend_(
            self.trained,
            [seed for seed, _ in full_space],
            [scale for _, scale in full_space],
            self.distribution,
        )
        self._batch = None  # the inputs are others now

    def _descend_along(self, updates: Sequence[tuple[int, float]]) -> None:
        if not updates:
            return
        others = {name: p for name, p in self.trained.items() if name not in self._columns}
        descend_(others, [seed for seed, _ in updates], [scale for _, scale in updates], "low-rank")
        with torch.no_grad():
            for name, b in self._columns.items():
                p = self.trained[name]
                total = b.new_zeros(len(p))
                for seed, scale in updates:
                    a, _ = low_rank_factors(seed, name, tuple(p.shape))
                    total.add_(torch.from_numpy(a).to(b), alpha=scale)
                if p.dtype == b.dtype:
                    p.addr_(total, b, alpha=-1)
                else:
                    p.copy_(torch.addr(p.to(b.dtype), total, b, alpha=-1))

    def _leading_inputs(self, batch: Batch) -> Mapping[str, torch.Tensor]:
        """b of every trained linear layer, [in] of unit length, from one forward pass; padding is left out."""
        ids, mask = self._inputs(batch)
        held, found = mask.bool().flatten(), {}

        def look(name: str) -> Callable[..., None]:
            def read(layer: nn.Module, args: tuple[torch.Tensor]) -> None:
                x = args[0].reshape(len(held), -1)[held]
                found[name] = leading_direction(x.to(torch.promote_types(x.dtype, torch.float32)))

            return read

        hooks = [
            module.register_forward_pre_hook(look(f"{name}.weight"))
            for name, module in self.half.model.named_modules()
            if type(module) is nn.Linear and module.weight.requires_grad
        ]
        try:
            with torch.no_grad():
                self.half(ids, mask)
        finally:
            for hook in hooks:
                hook.remove()
        return found


class MixedClient(ActivationGuidedClient):
    """Half of the directions guided, the other half of the full space: biased on average, but blind to nothing."""

    def guided(self, seed: int) -> bool:
        """A coin that the seed tosses."""
        return seed % 2 == 0


def leading_direction(x: torch.Tensor) -> torch.Tensor:
    """The unit vector [in] near the leading right singular vector of x [tokens, in], from the mean by power iteration.

    Zeros where x is 0. Uncentred, as the gradient is: near the mean activation, if that stands out.
    """
    b = x.mean(0)
    for _ in range(POWER_ITERATIONS):
        b = x.T @ (x @ b)
        b = b / b.norm().clamp_min(torch.finfo(b.dtype).tiny)
    return b
