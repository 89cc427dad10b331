"""Ctrl-C and SIGTERM end a run after the step in hand, with a checkpoint; a second Ctrl-C ends it at once."""

import signal
from types import FrameType, TracebackType


class Stop:
    """Whether somebody has asked the run to end. Takes the signals within its context and gives them back."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Stop":
        self._previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
