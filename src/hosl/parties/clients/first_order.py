"""A client trained by backprop; it holds the graph from the forward pass to the returned gradient."""

import torch

from hosl.core.targets import Batch
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf


class FirstOrderClient(FrozenClient):
    """A client trained by ordinary backprop: the first-order baseline of every comparison."""

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
