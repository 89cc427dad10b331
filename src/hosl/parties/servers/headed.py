"""The server as seen by a client that keeps its labels: the trunk gives the states, norm, head and loss are here.

The traffic: activations and scored positions up, states down; in a step the gradient at these states up. The label
values stay here. What a curious server could infer from the gradient: SECURITY.md. The head's own weights, one norm and
one layer, are trained by backprop here; a tied head is the client's embedding. Several devices have a head each.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.targets import (
    Activations,
    AskedPositions,
    OptionTargets,
    StepReply,
    Targets,
    positions_of,
)
from hosl.errors import NonFiniteError
from hosl.parties.engine.loss import mean_loss, mean_loss_of_scored, row_scores, row_scores_of_scored
from hosl.parties.engine.optimisers import (
    OptimiserSpec,
    check_gradients,
    make_optimiser,
    optimiser_step,
)
from hosl.parties.metered import Meter
from hosl.split import HeadHalf


@runtime_checkable
class Trunk(Protocol):
    """A server without a head; `RemoteTrunk` across a network, `LocalTrunk` in one process."""

    def states(
        self, activations: Sequence[Activations], targets: AskedPositions, *, at_rest: bool = False
    ) -> list[Any]:
        """The last block's states at the scored positions; nothing changes. `at_rest`: they belong to no step."""
        ...

    def step_states(
        self,
        activations: Activations,
        targets: AskedPositions,
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
        self.meter = Meter()
        """The meter of what is computed here: the client's, once a session has put it there."""

    def losses(self, activations: Sequence[Activations], targets: Targets) -> list[float]:
        """The mean loss of each activation, in nats; NaN without a call where an activation is NaN or infinite."""
        if not all(bool(torch.isfinite(h).all()) for h in activations):
            return [math.nan for _ in activations]
        states = self.trunk.states(activations, positions_of(targets))
        return [self.meter.call(self.head_loss, s, targets) for s in states]

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or of the scored tokens of each row (`engine.loss.row_scores`)."""
        (states,) = self.trunk.states([activations], positions_of(targets), at_rest=True)
        return self.meter.call(self.head_scores, states, targets)

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of trunk and head; the reply's loss and dL/dh are those before it.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; nothing is updated then.
        """
        losses: list[float] = []

        def states_gradient(states: torch.Tensor) -> torch.Tensor:
            loss, gradient = self.meter.call(self.head_gradient, states, targets, step)
            losses.append(loss)
            return gradient

        reply = self.trunk.step_states(
            activations, positions_of(targets), states_gradient, step=step, want_gradient=want_gradient
        )
        self.meter.call(self.head_update, step)
        return StepReply(loss=losses[-1], gradient=reply.gradient)

    # ---- what is computed on the device ----

    def head_loss(self, states: torch.Tensor, targets: Targets) -> float:
        """The mean loss at these states, nats."""
        with torch.no_grad():
            return float(self._loss(states, targets))

    def head_scores(self, states: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """The scores at these states."""
        with torch.no_grad():
            if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
                return row_scores_of_scored(self._logits_of_scored(states), targets)
            return row_scores(self.head.logits(states.to(self.device)), targets)

    def head_gradient(self, states: torch.Tensor, targets: Targets, step: int) -> tuple[float, torch.Tensor]:
        """The loss of `step`, and its gradient at these states; the head's own gradients wait for `head_update`.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite.
        """
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
        return float(loss.detach()), gradient

    def head_update(self, step: int) -> None:
        """One update of the head from the newest `head_gradient`."""
        if self.optimiser is not None:
            optimiser_step(self.optimiser, self.learning_rate(step))

    def _loss(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
            return mean_loss_of_scored(self._logits_of_scored(states), targets)
        return mean_loss(self.head.logits(states.to(self.device)), targets)

    def _logits_of_scored(self, states: torch.Tensor) -> torch.Tensor:
        """The logits [1, scored, vocabulary]; a row for each, as a mask of all in one row would be their square."""
        alone = states.to(self.device)[0].unsqueeze(1)  # no transposed view: its product is made row by row
        return self.head.logits(alone).transpose(0, 1)
