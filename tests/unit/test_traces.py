"""Spans of calls, where a collector is named; and that nothing of them is there where none is."""

import subprocess
import sys

import pytest

from hosl.cli import main
from hosl.errors import ConfigError, StepError
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import Service, in_loop, training


def test_a_server_without_traces_imports_nothing_of_them():
    program = """
import sys
import grpc.aio
from hosl.network.serve import ServeOptions, _status
from hosl.service import calls, page, scheduler, sessions
from pathlib import Path
assert type(_status(ServeOptions(half=Path("half")))).__name__ == "Status"
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stdout == "[]\n", ran.stderr


def test_traces_without_their_packages_name_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for name in [n for n in sys.modules if n.startswith("opentelemetry.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "hosl.service.operation.traces", raising=False)

    def half_facts(half, side):
        return {}

    monkeypatch.setattr("hosl.network.serve.half_facts", half_facts)
    words = ["--service", str(tmp_path), "--traces", "http://127.0.0.1:4318", "--listen", "127.0.0.1:0"]
    assert main(["serve", str(tmp_path), *words]) == 2
    assert "`pip install 'hosl[otel]'`" in capsys.readouterr().err


@pytest.fixture
def spans():
    """The exporter of a traced service's spans, and the service's maker."""
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    return memory.InMemorySpanExporter()


def test_a_call_has_a_span_with_its_wait_and_its_compute(tmp_path, spans):
    from hosl.service.operation.traces import TracedStatus

    alone = training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL)

    async def run():
        service = Service(tmp_path, status=lambda log: TracedStatus(spans, log))
        session = (await service.hello("a", alone)).session
        await service.step("a", session, 1)
        with pytest.raises(StepError):
            await service.step("a", session, 7)
        service.status.close()

    in_loop(run())
    hello, step, refused = spans.get_finished_spans()
    assert [span.name for span in (hello, step, refused)] == ["_hello", "_step", "_step"]
    assert step.attributes["rpc.method"] == "_step"
    assert step.attributes["hosl.client"] == "a"
    lasted_s = (step.end_time - step.start_time) / 1e9
    assert 0 < step.attributes["hosl.compute_s"] <= lasted_s
    assert 0 <= step.attributes["hosl.wait_s"] <= lasted_s
    assert step.status.is_ok
    assert refused.attributes["error.type"] == "StepError"
    assert not refused.status.is_ok
    assert step.resource.attributes["service.name"] == "hosl"


def test_an_address_that_is_no_collectors_is_refused(spans):
    from hosl.service.operation.traces import traced_to

    with pytest.raises(ConfigError, match="--traces collector:4318: it is the address of an OpenTelemetry"):
        traced_to("collector:4318")
