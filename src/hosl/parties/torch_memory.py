"""How much memory a party's tensors take at most, from the allocations that torch's profiler records. CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KEEPING = ("forward_for_backward",)
"""Verbs after which the party still holds what it allocated: the graph that `backward` needs."""


class TorchMemory:
    """Follows one party's allocations over its verbs; implements `metered.MemoryMeter`."""

    def __init__(self, resident_bytes: int) -> None:
        """`resident_bytes` of weights and optimiser state are alive already."""
        self.peak_bytes = self._resident_bytes = self._held_bytes = resident_bytes

    def watch(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one verb and note the most that was alive at once. Slow: every allocation is recorded."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
            answer = verb(*args, **kwargs)
        events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change_bytes in changes:
            self._held_bytes += change_bytes
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        if (
            verb.__name__ not in _KEEPING
        ):  # what it returned is the caller's now, and is freed out of our sight
            self._held_bytes = self._resident_bytes
        return answer


def resident_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
