"""The peak memory of a party's tensors: on a CPU by torch's profiler, on CUDA by its allocator.

Static memory is held between calls: weights, buffers, optimiser state. The peak includes it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_KEEPING = (
    "forward_for_backward",
    "forward_keeping_inputs",
    "states_for_step",
    "head_gradient",
    "head_update",
)
"""Calls after which the party still holds what it allocated: graphs that wait for a gradient, a head's gradients."""


class TorchMemory:
    """Follows one party's allocations over its calls; implements `metered.MemoryMeter`."""

    def __init__(self, resident_bytes: int) -> None:
        """Start with `resident_bytes` of weights and optimiser state."""
        self.static_bytes = resident_bytes
        self.peak_bytes = self._resident_bytes = self._held_bytes = resident_bytes

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and record the most bytes alive at once. Slow: every allocation is recorded."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
            result = call(*args, **kwargs)
        events: Any = recorded.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for _, change_bytes in changes:
            self._held_bytes += change_bytes
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        # the result belongs to the caller now: its release cannot be seen here
        if call.__name__ not in _KEEPING:
            self._held_bytes = self._resident_bytes
        return result


class CudaMemory:
    """The memory of a party on a GPU: the most bytes allocated during its calls, and the most reserved.

    The allocator serves the whole process. Where both parties share a GPU in one process, `others_bytes`, which the
    other party holds, are subtracted.
    """

    def __init__(self, resident_bytes: int, device: torch.device, others_bytes: int = 0) -> None:
        self.static_bytes = self.peak_bytes = resident_bytes
        self.reserved_bytes = 0
        """The most bytes that the allocator had reserved on the device, fragments included; of the whole process."""
        self._device, self._others_bytes = device, others_bytes

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and record the most bytes allocated at once."""
        torch.cuda.reset_peak_memory_stats(self._device)
        result = call(*args, **kwargs)
        torch.cuda.synchronize(self._device)
        party_peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._others_bytes
        self.peak_bytes = max(self.peak_bytes, party_peak_bytes)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self._device))
        return result


def memory_of(party: Any, static_bytes: int, *, beside: int = 0) -> TorchMemory | CudaMemory:
    """The memory meter for a party on its device.

    Args:
        party: a client or a server of `hosl.parties`.
        static_bytes: the bytes that it holds between its calls.
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
