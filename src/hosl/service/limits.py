"""Limits: tensor size, calls per second, calls at once of each client on its own; and of all clients together."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hosl.errors import BusyError
from hosl.transport.channel import MESSAGE_BYTES
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import CHUNK_BYTES

HELLO_CALLS = 20
"""The calls of its client that a hello counts for: it may load weights. A device says one when a session is lost."""

_KEPT = 1024
"""More buckets than these: those that are full are forgotten, so that not everyone who ever came stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of a client, and of all together."""

    tensor_bytes: int = 256 << 20
    """The largest tensor, both as sent and unpacked."""
    tensor_total_bytes: int = 2 << 30
    """The tensors of questions and steps of all clients that arrive or are computed with; more wait to be read."""
    logits_per_tensor: int = 4
    """The largest logits of one activation, as a multiple of `tensor_bytes`."""
    calls_per_s: int = 200
    """The calls per second on average; twice as many in a burst."""
    concurrent_calls: int = 4
    """The calls that may run at once."""
    cache_bytes: int = 256 << 20
    """The bytes of keys and values that a client's texts may take together."""
    cache_total_bytes: int = 1 << 30
    """The bytes of keys and values of all clients."""
    texts_at_once: int = 4
    """The texts that may be generated at once, of all clients; 0: none."""
    message_bytes: int = MESSAGE_BYTES
    """The largest message."""

    def message(self) -> pb.Limits:
        """The limits as the reply to Hello states them."""
        return pb.Limits(
            tensor_bytes=self.tensor_bytes, chunk_bytes=CHUNK_BYTES, calls_per_s=self.calls_per_s,
            concurrent_calls=self.concurrent_calls,
        )  # fmt: skip


@dataclass
class _Bucket:
    """A token bucket of calls, and the calls that run now."""

    calls_left: float
    refilled_s: float
    """The time of the last refill, by the clock of `Meterage`."""
    running: int = 0


@dataclass
class Meterage:
    """A token bucket per client that holds its calls to the limits. For one thread."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    _buckets: dict[str, _Bucket] = field(default_factory=dict)
    _most_buckets: int = _KEPT

    @contextmanager
    def call(self, client: str, calls: int = 1) -> Iterator[None]:
        """Count one call of a client as `calls`; the context spans it from its first message to its end.

        Raises:
            BusyError: if it is one too many, at once or per second.
        """
        now, burst = self.clock(), 2.0 * self.limits.calls_per_s
        if client not in self._buckets and len(self._buckets) >= self._most_buckets:
            self._forget_full(now, burst)
        bucket = self._buckets.setdefault(client, _Bucket(calls_left=burst, refilled_s=now))
        refill = (now - bucket.refilled_s) * self.limits.calls_per_s
        bucket.calls_left, bucket.refilled_s = min(burst, bucket.calls_left + refill), now
        calls = max(1, int(min(calls, burst)))
        if bucket.calls_left < calls:
            hellos = f", of which a hello counts for {calls}" if calls > 1 else ""
            raise BusyError(
                f"client {client} makes more than {self.limits.calls_per_s} calls per second{hellos}; wait a moment"
            )
        if bucket.running >= self.limits.concurrent_calls:
            raise BusyError(
                f"client {client} has {bucket.running} calls running; "
                f"{self.limits.concurrent_calls} are allowed at once"
            )
        bucket.calls_left -= calls
        bucket.running += 1
        try:
            yield
        finally:
            bucket.running -= 1

    def _forget_full(self, now: float, burst: float) -> None:
        """Let the buckets go that are full and of which no call runs: a new one is as good."""
        self._buckets = {
            client: bucket
            for client, bucket in self._buckets.items()
            if bucket.running
            or bucket.calls_left + (now - bucket.refilled_s) * self.limits.calls_per_s < burst
        }
        self._most_buckets = max(_KEPT, 2 * len(self._buckets))
