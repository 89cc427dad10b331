"""The Prometheus metrics of a service: names by the convention, in base units, counters that end with `_total`.

No label grows with the clients that ever came: a series of each of 1,000 clients made a scrape of 0.9 MB, 0.13 CPU
seconds of a process that computes meanwhile. What each client did is on the live page and in `hosl runs show`. The
label `run` has the runs in memory alone, `call` and `error` have names of the code.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hosl.service.operation.now import RunNow

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""The upper bounds of the histograms: from a tiny half's question to a large half's load."""


class Metrics:
    """The metrics of one service. Written by the event loop, read by the page's threads."""

    def __init__(self) -> None:
        disable_created_metrics()  # of the whole process: a second series for each, which nobody draws
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("hosl_build", "The server's version", registry=registry).info({"version": version("hosl")})

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        self.calls = counter("hosl_calls_total", "Calls begun", "call")
        self.refusals = counter("hosl_refusals_total", "Calls refused, by their error", "call", "error")
        self.received_bytes = counter("hosl_received_bytes_total", "Bytes of messages from clients")
        self.sent_bytes = counter("hosl_sent_bytes_total", "Bytes of messages to clients")
        self.steps = counter("hosl_steps_total", "Training steps answered")
        self.computed_tokens = counter("hosl_computed_tokens_total", "Tokens computed, rows times positions")
        self.merged_passes = counter("hosl_merged_passes_total", "Passes that may answer several questions")
        self.merged_questions = counter("hosl_merged_questions_total", "Questions that they answered")
        self.generated_tokens = counter("hosl_generated_tokens_total", "Tokens answered in texts")
        self.rounds_closed = counter("hosl_rounds_closed_total", "Synchronous rounds applied")
        self.absences = counter("hosl_round_absences_total", "Clients that a round was applied without")
        self.compute_seconds = Histogram(
            "hosl_compute_seconds", "Seconds of one piece of compute", ["call"],
            buckets=_BOUNDS_S, registry=registry,
        )  # fmt: skip
        self.wait_seconds = Histogram(
            "hosl_wait_seconds", "Seconds that a piece of compute waited for its turn",
            buckets=_BOUNDS_S, registry=registry,
        )  # fmt: skip
        self.queue = gauge("hosl_queue_length", "Pieces of compute that wait")
        self.tensors = gauge("hosl_tensor_bytes", "Bytes of activations that arrive or are held")
        self.running = gauge("hosl_calls_running", "Calls under way")
        self.texts = gauge("hosl_texts_running", "Texts being generated")
        self.text_cache = gauge("hosl_text_cache_bytes", "Bytes of keys and values of texts")
        self.disk_free = gauge("hosl_disk_free_bytes", "Bytes free where the service keeps its runs")
        self.runs = _Runs()
        registry.register(self.runs)

    def worked(self, call: str, wait_s: float, compute_s: float) -> None:
        """Count one piece of compute."""
        self.wait_seconds.observe(wait_s)
        self.compute_seconds.labels(call).observe(compute_s)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Runs(Collector):
    """The runs in memory, read at each scrape: one that has left has no series."""

    now: Callable[[], Iterable[RunNow]] = staticmethod(tuple)

    def describe(self) -> Iterator[Metric]:
        """The metrics without their samples, for the registry."""
        return self._families(())

    def collect(self) -> Iterator[Metric]:
        """The metrics of the runs in memory."""
        return self._families(tuple(self.now()))

    @staticmethod
    def _families(runs: tuple[RunNow, ...]) -> Iterator[Metric]:
        values: dict[tuple[str, str], Callable[[RunNow], float | None]] = {
            ("hosl_run_step", "Updates of the server half"): lambda run: run.step,
            ("hosl_run_max_steps", "Steps that each client does"): lambda run: run.max_steps,
            ("hosl_run_loss_nats", "Training loss of the newest step"): lambda run: run.loss,
            ("hosl_run_clients_present", "Clients heard lately"): lambda run: run.present,
            ("hosl_run_clients_expected", "Clients that the run is for"): lambda run: run.expected,
        }
        for (name, text), value in values.items():
            family = GaugeMetricFamily(name, text, labels=["run"])
            for run in runs:
                if (number := value(run)) is not None:
                    family.add_metric([run.name], number)
            yield family
