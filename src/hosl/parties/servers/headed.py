"""ServerSide for a client that keeps its labels: the trunk is asked for states, norm, head and loss are here.

What crosses: activations and the scored positions up, states down; for a step the gradient at those states up. The
label values stay. What that gradient still tells a curious server: SECURITY.md. The head's own weights are trained by
backprop here (it is one norm and one layer); a tied head is the client's embedding.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.targets import Activations, PositionTargets, StepReply, Targets, positions_of
from hosl.errors import NonFiniteError
from hosl.parties.engine.loss import row_losses, row_scores
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.split import HeadHalf


@runtime_checkable
class Trunk(Protocol):
    """A server without a head: `torch_trunk.TrunkServer` here, `RemoteServer` across a network."""

    def states(self, activations: Sequence[Activations], targets: PositionTargets) -> list[Any]:
        """The last block's states at the scored positions; nothing changes."""
        ...

    def step_states(
        self,
        activations: Activations,
        targets: PositionTargets,
        answer: Callable[[Any], Any],
        *,
        step: int,
        want_gradient: bool,
    ) -> StepReply:
        """One update: `answer` maps the states to the loss's gradient at them; it may be asked again."""
        ...


class HeadedServer:
    """Implements `FirstOrderServerSide` over a trunk and the head that the client holds."""

    def __init__(
        self,
        trunk: Trunk,
        head: HeadHalf,
        *,
        learning_rate: Callable[[int], float],
        optimiser: OptimiserSpec | None = None,
        device: str = "cpu",
        without: Collection[int] = (),
    ) -> None:
        """Train the head's own tensors; `without` holds the ids of those that are another's, such as a tied weight."""
        self.trunk, self.head, self.device = trunk, head, torch.device(device)
        self.learning_rate = learning_rate
        head.to(self.device)
        head.eval()
        self.trained = {
            name: p for name, p in head.named_parameters() if p.requires_grad and id(p) not in without
        }
        self.optimiser = (
            make_optimiser(optimiser or OptimiserSpec(), self.trained.values()) if self.trained else None
        )

    def losses(self, activations: Sequence[Activations], targets: Targets) -> list[float]:
        """The mean loss of each activation, in nats; NaN, and the trunk is not asked, where one is no number."""
        if not all(bool(torch.isfinite(h).all()) for h in activations):
            return [math.nan for _ in activations]
        with torch.no_grad():
            return [
                float(self._loss(s, targets)) for s in self.trunk.states(activations, positions_of(targets))
            ]

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token."""
        with torch.no_grad():
            (states,) = self.trunk.states([activations], positions_of(targets))
            return row_scores(self.head.logits(states.to(self.device)), targets)

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of trunk and head; loss and dL/dh are those before it.

        Raises:
            NonFiniteError: if the loss is NaN or infinite; nothing is updated then.
        """
        losses: list[float] = []

        def answer(states: torch.Tensor) -> torch.Tensor:
            at = states.detach().to(self.device).requires_grad_()
            loss = self._loss(at, targets)
            if not torch.isfinite(loss.detach()):
                raise NonFiniteError(
                    f"the training loss of step {step} is {float(loss.detach())}; it must be finite: lower the "
                    "learning rates"
                )
            wanted = [at, *self.trained.values()]  # and no gradient of a tied weight, which is large
            gradient, *own = torch.autograd.grad(loss, wanted)
            for p, of_p in zip(self.trained.values(), own, strict=True):
                p.grad = of_p  # in place of one whose answer was lost on the way
            losses.append(float(loss.detach()))
            return gradient

        reply = self.trunk.step_states(
            activations, positions_of(targets), answer, step=step, want_gradient=want_gradient
        )
        if self.optimiser is not None:
            optimiser_step(self.optimiser, self.learning_rate(step))
        return StepReply(loss=losses[-1], gradient=reply.gradient)

    def _loss(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        return row_losses(self.head.logits(states.to(self.device)), targets).mean()


class LocalTrunk:
    """A `TrunkServer` of this process as a `Trunk`: the reference for the one across a network."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def states(self, activations: Sequence[Activations], targets: PositionTargets) -> list[Any]:
        """See `Trunk`."""
        return self._server.states(activations, targets)

    def step_states(
        self,
        activations: Activations,
        targets: PositionTargets,
        answer: Callable[[Any], Any],
        *,
        step: int,
        want_gradient: bool,
    ) -> StepReply:
        """See `Trunk`."""
        states, update = self._server.states_for_step(activations, targets)
        return update(answer(states), step, want_gradient)
