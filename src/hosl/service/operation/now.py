"""What a service does at this moment, as plain values: for metrics, the live page and `hosl runs`."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ClientNow:
    """One client of a run."""

    step: int
    """The last step that it did."""
    heard: float | None
    """The time of its last call, in seconds since 1970; None: not known."""
    present: bool
    """Whether it has a session and was heard within the time after which a run makes room."""
    loss: float | None = None
    """The loss of its newest step, nats, where it has server adapters of its own."""


@dataclass(frozen=True, slots=True)
class RunNow:
    """One run in memory."""

    name: str
    step: int
    """The updates of the server half."""
    max_steps: int
    loss: float | None
    """The loss of the newest step, nats; None: none yet, or the labels stay with the clients."""
    expected: int
    """The clients that the run is for."""
    clients: dict[str, ClientNow] = field(default_factory=dict)

    @property
    def present(self) -> int:
        """The number of clients that are present."""
        return sum(client.present for client in self.clients.values())
