"""What the two parties say to each other: batches, targets, and the two protocols that a round talks to.

The data boundary is these types. A `Batch` stays with the client; of it, only `Batch.targets` may cross to the
server. No field of `Targets` can carry the input's token ids or text. Who implements the protocols: `hosl.parties`.
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
        """For each seed f_c at theta_c + epsilon u(seed) and at theta_c - epsilon u(seed). theta_c is only read.

        The next pair may be computed when it is asked for, or several at once.
        """
        ...

    def projections(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, gradient: Activations
    ) -> Iterator[Projection]:
        """For each seed <gradient, h+ - h-> / (2 epsilon): the directional derivative along u, row by row.

        NaN or infinite where an activation is; the round then rejects the direction.
        """
        ...

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c <- theta_c - learning_rate * mean_q(coefficient_q u(seed_q)); journals what it did."""
        ...


@runtime_checkable
class OneSidedClientSide(ZerothOrderClientSide, Protocol):
    """A client that can also do with one evaluation per direction."""

    def one_sided_projections(
        self, batch: Batch, clean: Activations, seeds: Sequence[int], epsilon: float, gradient: Activations
    ) -> Iterator[Projection]:
        """For each seed <gradient, h+ - clean> / epsilon, `clean` being f_c at theta_c."""
        ...


@runtime_checkable
class ForwardModeClientSide(ZerothOrderClientSide, Protocol):
    """A client whose runtime has forward-mode differentiation."""

    def tangents(self, batch: Batch, seeds: Sequence[int], gradient: Activations) -> Iterator[Projection]:
        """For each seed <gradient, J u>, exactly: no epsilon."""
        ...


@runtime_checkable
class GuidedClientSide(ClientSide, Protocol):
    """A client that is trained by forward passes, along directions that it forms from dL/dh and its own activations."""

    def forward_for_guides(self, batch: Batch) -> Activations:
        """h = f_c(x; theta_c), keeping what `guide` and `slope` evaluate again."""
        ...

    def guide(self, gradient: Activations) -> Sequence[str]:
        """Form the directions u from dL/dh of the last `forward_for_guides`; returns the names of their tensors."""
        ...

    def slope(self, name: str, gradient: Activations, epsilon: float) -> float:
        """<gradient, h+ - h-> / (2 scale): dL/du of one tensor's direction, u of unit length. theta_c is only read."""
        ...

    def descend_along(self, names: Sequence[str], slopes: Sequence[float], learning_rate: float) -> None:
        """W <- W - learning_rate * slope * u for each of these tensors."""
        ...


@runtime_checkable
class NodeClientSide(GuidedClientSide, Protocol):
    """A guided client that can also shift what a layer puts out, each token by a random direction of its own."""

    def node_slopes(
        self, clean: Activations, seeds: Sequence[int], epsilon: float, gradient: Activations
    ) -> Iterator[Float[np.ndarray, "rows seq"]]:
        """For each seed and token <gradient, h+ - clean> / scale, `clean` being the last `forward_for_guides`."""
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
        """h = f_c(x; theta_c), keeping what `backward` needs."""
        ...

    def backward(self, gradient: Activations, learning_rate: float) -> None:
        """One first-order step from dL/dh of the last `forward_for_backward`."""
        ...


@runtime_checkable
class ServerSide(Protocol):
    """The half that holds the compute. It answers; it never drives. These calls change nothing."""

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The mean loss in nats of each activation. Inference; safe to repeat. Reading them may wait for a wire."""
        ...

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """For evaluation: log-probabilities per class [rows, classes], or per option, mean per token [rows, 1]."""
        ...


@runtime_checkable
class FirstOrderServerSide(ServerSide, Protocol):
    """A server that is trained by backprop."""

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s. Repeating the last `step` answers again without a second update."""
        ...


@runtime_checkable
class MeanStepServerSide(FirstOrderServerSide, Protocol):
    """A server that can also take its gradient at several activations of one batch (mean-plus)."""

    def step_at_mean(
        self, activations: Sequence[Activations], targets: Targets, *, step: int
    ) -> Sequence[float]:
        """One update of theta_s on the mean of the activations' losses; each one's loss before it, in nats."""
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


@runtime_checkable
class NoisyClientSide(ZerothOrderClientSide, Protocol):
    """A client that can also probe as the authors' published code does; for the profile authors-head only."""

    def probe_with_dropout(self, batch: Batch, seed: int, epsilon: float, dropout_seed: int) -> Pair:
        """As `probe`, but h+ has dropout on and h- has not (paper.md D2)."""
        ...


@runtime_checkable
class NoisyServerSide(FirstOrderServerSide, Protocol):
    """A server that can also answer as the authors' published code does; for the profile authors-head only."""

    def loss_with_dropout(self, activations: Activations, targets: Targets, dropout_seed: int) -> float:
        """The mean loss with dropout on. theta_s unchanged."""
        ...

    def step_with_dropout(
        self, activations: Activations, targets: Targets, *, step: int, dropout_seed: int
    ) -> StepReply:
        """As `step`, with the dropout that `loss_with_dropout` drew from the same seed."""
        ...
