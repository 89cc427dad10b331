"""What a person sees of a run: a bar on a terminal, plain lines elsewhere; always on standard error."""

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0


@runtime_checkable
class View(Protocol):
    """Where a run shows itself."""

    def __enter__(self) -> "View": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def step(self, step: int, shown: dict[str, str]) -> None:
        """So many are done, or as many as before with other news; `shown` are short texts by name."""
        ...

    def say(self, text: str) -> None:
        """One line that stays."""
        ...


class Pace:
    """Time left, by what this process has done; what a run before it did took none of this one's time.

    Not rich's own, which forgets after half a minute: a study's runs take longer, and two may end a second apart.
    """

    def __init__(self, done: int, total: int) -> None:
        """Time counts from now."""
        self._first = self._done = done
        self._total = total
        self._began = self._moved = time.monotonic()

    def reach(self, done: int) -> None:
        """So many are done now."""
        if done != self._done:
            self._done, self._moved = done, time.monotonic()

    def left_s(self) -> float | None:
        """Mean time of one, times those left; the one under way counts down, at most to 0. None until one is done."""
        made = self._done - self._first
        if made < 1:
            return None
        each_s = (self._moved - self._began) / made
        under_way_s = min(time.monotonic() - self._moved, each_s)
        return max(each_s * (self._total - self._done) - under_way_s, 0.0)


class _Left(ProgressColumn):
    """Time left at a pace; nothing while it is not known."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        """As hours, minutes and seconds."""
        left_s = self._pace.left_s()
        return Text("" if left_s is None else f"left {timedelta(seconds=round(left_s))}")


class Bar:
    """A rich progress bar with the newest figures; for terminals."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self._pace = Pace(done, total)
        # no markup: a folder may be called [a]
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            _Left(self._pace),
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
        self._pace.reach(step)
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._progress.update(self._task, completed=step, shown=text)

    def say(self, text: str) -> None:
        """Print above the bar, as it stands: commands and paths in it are to be copied."""
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
        """Print when it is time to."""
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
    """A bar on a terminal, plain lines elsewhere; `unit` is what there are `total` of."""
    return Bar(title, done, total) if sys.stderr.isatty() else Lines(title, done, total, unit)
