"""The monitoring of the service: Prometheus metrics, structured log lines, the state that the live page shows."""

import json
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from hosl.errors import HoslError
from hosl.service.runs import ServedRun

_POINTS = 2000
"""The number of losses kept per run for the live page; above it, every other one is dropped."""
_QUIET_S = 10.0
"""The seconds in which a call that is refused again for the same reason gets no further log line."""


class Status:
    """The counters of one service. Written by the event loop, read by the page's threads."""

    def __init__(self, log: Callable[[str], None] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._steps = Counter(
            "hosl_steps", "Training steps answered", ["run", "client"], registry=self.registry
        )
        self._seconds = Counter("hosl_compute_seconds", "Seconds of compute", ["run"], registry=self.registry)
        self._bytes = Counter("hosl_bytes", "Message bytes", ["client", "direction"], registry=self.registry)
        self._calls = Counter("hosl_calls", "Calls begun", ["client", "call"], registry=self.registry)
        self._refusals = Counter("hosl_refusals", "Calls refused", ["call", "error"], registry=self.registry)
        self._loss = Gauge("hosl_loss_nats", "Last training loss", ["run"], registry=self.registry)
        self._queue = Gauge("hosl_queue", "Pieces of work that wait", registry=self.registry)
        self._passes = Counter(
            "hosl_merged_passes", "Passes that may answer several questions", registry=self.registry
        )
        self._merged = Counter(
            "hosl_merged_questions", "Questions that they answered", registry=self.registry
        )
        self._tensors = Gauge(
            "hosl_tensor_bytes", "Bytes of activations that arrive or are held", registry=self.registry
        )
        self._running = Gauge("hosl_calls_running", "Calls under way", registry=self.registry)
        self._texts = Gauge("hosl_texts_running", "Texts being generated", registry=self.registry)
        self._cache = Gauge("hosl_cache_bytes", "Bytes of their keys and values", registry=self.registry)
        self._generated = Counter(
            "hosl_generated_tokens", "Tokens answered in texts", ["run", "client"], registry=self.registry
        )
        self._log = log or _to_stderr
        self._lock = threading.Lock()
        self._clients: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, dict[str, Any]] = {}
        self._losses: dict[str, deque[tuple[int, float]]] = {}
        self._quiet: dict[tuple[str, str, str], tuple[float, int]] = {}
        """Per client, call and error: when it was logged last, and how often it has come since."""
        self.started = time.time()
        self.ready = False

    def watch_queue(self, length: Callable[[], int]) -> None:
        """Set the function that returns the length of the queue."""
        self._queue.set_function(length)

    def answered_together(self, questions: int) -> None:
        """Count one pass of compute that answered so many questions of a run's clients."""
        self._passes.inc()
        self._merged.inc(questions)

    def watch_tensors(self, taken_bytes: Callable[[], int]) -> None:
        """Set the function that returns the bytes that the tensors of all calls take."""
        self._tensors.set_function(taken_bytes)

    @contextmanager
    def call(self, client: str, name: str) -> Iterator[None]:
        """Count one call; the context spans it from its first message to its end."""
        self._calls.labels(client, name).inc()
        with self._lock:
            facts = self._clients.setdefault(client, {"bytes_up": 0, "bytes_down": 0, "steps": 0})
            facts["last_seen"] = time.time()
        with self._running.track_inprogress():
            yield

    @contextmanager
    def text(self, client: str, run: ServedRun) -> Iterator[Callable[[float, int], None]]:
        """Count one text that is generated, and log its begin and its end.

        The function that it gives is told of each token: the seconds of compute, and the bytes of the text's cache.
        """
        tokens = held_bytes = most_bytes = 0

        def hold(size_bytes: int) -> None:
            nonlocal held_bytes
            change, held_bytes = size_bytes - held_bytes, size_bytes
            self._cache.inc(change)
            with self._lock:
                facts = self._clients[client]
                facts["cache_bytes"] = facts.get("cache_bytes", 0) + change

        def count(seconds: float, size_bytes: int) -> None:
            nonlocal tokens, most_bytes
            tokens, most_bytes = tokens + 1, max(most_bytes, size_bytes)
            hold(size_bytes)
            self._generated.labels(run.shown, client).inc()
            self._seconds.labels(run.shown).inc(seconds)

        self.line("generate", client=client, run=run.shown, step=run.server_step)
        with self._texts.track_inprogress():
            try:
                yield count
            finally:
                hold(0)
                self.line("generated", client=client, run=run.shown, tokens=tokens, cache_bytes=most_bytes)

    def transferred(self, client: str, *, up: int, down: int) -> None:
        """Count the message bytes of a client's call since the last count."""
        self._bytes.labels(client, "up").inc(up)
        self._bytes.labels(client, "down").inc(down)
        with self._lock:
            self._clients[client]["bytes_up"] += up
            self._clients[client]["bytes_down"] += down

    def hello(self, client: str, run: ServedRun, version: str, start: int) -> None:
        """Record that a client said hello and goes on after step `start`."""
        with self._lock:
            self._runs.setdefault(run.name, {"step": run.server_step})
            self._runs[run.name] |= {"max_steps": run.training.max_steps, "step": run.server_step}
            self._clients[client]["run"] = run.name
        self.line("hello", client=client, run=run.name, version=version[:40], start=start)

    def stepped(self, run: ServedRun, client: str, seconds: float) -> None:
        """Record that a training step was executed and took `seconds` of compute."""
        self._steps.labels(run.of, client).inc()
        self._seconds.labels(run.of).inc(seconds)
        with self._lock:
            self._clients[client]["steps"] += 1
            self._runs[run.name]["step"] = run.server_step
            if run.last_loss is not None:
                self._loss.labels(run.of).set(run.last_loss)
                losses = self._losses.setdefault(run.name, deque())
                losses.append((run.server_step, run.last_loss))
                if len(losses) > _POINTS:
                    self._losses[run.name] = deque(list(losses)[::2])

    def round_closed(self, run: ServedRun, number: int, dropped: list[str], seconds: float) -> None:
        """Record that a synchronous round was applied; the clients `dropped` did not contribute."""
        self._seconds.labels(run.of).inc(seconds)
        with self._lock:
            self._runs[run.name]["step"] = run.server_step
        if dropped:
            self.line("dropped", run=run.name, round=number, clients=dropped)

    def refused(self, client: str, call: str, error: HoslError) -> None:
        """Record that a call ended with one of hosl's own errors."""
        self._refusals.labels(call, type(error).__name__).inc()
        if times := self._times(client, call, error):
            name = type(error).__name__
            self.line("refused", client=client, call=call, error=name, said=str(error)[:300], times=times)

    def broke(self, client: str, call: str, error: Exception) -> None:
        """Record that a call failed by a bug of the server."""
        self._refusals.labels(call, "FailureError").inc()
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
        return times + 1 if due else 0

    def damaged(self, said: str) -> None:
        """Record that a checkpoint on the disk is damaged."""
        self.line("damaged", said=said)

    def line(self, event: str, **facts: Any) -> None:
        """Write one structured log line: a JSON object."""
        self._log(json.dumps({"time": round(time.time(), 3), "event": event, **facts}))

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def state(self) -> dict[str, Any]:
        """The state that the live page shows: clients, runs with their losses, queue."""
        with self._lock:
            runs = {
                name: facts | {"losses": list(self._losses.get(name, ()))}
                for name, facts in self._runs.items()
            }
            clients = {name: dict(facts) for name, facts in self._clients.items()}
        queue, texts, cache_bytes, passes, merged = (
            next(sample.value for metric in gauge.collect() for sample in metric.samples)
            for gauge in (self._queue, self._texts, self._cache, self._passes, self._merged)
        )
        return {
            "started": self.started,
            "now": time.time(),
            "runs": runs,
            "clients": clients,
            "queue": queue,
            "texts": texts,
            "cache_bytes": cache_bytes,
            "questions_per_pass": round(merged / passes, 2) if passes else None,
        }


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
