"""The display of a run's progress: a bar on a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Protocol, runtime_checkable

_SECONDS_BETWEEN_LINES = 10.0


@runtime_checkable
class View(Protocol):
    """A display of a run's progress."""

    def __enter__(self) -> "View": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, shown: dict[str, str]) -> None:
        """Show that `step` steps are done, or the same number with newer figures; `shown` is name -> short text."""
        ...

    def say(self, text: str) -> None:
        """Print one line that stays."""
        ...


class Pace:
    """The time left, estimated from the steps that this process has done; earlier steps of a resumed run do not count.

    rich's own estimate looks back half a minute only: a run of a study takes longer, and two may end a second apart.
    """

    def __init__(self, done: int, total: int) -> None:
        """Start the clock; `done` of `total` steps are done already."""
        self._first = self._done = done
        self._total = total
        self._began = self._moved = time.monotonic()

    def reach(self, done: int) -> None:
        """Record that `done` steps are done now."""
        if done != self._done:
            self._done, self._moved = done, time.monotonic()

    def left_s(self) -> float | None:
        """Mean seconds per step times the steps left, less the time since the last one. None until a step is done.

        The time since the last step counts for one mean step at the most, so the estimate waits for a late step.
        """
        finished = self._done - self._first
        if finished < 1:
            return None
        each_s = (self._moved - self._began) / finished
        under_way_s = min(time.monotonic() - self._moved, each_s)
        return max(each_s * (self._total - self._done) - under_way_s, 0.0)


class _TimeLeft:
    """The time left as hours, minutes and seconds, whenever it is drawn; empty while it is not known."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def __str__(self) -> str:
        left_s = self._pace.left_s()
        return "" if left_s is None else f"left {timedelta(seconds=round(left_s))}"


class Bar:
    """A rich progress bar with the newest figures; for terminals."""

    def __init__(self, title: str, done: int, total: int) -> None:
        from rich.console import Console  # 3 MiB that a device without a terminal does not need
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._pace = Pace(done, total)
        # no markup: a folder may be called [a]
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="none", markup=False),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(
            title, total=total, completed=done, shown="", left=_TimeLeft(self._pace)
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, shown: dict[str, str]) -> None:
        """Move the bar and show the figures."""
        self._pace.reach(step)
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._progress.update(self._task, completed=step, shown=text)

    def say(self, text: str) -> None:
        """Print above the bar, unwrapped and without markup, so that commands and paths can be copied."""
        self._progress.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Lines:
    """A plain line every ten seconds and at the ends; for logs and service managers."""

    def __init__(self, title: str, done: int, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._pace, self._last = Pace(done, total), time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def step(self, step: int, shown: dict[str, str]) -> None:
        """Print a line if the last one is ten seconds old, or at the last step."""
        self._pace.reach(step)
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and step != self._total:
            return
        self._last = now
        left_s = self._pace.left_s()
        parts = [self._title, f"{self._unit} {step}/{self._total}"]
        parts += [f"{name} {value}" for name, value in shown.items()]
        parts += [] if left_s is None else [f"left {left_s:.0f} s"]
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        """Print one line."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def open_view(title: str, done: int, total: int, *, unit: str = "step") -> View:
    """A bar on a terminal, plain lines elsewhere; `unit` is the name of what is counted, such as `step` or `run`."""
    return Bar(title, done, total) if sys.stderr.isatty() else Lines(title, done, total, unit)
