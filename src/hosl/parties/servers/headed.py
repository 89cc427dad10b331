"""The server as seen by a client that keeps its labels: the trunk gives the states, norm, head and loss are here.

The traffic: activations and scored positions up, states down; in a step the gradient at these states up. The label
values stay here. What a curious server could infer from the gradient: SECURITY.md. The head's own weights, one norm and
one layer, are trained by backprop here; a tied head is the client's embedding.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.targets import Activations, PositionTargets, StepReply, Targets, positions_of
from hosl.errors import NonFiniteError
from hosl.parties.engine.loss import mean_loss, row_scores
from hosl.parties.engine.optimisers import (
    OptimiserSpec,
    check_gradients,
    make_optimiser,
    optimiser_step,
)
from hosl.split import HeadHalf


@runtime_checkable
class Trunk(Protocol):
    """A server without a head; `RemoteTrunk` across a network."""

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
        """One update; `answer` maps the states to the gradient of the loss at them, and may be called twice."""
        ...


class HeadedServer:
    """A `FirstOrderServerSide` over a trunk and the head on the client's device."""

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
        """Train the head's tensors except those with `id` in `without`, such as a weight tied to the client half."""
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
        """The mean loss of each activation, in nats; NaN without a call where an activation is NaN or infinite."""
        if not all(bool(torch.isfinite(h).all()) for h in activations):
            return [math.nan for _ in activations]
        with torch.no_grad():
            states = self.trunk.states(activations, positions_of(targets))
            return [float(self._loss(s, targets)) for s in states]

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token."""
        with torch.no_grad():
            (states,) = self.trunk.states([activations], positions_of(targets))
            return row_scores(self.head.logits(states.to(self.device)), targets)

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of trunk and head; the reply's loss and dL/dh are those before it.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; nothing is updated then.
        """
        losses: list[float] = []

        def states_gradient(states: torch.Tensor) -> torch.Tensor:
            leaf = states.detach().to(self.device).requires_grad_()
            loss = self._loss(leaf, targets)
            if not torch.isfinite(loss.detach()):
                raise NonFiniteError(
                    f"the training loss of step {step} is {float(loss.detach())}; it must be finite: lower the "
                    "learning rates"
                )
            # not of a tied weight, whose gradient is large
            gradient, *head_gradients = torch.autograd.grad(loss, [leaf, *self.trained.values()])
            check_gradients([gradient, *head_gradients])
            for p, p_gradient in zip(self.trained.values(), head_gradients, strict=True):
                p.grad = p_gradient  # replaces that of a call whose reply was lost
            losses.append(float(loss.detach()))
            return gradient

        reply = self.trunk.step_states(
            activations, positions_of(targets), states_gradient, step=step, want_gradient=want_gradient
        )
        if self.optimiser is not None:
            optimiser_step(self.optimiser, self.learning_rate(step))
        return StepReply(loss=losses[-1], gradient=reply.gradient)

    def _loss(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        return mean_loss(self.head.logits(states.to(self.device)), targets)
