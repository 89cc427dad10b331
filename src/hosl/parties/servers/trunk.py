"""The server when labels stay with the client: blocks without a head, trained by the gradient at their output.

Between the states of a step and their gradient a client computes, and other clients may call. One graph is kept at
most, that of the newest states: where another batch came between, or the blocks have moved, the forward pass is made
again. So the memory does not grow with the clients, and a gradient that comes late counts at the blocks as they are.
"""

from collections.abc import Callable, Sequence

import torch

from hosl.core.targets import AskedPositions, RowPositionTargets, StepReply
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.engine.perturbation import trained_parameters
from hosl.parties.servers.basic import LearningRate
from hosl.parties.servers.synchronous import RoundGradient
from hosl.split import TrunkHalf

Graph = tuple[torch.Tensor, torch.Tensor]
"""The activations that arrived, as a leaf, and the states that follow from them."""


class TrunkServer:
    """A trunk trained by backprop. It never gets a label, a loss or a logit."""

    def __init__(
        self,
        half: TrunkHalf,
        *,
        learning_rate: LearningRate,
        optimiser: OptimiserSpec | None = None,
        device: str = "cpu",
    ) -> None:
        self.half, self.device, self.learning_rate = half, torch.device(device), learning_rate
        half.to(self.device)
        half.eval()
        self.trained = trained_parameters(half.model)
        self.optimiser = (
            make_optimiser(optimiser or OptimiserSpec(), self.trained.values()) if self.trained else None
        )
        self._graph: Graph | None = None

    def states(self, activations: Sequence[torch.Tensor], targets: AskedPositions) -> list[torch.Tensor]:
        """The last block's states at the scored positions (`states_shape`). Inference."""
        with torch.no_grad():
            return [self._states(h, targets) for h in activations]

    def states_for_step(
        self, activations: torch.Tensor, targets: AskedPositions
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor, int, bool], StepReply]]:
        """The states, and the function (gradient, step, want_gradient) that makes one update from their gradient.

        The loss in its reply is 0: only the client knows it.
        """
        states, graph = self._begun(activations, targets)

        def update(gradient: torch.Tensor, step: int, want_gradient: bool) -> StepReply:
            h, at = graph()
            at.backward(gradient.to(at))
            reply = StepReply(loss=0.0, gradient=h.grad if want_gradient else None)
            if self.optimiser is not None:  # at cut = n the trunk has nothing to train
                optimiser_step(self.optimiser, self.learning_rate(step))
            self._graph = None
            return reply

        return states, update

    def forget(self) -> None:
        """Let go of the graph of the newest states; where their gradient still comes, they are computed again."""
        self._graph = None

    def _begun(
        self, activations: torch.Tensor, targets: AskedPositions
    ) -> tuple[torch.Tensor, Callable[[], Graph]]:
        """The states, and the function that gives their graph once."""
        h = activations.detach().to(self.device).requires_grad_()
        states = self._states(h, targets)
        self._graph = (h, states)

        def graph() -> Graph:
            if self._graph is None or self._graph[0] is not h:
                return h, self._states(h, targets)
            kept, self._graph = self._graph, None
            return kept

        return states.detach(), graph

    def _states(self, h: torch.Tensor, targets: AskedPositions) -> torch.Tensor:
        mask = torch.from_numpy(targets.mask).to(self.device, torch.int64)
        if isinstance(targets, RowPositionTargets):
            positions = torch.from_numpy(targets.scored).to(self.device, torch.bool)
        else:
            positions = torch.from_numpy(targets.positions).to(self.device)
        return self.half(h.to(self.device), mask, positions)


class SynchronousTrunkServer(TrunkServer):
    """A trunk that several clients train together: one update from all gradients of a round."""

    def __init__(
        self,
        half: TrunkHalf,
        *,
        learning_rate: LearningRate,
        optimiser: OptimiserSpec | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(half, learning_rate=learning_rate, optimiser=optimiser, device=device)
        self._round = RoundGradient(self.trained)

    def states_for_part(
        self, activations: torch.Tensor, targets: AskedPositions
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor, int, bool], StepReply]]:
        """The states, and the function (gradient, weight, want_gradient) that adds to the round's gradient.

        It raises NonFiniteError if a gradient is NaN or infinite; nothing was added then.
        """
        states, graph = self._begun(activations, targets)

        def contribute(gradient: torch.Tensor, weight: int, want_gradient: bool) -> StepReply:
            h, at = graph()
            found = self._round.add(at, h if want_gradient else None, weight, gradient.to(at))
            return StepReply(loss=0.0, gradient=found)

        return states, contribute

    def apply(self, step: int) -> None:
        """One update from the mean over all weights contributed since the last one; without any, nothing changes."""
        self._graph = None  # its blocks move
        if self._round.close() and self.optimiser is not None:
            optimiser_step(self.optimiser, self.learning_rate(step))
