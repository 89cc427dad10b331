"""ClientSide on PyTorch: frozen, zeroth-order, first-order. Each class answers only the verbs that it can keep.

Requires of the half: dropout off (L+ and L- must be one function, paper.md I4), caches off; `hosl.split` gives it so.
"""

import math
from collections.abc import Sequence

import torch

from hosl.core.directions import Law
from hosl.core.estimators import mean_scales
from hosl.core.journal import Journal
from hosl.core.parties import Batch, Pair
from hosl.parties.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.probing import Probe, descend_, paired, trained_parameters
from hosl.split import ClientHalf


class FrozenClient:
    """A client that only computes activations: the baseline that every comparison owes, and the base of the others."""

    def __init__(self, half: ClientHalf, *, device: str = "cpu") -> None:
        self.half = half
        self.device = torch.device(device)
        half.to(self.device)
        half.eval()

    def forward(self, batch: Batch) -> torch.Tensor:
        """h = f_c(x; theta_c) [rows, seq, width], without a graph."""
        with torch.no_grad():
            return self.half(*self._inputs(batch))

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(batch.input_ids).to(self.device)
        return ids, torch.from_numpy(batch.targets.mask).to(self.device, torch.int64)


class ZerothOrderClient(FrozenClient):
    """A client trained by probes: forward passes only, weights read-only but for `descend`; keeps a journal."""

    def __init__(self, half: ClientHalf, *, law: Law = "gaussian", device: str = "cpu") -> None:
        super().__init__(half, device=device)
        self.law: Law = law
        self.trained = trained_parameters(half.model)
        self.journal = Journal()

    def probe(self, batch: Batch, seed: int, epsilon: float) -> Pair:
        """f_c at theta_c + epsilon u(seed) and at theta_c - epsilon u(seed), [rows, seq, width] each."""
        ids, mask = self._inputs(batch)
        with torch.no_grad(), paired(self.half.model, Probe(seed, epsilon, self.law), rows=2 * len(ids)):
            h_plus, h_minus = self.half(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
        return h_plus, h_minus

    def project(self, pair: Pair, gradient: torch.Tensor, epsilon: float) -> float:
        """<gradient, h+ - h-> / (2 epsilon). The difference first, then the sum in float64: no cancellation.

        Source: methods.md (a). NaN or infinite where an activation is.
        """
        h_plus, h_minus = pair
        difference = (h_plus - h_minus).to(torch.float64)
        return float((difference * gradient).sum()) / (2 * epsilon)

    def projection_noise(self, pair: Pair, gradient: torch.Tensor, epsilon: float) -> float:
        """r sqrt(|g h+|^2 + |g h-|^2) / (2 epsilon), products by element: the rounding floor of `project`.

        r is half a unit in the last place of the activations' dtype (2^-24 in float32); elements are taken to be off
        by r h each, independently. Rounding inside the half adds up to more: this is a floor.
        """
        rounding = torch.finfo(pair[0].dtype).eps / 2
        norms = [float(torch.linalg.vector_norm(h * gradient, dtype=torch.float64)) for h in pair]
        return rounding * math.hypot(*norms) / (2 * epsilon)

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c -= eta_c / Q sum_q c_q u(seed_q), and the journal's entries for it. Source: paper.md l.8."""
        self.apply(step, seeds, mean_scales(coefficients, learning_rate))

    def apply(self, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """theta_c -= sum_q scale_q u(seed_q), and the journal's entries for it; `descend` with the scales at hand."""
        self.journal.append(step, seeds, scales)
        descend_(self.trained, seeds, scales, self.law)

    def replay(self, journal: Journal, *, after: int = 0) -> None:
        """Apply the updates of `journal` later than step `after`; the weights must be those of that step."""
        for _, seeds, scales in journal.updates(after=after):
            descend_(self.trained, seeds, scales, self.law)
        self.journal = journal


class FirstOrderClient(FrozenClient):
    """A client trained by ordinary backprop: the upper row of every comparison."""

    def __init__(
        self, half: ClientHalf, *, optimiser: OptimiserSpec | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(half, device=device)
        self.trained = trained_parameters(half.model)
        self.optimiser = make_optimiser(optimiser or OptimiserSpec(), self.trained.values())
        self._h: torch.Tensor | None = None

    def forward_for_backward(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the graph stays here until `backward`."""
        self._h = self.half(*self._inputs(batch))
        return self._h.detach()

    def backward(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """One optimiser step from dL/dh of the last `forward_for_backward`."""
        assert self._h is not None, "backward needs a forward_for_backward before it"
        h, self._h = self._h, None
        h.backward(gradient.to(h))
        optimiser_step(self.optimiser, learning_rate)
