"""/metrics: names by Prometheus' convention, a size that does not grow with the clients, and the right counts."""

import asyncio
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hosl.errors import LimitError
from hosl.service.operation.now import ClientNow, RunNow
from hosl.service.runs import ServedRun
from hosl.service.status import Status
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import MODEL, CountingHalf, Service, in_loop, training

BASE_UNITS = ("seconds", "bytes", "nats")
OTHER_UNITS = re.compile(r"_(s|ms|us|ns|sec|minutes|hours|days|b|kb|kib|mb|mib|gb|gib|bits|percent)(_|$)")
KINDS = ("gauge", "counter", "histogram", "summary")


def _families(service_status):
    text = service_status.exposition().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def _value(families, sample, **labels):
    (value,) = (
        s.value
        for f in families.values()
        for s in f.samples
        if s.name == sample and labels.items() <= s.labels.items()
    )
    return value


@pytest.fixture
def busy(tmp_path):
    """The service after two clients' work in one run: rounds, a refusal, a hello."""

    async def run():
        service = Service(tmp_path)
        service.status.watch_runs(service.sessions.now)
        service.status.watch_disk(lambda: 7)
        settings = training(clients=2, grace_s=0.05)
        sessions = {name: (await service.hello(name, settings)).session for name in "ab"}
        for step in (1, 2):
            for name in "ab" if step == 1 else "a":
                await service.step(name, sessions[name], step)
            first = service.hand_in("a", sessions["a"], step)
            if step == 1:
                await asyncio.gather(first, service.hand_in("b", sessions["b"], step))
            else:
                await first
        service.status.refused("b", "Losses", LimitError("too many"))
        service.status.transferred("a", up=30, down=4)
        return service

    return in_loop(run())


def test_every_name_follows_the_convention(busy):
    families = _families(busy.status)
    assert len(families) > 20
    for name, family in families.items():
        assert re.fullmatch(r"(hosl|process|python)_[a-z0-9_]+", name), name
        assert family.documentation, name
        assert family.type in KINDS, name
        assert not OTHER_UNITS.search(name), name
        assert not any(kind in name for kind in KINDS), name
        totals = {s.name.endswith("_total") for s in family.samples}
        assert totals <= {family.type == "counter"}, name
        for unit in BASE_UNITS:  # at the end of the name, before what the type adds
            assert unit not in name or re.search(rf"_{unit}(_total)?$", name), name
    timed = [name for name in families if "second" in name]
    assert {"hosl_wait_seconds", "hosl_compute_seconds"} <= set(timed)


def test_help_and_type_stand_before_the_samples_of_each_metric_and_none_is_there_twice(busy):
    said, seen = "", []
    for line in busy.status.exposition().decode().splitlines():
        if line.startswith("# HELP "):
            said = line.split()[2]
            assert said not in seen
            seen.append(said)
        elif line.startswith("# TYPE "):
            assert line.split()[2] == said
        else:
            assert line.startswith(said), line
    assert not any(name.endswith("_created") for name in seen)


def test_the_counts_are_those_of_what_was_done(busy):
    families = _families(busy.status)
    assert _value(families, "hosl_calls_total", call="_step") == 3
    assert _value(families, "hosl_steps_total") == 3
    assert _value(families, "hosl_computed_tokens_total") == 3 * 2 * 3  # of activations [2, 3, width]
    assert _value(families, "hosl_refusals_total", call="Losses", error="LimitError") == 1
    assert _value(families, "hosl_received_bytes_total") == 30
    assert _value(families, "hosl_sent_bytes_total") == 4
    assert _value(families, "hosl_rounds_closed_total") == 2
    assert _value(families, "hosl_round_absences_total") == 1
    assert _value(families, "hosl_compute_seconds_count", call="_step") == 3
    assert _value(families, "hosl_compute_seconds_bucket", call="_step", le="+Inf") == 3
    assert _value(families, "hosl_disk_free_bytes") == 7
    assert _value(families, "hosl_run_step", run="run") == 2
    assert _value(families, "hosl_run_clients_present", run="run") == 2
    assert _value(families, "hosl_run_clients_expected", run="run") == 2
    assert _value(families, "hosl_queue_length") == 0


def test_the_seconds_of_compute_are_those_of_the_client_that_asked(busy):
    clients = busy.status.state()["clients"]
    assert clients["a"]["compute_s"] > 0
    families = _families(busy.status)
    computed_s = sum(
        s.value for s in families["hosl_compute_seconds"].samples if s.name == "hosl_compute_seconds_sum"
    )
    assert sum(facts["compute_s"] for facts in clients.values()) <= computed_s


def test_a_thousand_clients_make_no_more_series_than_one():
    def lines(clients):
        status = Status(log=lambda line: None)
        now = {f"device-{n}": ClientNow(3, 1.0, True) for n in range(clients)}
        status.watch_runs(lambda: [RunNow("run", 3, 10, 0.5, clients, now)])
        for name in now:
            with status.call(name, "Losses"):
                status.transferred(name, up=1, down=1)
                status.worked(name, 0.1, 0.2)
        return status.exposition().count(b"\n")

    assert lines(1000) == lines(1)


def test_a_run_that_has_left_the_memory_has_no_series(tmp_path):
    async def run():
        service = Service(tmp_path)
        service.status.watch_runs(service.sessions.now)
        alone = training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL)
        session = (await service.hello("a", alone)).session
        await service.leave("a", session)
        await service.hello("b", alone, run="another")
        return service.status.exposition().decode()

    text = in_loop(run())
    assert 'hosl_run_step{run="another"}' in text
    assert 'run="run"' not in text


def test_clients_with_adapters_of_their_own_do_not_fill_the_live_page_however_many(tmp_path):
    """Each client's part of such a run is one of the page's runs."""
    status = Status(log=lambda line: None)
    parts = [
        ServedRun(
            f"run/{n}",
            MODEL,
            training(),
            CountingHalf(),
            tmp_path / "runs/run/clients/n/checkpoints",
            client="n",
        )
        for n in range(300)
    ]
    for part in parts:
        part.server_step, part.last_loss = 1, 0.5
    for part in parts:
        with status.call(part.name, "Hello"):
            status.hello(part.name, part, "1", 0)
    for part in parts:
        status.stepped(part, part.name)
    assert set(status.state()["runs"]) == {f"run/{n}" for n in range(200, 300)}
    assert [len(run["losses"]) for run in status.state()["runs"].values()] == [1] * 100
    assert len(status._losses) == 100


def test_refusals_of_many_clients_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr("hosl.service.status._QUIET_S", 0.0)
    status = Status(log=lambda line: None)
    for number in range(1500):
        status.refused(f"device-{number}", "Losses", LimitError("too many"))
    assert len(status._quiet) <= 1025
