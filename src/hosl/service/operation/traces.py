"""OpenTelemetry: a span for each call, with the seconds that it waited for its turn and that were computed for it.

A server without `--traces` does not import this file: its `Status` is the plain one, so that a call has nothing to ask.
Spans are sent by OTLP over HTTP in batches, by a thread; they hold names and times, and nothing of what was computed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

from hosl.errors import ConfigError, HoslError
from hosl.service.status import Status
from hosl.transport.channel import SERVICE

_COLLECTORS_PATH = "/v1/traces"


class _Work:
    """What was done for one call so far."""

    wait_s = 0.0
    compute_s = 0.0


_WORK: ContextVar[_Work | None] = ContextVar("work", default=None)
"""The work of the call that a task serves."""


class TracedStatus(Status):
    """A `Status` that also makes the spans."""

    def __init__(self, exporter: Any, log: Callable[[str], None] | None = None) -> None:
        """`exporter`: OpenTelemetry's `SpanExporter`, which sends the spans.

        Raises:
            ModuleNotFoundError: if OpenTelemetry is not installed; `hosl.cli.main` says what to install.
        """
        from opentelemetry.sdk.resources import Resource  # pyright: ignore[reportMissingImports]
        from opentelemetry.sdk.trace import TracerProvider  # pyright: ignore[reportMissingImports]
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # pyright: ignore[reportMissingImports]
        from opentelemetry.trace import SpanKind, StatusCode  # pyright: ignore[reportMissingImports]

        super().__init__(log)
        about = Resource.create({"service.name": "hosl", "service.version": version("hosl")})
        self._provider = TracerProvider(resource=about, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("hosl")
        self._of_a_server, self._error = SpanKind.SERVER, StatusCode.ERROR

    @contextmanager
    def call(self, client: str, name: str) -> Iterator[None]:
        """Count one call and make its span; the context spans it from its first message to its end."""
        work = _Work()
        _WORK.set(work)  # each call is a task of its own
        about = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": name, "hosl.client": client}
        span = self._tracer.start_span(name, kind=self._of_a_server, attributes=about)
        try:
            with super().call(client, name):
                yield
        except HoslError as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(self._error, str(error)[:300])
            raise
        finally:
            span.set_attribute("hosl.wait_s", work.wait_s)
            span.set_attribute("hosl.compute_s", work.compute_s)
            span.end()

    def worked(self, client: str, wait_s: float, compute_s: float) -> None:
        """Count one piece of compute, in the call's span too."""
        super().worked(client, wait_s, compute_s)
        if (work := _WORK.get()) is not None:
            work.wait_s += wait_s
            work.compute_s += compute_s

    def close(self) -> None:
        """Send what is left; waits some seconds for a collector that does not answer."""
        self._provider.shutdown()


def traced_to(collector: str) -> TracedStatus:
    """A status whose spans go to the collector of this address, such as http://127.0.0.1:4318.

    Raises:
        ConfigError: if it is no such address.
        ModuleNotFoundError: if OpenTelemetry is not installed.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # pyright: ignore[reportMissingImports]
        OTLPSpanExporter,
    )

    if not collector.startswith(("http://", "https://")):
        raise ConfigError(
            f"--traces {collector}: it is the address of an OpenTelemetry collector, http://HOST:4318 or https://..."
        )
    address = collector.rstrip("/")
    end = "" if address.endswith(_COLLECTORS_PATH) else _COLLECTORS_PATH
    return TracedStatus(OTLPSpanExporter(endpoint=address + end, timeout=5))
