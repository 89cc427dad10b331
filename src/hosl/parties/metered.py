"""Clocks, byte counters and memory meters around the two parties. They change nothing that passes through. No torch.

Bytes are those of the arrays and numbers that would cross a wire without compression; a
transport counts its own framing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class MemoryMeter(Protocol):
    """Measures the memory of a party's calls; each runtime has its own (`torch_memory.TorchMemory`)."""

    peak_bytes: int
    static_bytes: int

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call under measurement."""
        ...


@dataclass
class Meter:
    """What one party has cost since the last `take`."""

    seconds: float = 0.0
    """Inside the party's own calls."""
    by_call: dict[str, float] = field(default_factory=dict)
    """Seconds of each call."""
    bytes_in: int = 0
    """Of the arrays and numbers handed to it."""
    bytes_out: int = 0
    """Of its answers."""
    peak_bytes: int = 0
    """Most tensor bytes alive at once: weights, optimiser state and what a call allocated; 0 until measured."""
    static_bytes: int = 0
    """Of these, weights and optimiser state, held between calls; 0 until measured."""
    memory: MemoryMeter | None = None
    """Measures the next calls' memory, while it is there."""

    def take(self) -> "Meter":
        """The costs so far, and start again from zero; what is known of memory stays."""
        taken = replace(self, memory=None)
        self.seconds, self.by_call, self.bytes_in, self.bytes_out = 0.0, {}, 0, 0
        return taken

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call of the party under the meter; where it answers one by one, each answer's making."""
        self.bytes_in += payload_bytes(args)
        answer = self._measured(function.__name__, function, *args, **kwargs)
        return self._one_by_one(function.__name__, answer) if isinstance(answer, Iterator) else answer

    def _one_by_one(self, name: str, answers: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (answer := self._measured(name, next, answers, end)) is not end:
            yield answer
            del answer  # or it would be held while the next one is made

    def _measured(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        if self.memory is not None:
            answer = self.memory.watch(call, *args, **kwargs)
            self.peak_bytes = max(self.peak_bytes, self.memory.peak_bytes)
            self.static_bytes = self.memory.static_bytes
        else:
            answer = call(*args, **kwargs)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self.by_call[name] = self.by_call.get(name, 0.0) + seconds
        self.bytes_out += payload_bytes(answer)
        return answer


class Metered:
    """A ClientSide or a ServerSide whose every call goes through a `Meter`."""

    def __init__(self, party: Any, meter: Meter) -> None:
        self._party = party
        self._meter = meter

    def __getattr__(self, call: str) -> Callable[..., Any]:
        own = getattr(self._party, call)
        return lambda *args, **kwargs: self._meter.call(own, *args, **kwargs)


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
        return sum(payload_bytes(part) for part in content)
    if is_dataclass(content):
        return sum(payload_bytes(getattr(content, part.name)) for part in fields(content))
    return 0
