"""The memory of a client on the engine: pages of the process, as the system counts them."""

from collections.abc import Callable
from typing import Any

from hosl.system.machine import begin_peak, peak_since_begin_bytes, process_bytes


class ProcessMemory:
    """The peak of the process over a client's calls; implements `metered.MemoryMeter`.

    Pages of the whole process count, code and interpreter too; the weights' only once they were touched. Off Linux, and
    where the system does not let a peak be reset, the peak is that since the process began.
    """

    def __init__(self) -> None:
        self.static_bytes = self.peak_bytes = process_bytes()

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and take the largest resident size during it."""
        begin_peak()
        result = call(*args, **kwargs)
        self.peak_bytes = max(self.peak_bytes, peak_since_begin_bytes())
        self.static_bytes = process_bytes()
        return result
