"""The memory of a client on the engine: pages of the process, as the system counts them."""

from collections.abc import Callable
from typing import Any

from hosl.system.machine import begin_peak, peak_since_begin_bytes, process_bytes


class ProcessMemory:
    """The peak of the process over a client's calls, beyond what it had before; implements `metered.MemoryMeter`.

    The weights' pages count once they were touched, and so do the engine's. Off Linux, and where the system does not
    let a peak be reset, the peak is that since the process began.
    """

    def __init__(self, before_bytes: int = 0) -> None:
        """`before_bytes`: what the process had resident before the client's half was opened."""
        self._before_bytes = before_bytes
        self.static_bytes = self.peak_bytes = self._beyond(process_bytes())

    def watch(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one call and take the largest resident size during it."""
        begin_peak()
        result = call(*args, **kwargs)
        self.peak_bytes = max(self.peak_bytes, self._beyond(peak_since_begin_bytes()))
        self.static_bytes = self._beyond(process_bytes())
        return result

    def _beyond(self, taken_bytes: int) -> int:
        return max(taken_bytes - self._before_bytes, 0)
