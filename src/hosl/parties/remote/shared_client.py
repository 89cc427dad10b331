"""A zeroth-order client whose half stays equal to those of the other clients: every update goes through one journal.

The server keeps the journal and its order. A client hands in its update, gets back its own and the others' in that
order, and applies them: halves with equally many updates are equal bit for bit. A late client catches up the same way.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from hosl.core.estimators import mean_scales
from hosl.core.journal import Journal
from hosl.core.protocols import ZerothOrderClientSide
from hosl.core.targets import Activations, Batch, Pair, weight_of
from hosl.errors import StepMoved
from hosl.parties.remote.server import RemoteServer
from hosl.wire import hosl_pb2 as pb


@runtime_checkable
class JournaledClient(ZerothOrderClientSide, Protocol):
    """A client that can apply the updates of a journal."""

    journal: Journal

    def apply(self, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """theta_c -= sum_q scale_q u(seed_q)."""
        ...


class SharedClient:
    """A `ZerothOrderClientSide` over a client and the server that keeps the journal."""

    def __init__(self, client: JournaledClient, server: RemoteServer, *, synchronous: bool) -> None:
        """`synchronous`: the update is the mean of a round, and comes when the round is closed."""
        self.client, self._server, self._synchronous = client, server, synchronous
        self._examples = 0
        server.follows = server.incarnation

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self.client, name
        )  # the calls that change nothing, and attributes for checkpoints and meters

    def forward(self, batch: Batch) -> Activations:
        """h = f_c(x; theta_c)."""
        self._examples = weight_of(batch.targets)
        return self.client.forward(batch)

    def probes(self, batch: Batch, seeds: Sequence[int], epsilon: float) -> Iterator[Pair]:
        """f_c at theta_c +- epsilon u(seed), for each seed."""
        self._examples = weight_of(batch.targets)
        return self.client.probes(batch, seeds, epsilon)

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """Hand in the update, and apply the journal's updates since the last time.

        Raises:
            StepMoved: if the round was closed without this client, whose update counts in a later one; the updates
                until then have been applied. Or if the server was restarted; none has been applied then.
        """
        scales = mean_scales(coefficients, learning_rate)
        last = self._exchange(step, seeds, scales, self._examples)
        if self._synchronous and last.late:
            raise StepMoved(last.step)

    def catch_up(self) -> None:
        """Apply the journal's updates since the last time.

        Raises:
            StepMoved: if the server was restarted; none has been applied then.
        """
        self._exchange(self._server.current, (), (), 0)

    def _exchange(
        self, step: int, seeds: Sequence[int], scales: Sequence[float], examples: int
    ) -> pb.JournalReply:
        replies = self._server.journal(step, self.client.journal.last_step, seeds, scales, examples)
        for reply in replies:
            for update in reply.updates:
                self.client.apply(update.step, list(update.seeds), list(update.scales))
        return replies[-1]
