"""What a person sees of a run: a bar on a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from types import TracebackType
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


@runtime_checkable
class View(Protocol):
    """Where a run shows itself."""

    def __enter__(self) -> "View": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, shown: dict[str, str]) -> None:
        """A step is done; `shown` are short texts by name."""
        ...

    def say(self, text: str) -> None:
        """One line that stays."""
        ...


class Bar:
    """A rich progress bar with the newest figures; for terminals."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID = self._progress.add_task(title, total=total, completed=done, shown="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, shown: dict[str, str]) -> None:
        """Move the bar."""
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._progress.update(self._task, completed=step, shown=text)

    def say(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, highlight=False)


class Lines:
    """A plain line every ten seconds and at the ends; for logs and service managers."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self._title, self._first, self._total = title, done, total
        self._started = self._last = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, step: int, shown: dict[str, str]) -> None:
        """Print when it is time to."""
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and step != self._total:
            return
        self._last = now
        left_s = (now - self._started) / max(step - self._first, 1) * (self._total - step)
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.say(f"{self._title}  step {step}/{self._total}  {text}  left {left_s:.0f} s")

    def say(self, text: str) -> None:
        """Print one line."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def open_view(title: str, done: int, total: int) -> View:
    """A bar on a terminal, plain lines elsewhere."""
    return Bar(title, done, total) if sys.stderr.isatty() else Lines(title, done, total)
