"""Ctrl-C and SIGTERM end a run after the present step, with a checkpoint; a second Ctrl-C ends it at once."""

import signal
from types import FrameType, TracebackType


class Stop:
    """A context manager that handles SIGINT and SIGTERM, and restores the former handlers at its end."""

    def __init__(self) -> None:
        self.requested = False
        """Whether a signal has asked the run to end."""

    def __enter__(self) -> "Stop":
        self._former_handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
