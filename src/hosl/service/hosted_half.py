"""The interface of a server half in the service, whatever it runs on; `hosl.network.serve` gives it one on PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from hosl.core.journal import Journal
from hosl.core.targets import AskedPositions, Targets
from hosl.errors import HoslError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray


@dataclass(frozen=True, slots=True)
class Stepped:
    """The reply to a training step."""

    loss: float
    """The mean loss, nats; 0 where the labels stay with the client."""
    gradient: WireArray | None = None
    """dL/dh, shaped like the activations."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What one of several clients asks of a half, when they are answered together."""

    activations: Sequence[WireArray]
    """One or two, of one shape."""
    targets: Targets
    weight: int = 0
    """In a round: how much this batch weighs among the others."""
    want_gradient: bool = False


@dataclass(frozen=True, slots=True)
class TextSizes:
    """The sizes of a half that goes on with texts."""

    width: int
    """The width of the hidden state."""
    token_bytes: int
    """The bytes that a token takes in a text's cache, at most."""
    positions: int | None = None
    """The most tokens of a text; None: the model does not say."""


@dataclass(frozen=True, slots=True, eq=False)
class NextToken:
    """What a half says about the next token of a text."""

    tokens: Sequence[int] = ()
    """The candidates, the most probable first."""
    logits: Sequence[float] = ()
    """One per candidate."""
    tensor: WireArray | None = None
    """In place of these: the logits of all tokens [1, 1, vocabulary], float32, or a trunk's state [1, 1, width]."""


class OwnAsked(NamedTuple):
    """What a client asks of its own half, when several clients' halves are asked."""

    client: str
    asked: Asked
    step: int = 0
    """Of a training step: the number of the update."""


@runtime_checkable
class HostedText(Protocol):
    """One text in a half, with the keys and values of its tokens."""

    def go_on(self, hidden: WireArray) -> NextToken:
        """The next token's answer after a hidden state [1, tokens, width], which is added to the text."""
        ...

    @property
    def size_bytes(self) -> int:
        """The bytes of its cache."""
        ...

    def close(self) -> None:
        """Let go of the cache; the text does not go on."""
        ...


@runtime_checkable
class HostedHalf(Protocol):
    """A server half in training; takes and returns numpy arrays. Not for several threads at once."""

    def check(self, shape: tuple[int, ...], targets: Targets | AskedPositions) -> int:
        """Refuse activations of the wrong width and targets outside the model, by WireError; returns logits' bytes."""
        ...

    def losses(self, activations: Sequence[WireArray], targets: Targets) -> list[float]:
        """Mean losses in nats; nothing changes."""
        ...

    def losses_together(self, questions: Sequence[Asked]) -> list[list[float]]:
        """`losses` of several clients, in few forward passes: equal to each one's alone but for rounding."""
        ...

    def scores(self, activations: WireArray, targets: Targets) -> np.ndarray:
        """Log-probabilities [rows, classes or 1], float32; nothing changes."""
        ...

    def gradient(self, activations: WireArray, targets: Targets) -> Stepped:
        """Loss and dL/dh; nothing changes."""
        ...

    def probe(
        self, pair: Sequence[WireArray], targets: Targets, seed: int, epsilon: float
    ) -> tuple[float, float]:
        """Losses at theta_s +- epsilon u(seed); nothing changes."""
        ...

    def states(self, activations: Sequence[WireArray], positions: AskedPositions) -> list[WireArray]:
        """The last block's states at the scored positions; nothing changes."""
        ...

    def step(self, activations: WireArray, targets: Targets, step: int, want_gradient: bool) -> Stepped:
        """Update the half once; the reply has a gradient if `want_gradient`."""
        ...

    def states_for_step(
        self, activations: WireArray, positions: AskedPositions
    ) -> tuple[WireArray, Callable[[WireArray, int, bool], Stepped]]:
        """The states at the scored positions, and the function (gradient, step, want_gradient) that then updates."""
        ...

    def states_for_part(
        self, activations: WireArray, positions: AskedPositions
    ) -> tuple[WireArray, Callable[[WireArray, int, bool], Stepped]]:
        """The states, and the function (gradient, weight, want_gradient) that then adds to the round's gradient."""
        ...

    def contribute(
        self, activations: WireArray, targets: Targets, examples: int, want_gradient: bool
    ) -> Stepped:
        """Add this batch's gradient, weighed by `examples`, to the round's; no update yet."""
        ...

    def contribute_together(self, parts: Sequence[Asked]) -> list[Stepped]:
        """`contribute` of several clients, in few passes; if it raises, nothing was added of any."""
        ...

    def apply(self, step: int) -> None:
        """Update the half once, from the mean of the gradients contributed since the last update."""
        ...

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """Make one zeroth-order update."""
        ...

    def text_sizes(self) -> TextSizes:
        """The sizes of texts in this half; raises WireError if its model has no language-model head."""
        ...

    def open_text(self, candidates: int) -> HostedText:
        """An empty text, answered with so many candidates, 0: the logits of all tokens; weights are only read."""
        ...

    def save(
        self,
        folder: Path,
        step: int,
        facts: dict[str, object],
        journal: Journal | None,
        beside: Sequence[int],
    ) -> None:
        """Write a checkpoint of `step` below `folder`; those of the steps `beside` stay, others are deleted."""
        ...

    def restore(self, folder: Path, step: int) -> tuple[dict[str, object], Journal]:
        """Load the checkpoint of `step` below `folder`, or the base weights for step 0; returns facts and journal."""
        ...


@runtime_checkable
class HostedBank(Protocol):
    """The halves of several clients over one frozen base: each is trained by its client alone."""

    def of(self, client: str) -> HostedHalf:
        """A client's half, at the weights that every client begins with."""
        ...

    def forget(self, client: str) -> None:
        """Let go of a client's half."""
        ...

    @property
    def at_once(self) -> int:
        """The questions that one pass answers at most."""
        ...

    def step_together(self, asked: Sequence[OwnAsked]) -> list[Stepped | HoslError]:
        """`HostedHalf.step` for clients, each once, by one pass; the reply or the error of each."""
        ...

    def losses_together(self, asked: Sequence[OwnAsked]) -> list[list[float]]:
        """`HostedHalf.losses` for clients, by one pass."""
        ...


OpenHalf = Callable[[pb.Model, pb.Training], HostedHalf | HostedBank]
"""Makes the half that a Hello names, at its base weights, or where each client has a server half of its own the bank of
these; raises HandshakeError if this server has another one."""
