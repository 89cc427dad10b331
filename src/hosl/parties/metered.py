"""Clocks, byte counters and memory meters around the two parties. They change nothing that passes through. No torch.

Bytes are those of the arrays and numbers that would cross a network without compression; a transport counts its own
framing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

Party = TypeVar("Party")


@runtime_checkable
class MemoryMeter(Protocol):
    """A measure of the memory of a party's calls; each runtime has its own (`engine.memory.TorchMemory`)."""

    peak_bytes: int
    static_bytes: int

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call under measurement."""
        ...


@dataclass
class Meter:
    """The costs of one party since the last `take`."""

    seconds: float = 0.0
    """Seconds inside the party's calls."""
    by_call: dict[str, float] = field(default_factory=dict)
    """Seconds of each call."""
    bytes_in: int = 0
    """Bytes of the arrays and numbers that it received."""
    bytes_out: int = 0
    """Bytes of its replies."""
    peak_bytes: int = 0
    """The most tensor bytes alive at once: weights, optimiser state, allocations of a call; 0 until measured."""
    static_bytes: int = 0
    """Tensor bytes held between calls, weights and optimiser state; 0 until measured."""
    memory: MemoryMeter | None = None
    """The memory meter of the next calls; None: memory is not measured."""

    def take(self) -> "Meter":
        """Return the costs so far and start again from zero; the memory figures stay."""
        taken = replace(self, memory=None)
        self.seconds, self.by_call, self.bytes_in, self.bytes_out = 0.0, {}, 0, 0
        return taken

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call of the party under the meter; of an iterator, the computation of each element."""
        self.bytes_in += payload_bytes(args)
        reply = self._measured(function.__name__, function, *args, **kwargs)
        return self._one_by_one(function.__name__, reply) if isinstance(reply, Iterator) else reply

    def _one_by_one(self, name: str, elements: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (element := self._measured(name, next, elements, end)) is not end:
            yield element
            del element  # or it would be held while the next one is computed

    def _measured(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reply = self.own_work(name, call, *args, **kwargs)
        self.bytes_out += payload_bytes(reply)
        return reply

    def own_work(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what a party does by itself: its seconds and memory count, and no byte, for none of it is a message."""
        start = time.perf_counter()
        if self.memory is not None:
            reply = self.memory.watch(call, *args, **kwargs)
            self.peak_bytes = max(self.peak_bytes, self.memory.peak_bytes)
            self.static_bytes = self.memory.static_bytes
        else:
            reply = call(*args, **kwargs)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.by_call[name] = self.by_call.get(name, 0.0) + seconds
        return reply


class Metered:
    """A ClientSide or a ServerSide whose every call goes through a `Meter`."""

    def __init__(self, party: Any, meter: Meter) -> None:
        self._party = party
        self._meter = meter

    def __getattr__(self, call: str) -> Callable[..., Any]:
        function = getattr(self._party, call)
        return lambda *args, **kwargs: self._meter.call(function, *args, **kwargs)


def metered(party: Party, meter: Meter) -> Party:
    """`party` with every call under the meter."""
    return cast(Any, Metered(party, meter))


def payload_bytes(content: Any) -> int:
    """Bytes of the arrays and numbers in `content`: 8 for an int, 4 for a float (a loss travels as float32)."""
    if isinstance(content, float):
        return 4
    if isinstance(content, int):
        return 8
    if hasattr(content, "nbytes"):  # numpy's arrays and torch's tensors
        return int(content.nbytes)
    if isinstance(content, Mapping):
        return sum(payload_bytes(value) for value in content.values())
    if isinstance(content, Sequence) and not isinstance(content, str):
        return sum(payload_bytes(element) for element in content)
    if is_dataclass(content):
        return sum(payload_bytes(getattr(content, entry.name)) for entry in fields(content))
    return 0
