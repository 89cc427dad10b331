"""How much a client may ask for: tensor size, calls per second, calls at once. Counted per client, never shared."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hosl.errors import LimitError
from hosl.transport.channel import MESSAGE_BYTES
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import CHUNK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may ask for."""

    tensor_bytes: int = 256 << 20
    """Of one activation, as sent and unpacked."""
    calls_per_s: int = 200
    """On average; twice as many in a burst."""
    concurrent_calls: int = 4
    message_bytes: int = MESSAGE_BYTES

    def message(self) -> pb.Limits:
        """As a Hello tells them."""
        return pb.Limits(
            tensor_bytes=self.tensor_bytes, chunk_bytes=CHUNK_BYTES, calls_per_s=self.calls_per_s,
            concurrent_calls=self.concurrent_calls,
        )  # fmt: skip


@dataclass
class _Use:
    tokens: float
    refilled: float
    running: int = 0


@dataclass
class Meterage:
    """Counts each client's calls against the limits. For one thread."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    _uses: dict[str, _Use] = field(default_factory=dict)

    @contextmanager
    def call(self, client: str) -> Iterator[None]:
        """One call of a client, from its first message to its end.

        Raises:
            LimitError: if it is one too many, at once or per second.
        """
        now, burst = self.clock(), 2.0 * self.limits.calls_per_s
        use = self._uses.setdefault(client, _Use(tokens=burst, refilled=now))
        use.tokens = min(burst, use.tokens + (now - use.refilled) * self.limits.calls_per_s)
        use.refilled = now
        if use.tokens < 1:
            raise LimitError(
                f"client {client} makes more than {self.limits.calls_per_s} calls per second; wait a moment"
            )
        if use.running >= self.limits.concurrent_calls:
            raise LimitError(
                f"client {client} has {use.running} calls running; {self.limits.concurrent_calls} are allowed at once"
            )
        use.tokens -= 1
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1
