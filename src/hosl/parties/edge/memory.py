"""The memory of a client on the engine: pages of the process, as the system counts them."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hosl.system.machine import process_bytes, process_peak_bytes


class ProcessMemory:
    """The peak of the process over a client's calls; implements `metered.MemoryMeter`.

    Pages of the whole process count, code and interpreter too; the weights' only once they were touched. Off Linux, and
    where the system does not let a peak be reset, the peak is that since the process began.
    """

    def __init__(self) -> None:
        self.static_bytes = self.peak_bytes = process_bytes()

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and take the largest resident size during it."""
        _reset_peak()
        result = call(*args, **kwargs)
        self.peak_bytes = max(self.peak_bytes, process_peak_bytes())
        self.static_bytes = process_bytes()
        return result


def _reset_peak() -> None:
    """Make the system count this process's peak anew (proc(5), clear_refs)."""
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
