"""How much memory a party's tensors take at most: on a CPU by torch's profiler, on CUDA by its allocator.

Static is what a party holds between its calls: weights, buffers, optimiser state. The peak is that and everything else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KEEPING = ("forward_for_backward",)
"""Calls after which the party still holds what it allocated: the graph that `backward` needs."""


class TorchMemory:
    """Follows one party's allocations over its calls; implements `metered.MemoryMeter`."""

    def __init__(self, resident_bytes: int) -> None:
        """`resident_bytes` of weights and optimiser state are alive already."""
        self.static_bytes = resident_bytes
        self.peak_bytes = self._resident_bytes = self._held_bytes = resident_bytes

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and note the most that was alive at once. Slow: every allocation is recorded."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
            answer = call(*args, **kwargs)
        events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change_bytes in changes:
            self._held_bytes += change_bytes
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        if (
            call.__name__ not in _KEEPING
        ):  # what it returned is the caller's now, and is freed out of our sight
            self._held_bytes = self._resident_bytes
        return answer


class CudaMemory:
    """A party on a GPU: what its allocator had given out at most during its calls, and what it had reserved.

    The allocator is of the process. Where both parties share a GPU in one process, what the other holds is subtracted,
    by `others_bytes`.
    """

    def __init__(self, resident_bytes: int, device: torch.device, others_bytes: int = 0) -> None:
        self.static_bytes = self.peak_bytes = resident_bytes
        self.reserved_bytes = 0
        """The most that the allocator had taken from the device, fragments included; of the whole process."""
        self._device, self._others_bytes = device, others_bytes

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and note the most that was given out at once."""
        torch.cuda.reset_peak_memory_stats(self._device)
        answer = call(*args, **kwargs)
        torch.cuda.synchronize(self._device)
        seen_bytes = torch.cuda.max_memory_allocated(self._device) - self._others_bytes
        self.peak_bytes = max(self.peak_bytes, seen_bytes)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self._device))
        return answer


def memory_of(party: Any, static_bytes: int, *, beside: int = 0) -> TorchMemory | CudaMemory:
    """The measure for a party on its device.

    Args:
        party: a client or a server of `hosl.parties`.
        static_bytes: what it holds between its calls.
        beside: bytes that other parties of this process hold on the same device.
    """
    device = torch.device(party.device)
    if device.type == "cuda":
        return CudaMemory(static_bytes, device, beside)
    return TorchMemory(static_bytes)


def resident_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
