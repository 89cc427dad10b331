"""The protocols of the two parties: the calls that a round makes.

The data of these calls, and what of it may leave the device: `hosl.core.targets`. The implementations: `hosl.parties`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from hosl.core.array_types import Float
from hosl.core.estimators import Projection
from hosl.core.targets import Activations, Batch, Pair, StepReply, Targets


@runtime_checkable
class ClientSide(Protocol):
    """The half that holds the data; every client can do this much, a frozen one nothing else."""

    def forward(self, batch: Batch) -> Activations:
        """h = f_c(x; theta_c), without a graph. theta_c is only read."""
        ...


@runtime_checkable
class ZerothOrderClientSide(ClientSide, Protocol):
    """A client that is trained by forward passes."""

    def probes(self, batch: Batch, seeds: Sequence[int], epsilon: float) -> Iterator[Pair]:
        """f_c at theta_c + epsilon u(seed) and at theta_c - epsilon u(seed), for each seed. theta_c is only read.

        A pair may be computed when the iterator reaches it, or several at once.
        """
        ...

    def projections(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, gradient: Activations
    ) -> Iterator[Projection]:
        """<gradient, h+ - h-> / (2 epsilon) for each seed: the directional derivative along u, row by row.

        A row is NaN or infinite where an activation is; the round then rejects the direction.
        """
        ...

    def one_sided_projections(
        self, batch: Batch, clean: Activations, seeds: Sequence[int], epsilon: float, gradient: Activations
    ) -> Iterator[Projection]:
        """<gradient, h+ - clean> / epsilon for each seed, row by row; `clean` is f_c at theta_c."""
        ...

    def tangents(self, batch: Batch, seeds: Sequence[int], gradient: Activations) -> Iterator[Projection]:
        """<gradient, J u> for each seed, row by row; exact, without epsilon."""
        ...

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c <- theta_c - learning_rate * mean_q(coefficient_q u(seed_q)); the journal gets the update."""
        ...


@runtime_checkable
class ResidualClientSide(ClientSide, Protocol):
    """A client that is trained by forward passes, with dL/dh for the gradient at the output of its last blocks."""

    def forward_keeping_inputs(self, batch: Batch) -> Activations:
        """h = f_c(x; theta_c); keeps what `descend_by_feedback` needs of the inputs of blocks or layers."""
        ...

    def descend_by_feedback(self, gradient: Activations, learning_rate: float) -> None:
        """W <- W - learning_rate * sum over tokens of gradient x^T, for each layer that writes to the residual stream.

        `gradient` is dL/dh of the last `forward_keeping_inputs`, x what the layer read in it.
        """
        ...


@runtime_checkable
class GuidedClientSide(ClientSide, Protocol):
    """A client that is trained by forward passes, along directions that it forms from dL/dh and its own activations."""

    def forward_keeping_inputs(self, batch: Batch) -> Activations:
        """h = f_c(x; theta_c); keeps the block inputs that `guide` and `slope` need."""
        ...

    def guide(self, gradient: Activations) -> Sequence[str]:
        """Form the directions u from dL/dh of the last `forward_keeping_inputs`; returns the names of their tensors."""
        ...

    def slope(self, name: str, gradient: Activations, epsilon: float) -> float:
        """<gradient, h+ - h-> / (2 scale): dL/du of one tensor's direction, u of unit length. theta_c is only read."""
        ...

    def descend_along(self, names: Sequence[str], slopes: Sequence[float], learning_rate: float) -> None:
        """W <- W - learning_rate * slope * u for each of these tensors."""
        ...


@runtime_checkable
class NodeClientSide(GuidedClientSide, Protocol):
    """A guided client that can also shift a layer's output, each token by a random direction of its own."""

    def node_slopes(
        self, clean: Activations, seeds: Sequence[int], epsilon: float, gradient: Activations
    ) -> Iterator[Float[np.ndarray, "rows seq"]]:
        """<gradient, h+ - clean> / scale for each seed and token; `clean` is h of the last `forward_keeping_inputs`."""
        ...

    def descend_nodes(
        self, seeds: Sequence[int], slopes: Sequence[Float[np.ndarray, "rows seq"]], learning_rate: float
    ) -> None:
        """W <- W - learning_rate * mean_q sum over tokens of slope * u(seed_q) x^T; before `descend_along`."""
        ...


@runtime_checkable
class FirstOrderClientSide(ClientSide, Protocol):
    """A client that is trained by backprop."""

    def forward_for_backward(self, batch: Batch) -> Activations:
        """h = f_c(x; theta_c); keeps the state that `backward` needs."""
        ...

    def backward(self, gradient: Activations, learning_rate: float) -> None:
        """One first-order step from dL/dh of the last `forward_for_backward`."""
        ...


@runtime_checkable
class ServerSide(Protocol):
    """The half on the machine with compute. It only replies to calls; these change nothing."""

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The mean loss in nats of each activation. Inference; safe to repeat. Reading one may wait for the network."""
        ...

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities for evaluation: per class [rows, classes], or per option, mean per token [rows, 1]."""
        ...


@runtime_checkable
class FirstOrderServerSide(ServerSide, Protocol):
    """A server that is trained by backprop."""

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s. Repeating the last `step` returns its reply again, without a second update."""
        ...


@runtime_checkable
class ZerothOrderServerSide(ServerSide, Protocol):
    """A server that is trained by probes, as a zeroth-order client is."""

    def gradient(self, activations: Activations, targets: Targets) -> StepReply:
        """The loss and dL/dh at theta_s; nothing changes. For a zeroth-order server behind a first-order client."""
        ...

    def probe(self, pair: Pair, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """Losses of h+ at theta_s + epsilon u(seed) and of h- at theta_s - epsilon u(seed). theta_s only read."""
        ...

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """theta_s <- theta_s - eta_s * mean_q(coefficient_q u(seed_q))."""
        ...
