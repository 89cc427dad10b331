"""The server as seen by a client that keeps its labels: the trunk gives the states, norm, head and loss are here.

The traffic: activations and scored positions up, states down; in a step the gradient at these states up. The label
values stay here. What a curious server could infer from the gradient: SECURITY.md. The head's own weights, one norm and
one layer, are trained by backprop here; a tied head is the client's embedding. Several devices have a head each.
No torch: what computes the head is a subclass (`servers.headed`, `edge.head`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Activations, AskedPositions, StepReply, Targets, positions_of
from hosl.parties.metered import Meter


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


class Headed(ABC):
    """A `FirstOrderServerSide` over a trunk and a head on the client's device."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.meter = Meter()
        """The meter of what is computed here: the client's, once a session has put it there."""

    def losses(self, activations: Sequence[Activations], targets: Targets) -> list[float]:
        """The mean loss of each activation, in nats; NaN without a call where an activation is NaN or infinite."""
        if not all(self.finite(h) for h in activations):
            return [math.nan for _ in activations]
        states = self.trunk.states(activations, positions_of(targets))
        return [self.meter.call(self.head_loss, s, targets) for s in states]

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or of the scored tokens of each row (`head_scores`)."""
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

        def states_gradient(states: Any) -> Any:
            loss, gradient = self.meter.call(self.head_gradient, states, targets, step)
            losses.append(loss)
            return gradient

        reply = self.trunk.step_states(
            activations, positions_of(targets), states_gradient, step=step, want_gradient=want_gradient
        )
        self.meter.call(self.head_update, step)
        return StepReply(loss=losses[-1], gradient=reply.gradient)

    # ---- what is computed on the device ----

    @abstractmethod
    def finite(self, activations: Activations) -> bool:
        """Whether every number is."""

    @abstractmethod
    def head_loss(self, states: Any, targets: Targets) -> float:
        """The mean loss at these states, nats."""

    @abstractmethod
    def head_scores(self, states: Any, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """The scores at these states."""

    @abstractmethod
    def head_gradient(self, states: Any, targets: Targets, step: int) -> tuple[float, Any]:
        """The loss of `step`, and its gradient at these states; the head's own gradients wait for `head_update`.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite.
        """

    @abstractmethod
    def head_update(self, step: int) -> None:
        """One update of the head from the newest `head_gradient`."""
