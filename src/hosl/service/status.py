"""The monitoring of the service: Prometheus metrics, structured log lines, the state that the live page shows."""

import json
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hosl.errors import HoslError
from hosl.service.operation.metrics import Metrics
from hosl.service.operation.now import RunNow
from hosl.service.runs import ServedRun

_POINTS = 2000
"""The number of losses kept per run for the live page; above it, every other one is dropped."""
_QUIET_S = 10.0
"""The seconds in which a call that is refused again for the same reason gets no further log line."""
_RUNS_SHOWN = 100
"""The runs whose losses are kept for the live page, those that were opened last."""
_REFUSALS_KEPT = 1024
"""More refusals than these: those of which the next would be logged anyhow are forgotten."""
_CALL: ContextVar[str] = ContextVar("call", default="none")
"""The name of the call that a task serves, or `Round` of one that closes rounds; of other work `none`."""


class Status:
    """What one service has done and does. Written by the event loop, read by the page's threads."""

    def __init__(self, log: Callable[[str], None] | None = None) -> None:
        self._metrics = Metrics()
        self._log = log or _to_stderr
        self._lock = threading.Lock()
        self._clients: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        self._losses: dict[str, deque[tuple[int, float]]] = {}
        self._quiet: dict[tuple[str, str, str], tuple[float, int]] = {}
        """Per client, call and error: when it was logged last, and how often it has come since."""
        self._most_quiet = _REFUSALS_KEPT
        self.started = time.time()
        self.ready = False

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Set the function that returns the length of the queue."""
        self._metrics.queue.set_function(length)

    def answered_together(self, questions: int) -> None:
        """Count one pass of compute that answered so many questions of a run's clients."""
        self._metrics.merged_passes.inc()
        self._metrics.merged_questions.inc(questions)

    def watch_tensors(self, taken_bytes: Callable[[], int]) -> None:
        """Set the function that returns the bytes that the tensors of all calls take."""
        self._metrics.tensors.set_function(taken_bytes)

    def watch_disk(self, free_bytes: Callable[[], int]) -> None:
        """Set the function that returns the bytes that are free where runs are kept."""
        self._metrics.disk_free.set_function(free_bytes)

    def watch_runs(self, now: Callable[[], Iterable[RunNow]]) -> None:
        """Set the function that returns the runs in memory."""
        self._metrics.runs.now = now

    @contextmanager
    def call(self, client: str, name: str) -> Iterator[None]:
        """Count one call; the context spans it from its first message to its end."""
        _CALL.set(name)  # each call is a task of its own
        self._metrics.calls.labels(name).inc()
        with self._lock:
            facts = self._clients.setdefault(
                client, {"bytes_up": 0, "bytes_down": 0, "steps": 0, "compute_s": 0.0}
            )
            facts["last_seen"] = time.time()
        with self._metrics.running.track_inprogress():
            yield

    def worked(self, client: str, wait_s: float, compute_s: float) -> None:
        """Count one piece of a client's compute, for the call that this task serves: its wait, and its seconds."""
        self._metrics.worked(_CALL.get(), wait_s, compute_s)
        with self._lock:
            if (facts := self._clients.get(client)) is not None:
                facts["compute_s"] += compute_s

    def computed(self, tokens: int) -> None:
        """Count the tokens of one piece of compute: rows times positions."""
        self._metrics.computed_tokens.inc(tokens)

    @contextmanager
    def text(self, client: str, run: ServedRun) -> Iterator[Callable[[int], None]]:
        """Count one text that is generated, and log its begin and its end.

        The function that it gives is told at each token of the bytes of the text's cache.
        """
        tokens = held_bytes = most_bytes = 0

        def hold(size_bytes: int) -> None:
            nonlocal held_bytes
            change, held_bytes = size_bytes - held_bytes, size_bytes
            self._metrics.text_cache.inc(change)
            with self._lock:
                facts = self._clients[client]
                facts["cache_bytes"] = facts.get("cache_bytes", 0) + change

        def count(size_bytes: int) -> None:
            nonlocal tokens, most_bytes
            tokens, most_bytes = tokens + 1, max(most_bytes, size_bytes)
            hold(size_bytes)
            self._metrics.generated_tokens.inc()

        self.line("generate", client=client, run=run.shown, step=run.server_step)
        with self._metrics.texts.track_inprogress():
            try:
                yield count
            finally:
                hold(0)
                self.line("generated", client=client, run=run.shown, tokens=tokens, cache_bytes=most_bytes)

    def transferred(self, client: str, *, up: int, down: int) -> None:
        """Count the message bytes of a client's call since the last count."""
        self._metrics.received_bytes.inc(up)
        self._metrics.sent_bytes.inc(down)
        with self._lock:
            self._clients[client]["bytes_up"] += up
            self._clients[client]["bytes_down"] += down

    def hello(self, client: str, run: ServedRun, version: str, start: int) -> None:
        """Record that a client said hello and goes on after step `start`."""
        with self._lock:
            if run.name not in self._runs and len(self._runs) >= _RUNS_SHOWN:
                oldest = next(iter(self._runs))
                del self._runs[oldest]
                self._losses.pop(oldest, None)
            self._runs.setdefault(run.name, {"step": run.server_step})
            self._runs[run.name] |= {"max_steps": run.training.max_steps, "step": run.server_step}
            self._clients[client]["run"] = run.name
        self.line("hello", client=client, run=run.name, version=version[:40], start=start)

    def stepped(self, run: ServedRun, client: str) -> None:
        """Record that a training step was executed."""
        self._metrics.steps.inc()
        with self._lock:
            self._clients[client]["steps"] += 1
            self._runs.get(run.name, {})["step"] = run.server_step  # of a run that is shown no more: nothing
            if run.last_loss is not None and run.name in self._runs:
                losses = self._losses.setdefault(run.name, deque())
                losses.append((run.server_step, run.last_loss))
                if len(losses) > _POINTS:
                    self._losses[run.name] = deque(list(losses)[::2])

    def closing_round(self) -> None:
        """Count the compute of this task as that of closing rounds, which is no call's."""
        _CALL.set("Round")

    def round_closed(self, run: ServedRun, number: int, dropped: list[str]) -> None:
        """Record that a synchronous round was applied; the clients `dropped` did not contribute."""
        self._metrics.rounds_closed.inc()
        self._metrics.absences.inc(len(dropped))
        with self._lock:
            self._runs.get(run.name, {})["step"] = run.server_step
        if dropped:
            self.line("dropped", run=run.name, round=number, clients=dropped)

    def refused(self, client: str, call: str, error: HoslError) -> None:
        """Record that a call ended with one of hosl's own errors."""
        self._metrics.refusals.labels(call, type(error).__name__).inc()
        if times := self._times(client, call, error):
            name = type(error).__name__
            self.line("refused", client=client, call=call, error=name, said=str(error)[:300], times=times)

    def broke(self, client: str, call: str, error: Exception) -> None:
        """Record that a call failed by a bug of the server."""
        self._metrics.refusals.labels(call, "FailureError").inc()
        if times := self._times(client, call, error):
            trace = "".join(traceback.format_exception(error))[-2000:]
            self.line(
                "failed", client=client, call=call, error=type(error).__name__, trace=trace, times=times
            )

    def _times(self, client: str, call: str, error: Exception) -> int:
        """How often this has happened since its last log line; 0: too soon for another."""
        key, now = (client, call, type(error).__name__), time.monotonic()
        last, times = self._quiet.get(key, (-_QUIET_S, 0))
        due = now - last >= _QUIET_S
        self._quiet[key] = (now, 0) if due else (last, times + 1)
        if len(self._quiet) > self._most_quiet:
            self._quiet = {k: kept for k, kept in self._quiet.items() if kept[1] or now - kept[0] < _QUIET_S}
            self._most_quiet = max(_REFUSALS_KEPT, 2 * len(self._quiet))
        return times + 1 if due else 0

    def damaged(self, said: str) -> None:
        """Record that a checkpoint on the disk is damaged."""
        self.line("damaged", said=said)

    def unwritten(self, said: str) -> None:
        """Record that a file which only tells about the service cannot be written."""
        self.line("unwritten", said=said)

    def line(self, event: str, **facts: Any) -> None:
        """Write one structured log line: a JSON object."""
        self._log(json.dumps({"time": round(time.time(), 3), "event": event, **facts}))

    def merged(self) -> dict[str, int]:
        """The passes that may answer questions of several clients, and the questions that they answered."""
        return {
            "merged_passes": int(_value(self._metrics.merged_passes)),
            "merged_questions": int(_value(self._metrics.merged_questions)),
        }

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self._metrics.exposition()

    def state(self) -> dict[str, Any]:
        """The state that the live page shows: clients, runs with their losses, queue."""
        with self._lock:
            runs = {
                name: facts | {"losses": list(self._losses.get(name, ()))}
                for name, facts in self._runs.items()
            }
            clients = {name: dict(facts) for name, facts in self._clients.items()}
        queue, texts, cache_bytes = map(
            _value, (self._metrics.queue, self._metrics.texts, self._metrics.text_cache)
        )
        merged = self.merged()
        return {
            "started": self.started,
            "now": time.time(),
            "runs": runs,
            "clients": clients,
            "queue": queue,
            "texts": texts,
            "cache_bytes": cache_bytes,
            "questions_per_pass": merged["merged_questions"] / max(merged["merged_passes"], 1),
        }


def _value(metric: Any) -> float:
    return next(sample.value for family in metric.collect() for sample in family.samples)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
