"""The server when labels stay with the client: blocks without a head, trained by the gradient at their output."""

from collections.abc import Callable, Sequence

import torch

from hosl.core.targets import PositionTargets, StepReply
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.engine.perturbation import trained_parameters
from hosl.parties.servers.basic import LearningRate
from hosl.split import TrunkHalf


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

    def states(self, activations: Sequence[torch.Tensor], targets: PositionTargets) -> list[torch.Tensor]:
        """The last block's states at the scored positions [rows, positions, width]. Inference."""
        with torch.no_grad():
            return [self._states(h, targets) for h in activations]

    def states_for_step(
        self, activations: torch.Tensor, targets: PositionTargets
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor, int, bool], StepReply]]:
        """The states, and the function (gradient, step, want_gradient) that makes one update from their gradient.

        The loss in its reply is 0: only the client knows it.
        """
        h = activations.detach().to(self.device).requires_grad_()
        states = self._states(h, targets)

        def update(gradient: torch.Tensor, step: int, want_gradient: bool) -> StepReply:
            states.backward(gradient.to(states))
            reply = StepReply(loss=0.0, gradient=h.grad if want_gradient else None)
            if self.optimiser is not None:  # at cut = n the trunk has nothing to train
                optimiser_step(self.optimiser, self.learning_rate(step))
            return reply

        return states.detach(), update

    def _states(self, h: torch.Tensor, targets: PositionTargets) -> torch.Tensor:
        mask = torch.from_numpy(targets.mask).to(self.device, torch.int64)
        return self.half(h.to(self.device), mask, torch.from_numpy(targets.positions).to(self.device))
