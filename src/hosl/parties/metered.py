"""Clocks, byte counters and memory meters around the two parties. They change nothing that passes through.

Bytes are those of the arrays and numbers that would cross a wire without compression; a
transport counts its own framing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

_KEEPING = ("forward_for_backward",)
"""Verbs after which the party still holds what it allocated: the graph that `backward` needs."""


@dataclass
class Meter:
    """What one party has cost since the last `take`."""

    seconds: float = 0.0
    """Inside the party's own verbs."""
    bytes_in: int = 0
    """Of the arrays and numbers handed to it."""
    bytes_out: int = 0
    """Of its answers."""
    peak_bytes: int = 0
    """Most tensor bytes alive at once: weights, optimiser state and what a verb allocated; 0 until measured."""
    measuring: bool = False
    """Whether the next verbs are measured for memory (slow: the profiler records every allocation)."""
    _resident_bytes: int = 0
    _held_bytes: int = 0

    def take(self) -> "Meter":
        """The costs so far, and start again from zero; the peak stays."""
        taken = Meter(self.seconds, self.bytes_in, self.bytes_out, self.peak_bytes)
        self.seconds, self.bytes_in, self.bytes_out = 0.0, 0, 0
        return taken

    def start_measuring(self, resident_bytes: int) -> None:
        """Measure memory from here; `resident_bytes` of weights and optimiser state are alive already."""
        self.measuring = True
        self._resident_bytes = self._held_bytes = resident_bytes
        self.peak_bytes = max(self.peak_bytes, resident_bytes)

    def stop_measuring(self) -> None:
        """Stop measuring memory; the peak stays."""
        self.measuring = False

    def call(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one verb of the party under the meter."""
        self.bytes_in += payload_bytes(args)
        start = time.perf_counter()
        if self.measuring:
            with profile(
                activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False
            ) as recorded:
                answer = verb(*args, **kwargs)
            self._follow(recorded, kept=verb.__name__ in _KEEPING)
        else:
            answer = verb(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.bytes_out += payload_bytes(answer)
        return answer

    def _follow(self, recorded: profile, *, kept: bool) -> None:
        events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change_bytes in changes:
            self._held_bytes += change_bytes
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        if not kept:  # what the verb returned is the caller's now, and is freed out of our sight
            self._held_bytes = self._resident_bytes


class Metered:
    """A ClientSide or a ServerSide whose every verb goes through a `Meter`."""

    def __init__(self, party: Any, meter: Meter) -> None:
        self._party = party
        self._meter = meter

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        own = getattr(self._party, verb)
        return lambda *args, **kwargs: self._meter.call(own, *args, **kwargs)


def payload_bytes(content: Any) -> int:
    """Bytes of the arrays and numbers in `content`: 8 for an int, 4 for a float (a loss travels as float32)."""
    if isinstance(content, torch.Tensor | np.ndarray):
        return content.nbytes
    if isinstance(content, float):
        return 4
    if isinstance(content, int):
        return 8
    if isinstance(content, Mapping):
        return sum(payload_bytes(value) for value in content.values())
    if isinstance(content, Sequence) and not isinstance(content, str):
        return sum(payload_bytes(part) for part in content)
    if is_dataclass(content):
        return sum(payload_bytes(getattr(content, field.name)) for field in fields(content))
    return 0


def resident_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
