"""The link emulator delays, paces, cuts and stalls, and changes no byte.

Times are bounded from below only: a slow machine makes nothing fail. `PATIENCE_S` is there so that nothing hangs.
"""

import random
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from hosl.errors import ConfigError
from hosl.transport.link import Link, LinkSpec, parse_duration, parse_rate

PATIENCE_S = 30.0


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(PATIENCE_S)
        yield listening


@contextmanager
def _pair(link, listener):
    """The client's and the server's end of a new connection through the link."""
    with socket.create_connection(link.address, timeout=PATIENCE_S) as client:
        server, _ = listener.accept()
        with server:
            server.settimeout(PATIENCE_S)
            yield client, server


@contextmanager
def _beside(work, *arguments):
    """Runs `work` in a thread while the block runs; at the end both are done."""
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    try:
        yield
    finally:
        thread.join(2 * PATIENCE_S)
    assert not thread.is_alive()


def _send(connection, data):
    with suppress(OSError):  # whoever reads sees the break
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def _read_to_end(connection):
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def _break_of(connection):
    try:
        _read_to_end(connection)
    except OSError as error:
        return error


def _send_and_read_to_end(connection, data):
    connection.sendall(data)
    _read_to_end(connection)


def _connect_and_read(address):
    with socket.create_connection(address, timeout=PATIENCE_S) as connection:
        connection.recv(1)


def _fill(connection):
    """Send until the link takes no more for a while."""
    connection.settimeout(0.3)
    with suppress(TimeoutError):
        while True:
            connection.send(bytes(1 << 16))


def _assert_passes(link, listener, data=b"hello"):
    with _pair(link, listener) as (client, server):
        _send(client, data)
        assert _read_to_end(server) == data


@pytest.mark.parametrize(
    "spec", [LinkSpec(), LinkSpec(rtt_s=0.02), LinkSpec(rtt_s=0.01, up_bits_per_s=1e8, down_bits_per_s=2e8)]
)
def test_bytes_come_through_unchanged_both_ways_at_once_and_are_counted(listener, spec):
    up, down = random.Random(0).randbytes(3_000_000), random.Random(1).randbytes(5_000_000)
    with Link(listener.getsockname(), spec) as link, _pair(link, listener) as (client, server):
        got = []
        with (
            _beside(_send, client, up),
            _beside(_send, server, down),
            _beside(lambda: got.append(_read_to_end(server))),
        ):
            assert _read_to_end(client) == down
        assert got == [up]
        assert (link.bytes_up, link.bytes_down, link.connections) == (len(up), len(down), 1)


def test_a_reader_that_starts_late_gets_the_tail_too(listener):
    data = random.Random(2).randbytes(6_000_000)
    with Link(listener.getsockname(), LinkSpec()) as link, _pair(link, listener) as (client, server):
        server.shutdown(socket.SHUT_WR)  # only one direction is left, and it waits for the reader
        with _beside(_send, client, data):
            assert client.recv(1) == b""
            time.sleep(0.1)
            assert _read_to_end(server) == data


def test_the_end_of_one_stream_leaves_the_other_open(listener):
    with Link(listener.getsockname(), LinkSpec()) as link, _pair(link, listener) as (client, server):
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(b"still here")
        assert client.recv(10) == b"still here"


def test_a_round_trip_takes_at_least_its_time(listener):
    with (
        Link(listener.getsockname(), LinkSpec(rtt_s=0.2)) as link,
        _pair(link, listener) as (client, server),
    ):
        for _ in range(2):
            begin = time.monotonic()
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            assert time.monotonic() - begin >= 0.1
            server.sendall(b"y")
            assert client.recv(1) == b"y"
            assert time.monotonic() - begin >= 0.2


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_rate_is_not_exceeded(listener, way):
    data, rate = bytes(250_000), 4e6
    spec = LinkSpec(up_bits_per_s=rate) if way == "up" else LinkSpec(down_bits_per_s=rate)
    with Link(listener.getsockname(), spec) as link, _pair(link, listener) as (client, server):
        source, sink = (client, server) if way == "up" else (server, client)
        begin = time.monotonic()
        with _beside(_send, source, data):
            assert _read_to_end(sink) == data
        assert time.monotonic() - begin >= 0.9 * len(data) * 8 / rate


def test_connections_share_the_rate(listener):
    data, rate = bytes(125_000), 4e6
    with (
        Link(listener.getsockname(), LinkSpec(up_bits_per_s=rate)) as link,
        _pair(link, listener) as (one, one_server),
        _pair(link, listener) as (other, other_server),
    ):
        begin = time.monotonic()
        with _beside(_send, one, data), _beside(_send, other, data):
            assert _read_to_end(one_server) == _read_to_end(other_server) == data
        assert time.monotonic() - begin >= 0.9 * 2 * len(data) * 8 / rate
        assert link.connections == 2


def test_a_cut_resets_both_sides_and_new_connections_work(listener):
    with Link(listener.getsockname(), LinkSpec()) as link:
        with _pair(link, listener) as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            link.cut()
            for side in (client, server):
                with pytest.raises(ConnectionError):
                    side.recv(1)
        _assert_passes(link, listener)


def test_what_a_cut_connection_had_under_way_holds_up_nobody(listener):
    """At this rate the megabyte that the link holds would take 80 s, more than anyone waits here."""
    with Link(listener.getsockname(), LinkSpec(up_bits_per_s=1e5)) as link:
        with _pair(link, listener) as (client, _):
            _fill(client)
            link.cut()
        _assert_passes(link, listener)


@pytest.mark.parametrize("paused", [False, True])
def test_a_link_that_is_full_ends_at_once_and_resets_its_connections(listener, paused):
    with Link(listener.getsockname(), LinkSpec(up_bits_per_s=1e5)) as link:
        client = socket.create_connection(link.address, timeout=PATIENCE_S)
        server, _ = listener.accept()
        _fill(client)
        if paused:
            link.pause()
    assert "hosl-link" not in [thread.name for thread in threading.enumerate()]
    with client, server:
        with pytest.raises(ConnectionError):
            client.recv(1)
        server.settimeout(PATIENCE_S)
        with pytest.raises(ConnectionError):
            _read_to_end(server)


@pytest.mark.parametrize("answers", [False, True])
def test_a_connection_is_cut_after_its_share_of_both_directions(listener, answers):
    share = 100_000
    with Link(listener.getsockname(), LinkSpec(drop_every_bytes=share)) as link:
        _assert_passes(link, listener, bytes(share - 1))
        assert link.bytes_up == share - 1
        with _pair(link, listener) as (client, server):
            if answers:
                server.sendall(bytes(30_000))
                assert len(client.recv(30_000, socket.MSG_WAITALL)) == 30_000
            breaks = []
            with _beside(lambda: breaks.append(_break_of(server))), pytest.raises(ConnectionError):
                _send_and_read_to_end(client, bytes(5 * share))  # the break is told once: here or there
            assert isinstance(breaks[0], ConnectionError)
        assert link.bytes_up + link.bytes_down == 2 * share - 1
        _assert_passes(link, listener)  # every connection has its own share


def test_a_server_that_is_not_there_resets_the_client(listener):
    target = listener.getsockname()
    listener.close()
    with Link(target, LinkSpec()) as link, pytest.raises(ConnectionError):
        _connect_and_read(link.address)  # the reset may come before connect() returns


def test_a_stalled_link_accepts_and_holds_and_delivers_when_it_goes_on(listener):
    with Link(listener.getsockname(), LinkSpec()) as link:
        link.pause()
        with _pair(link, listener) as (client, server):
            _send(client, b"late")
            server.settimeout(0.3)
            with pytest.raises(TimeoutError):
                server.recv(4)
            assert (link.bytes_up, link.connections) == (0, 1)
            link.resume()
            server.settimeout(PATIENCE_S)
            assert _read_to_end(server) == b"late"
            assert link.bytes_up == 4


def test_a_host_that_is_not_ours_is_refused():
    with (
        pytest.raises(ConfigError, match=r"192\.0\.2\.1: cannot listen"),
        Link(("127.0.0.1", 1), LinkSpec(), host="192.0.2.1"),
    ):
        pass  # 192.0.2.0/24 is reserved for documentation: no machine has it


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("1.5s", 1.5), ("200us", 0.0002), ("0ms", 0.0)]
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "rate"), [("10mbit", 1e7), ("1gbit", 1e9), ("500kbit", 5e5)])
def test_rates_are_read(text, rate):
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "50", "50 minutes", "-5ms", "1e3ms", "10mbit"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match=r"units are us, ms, s$"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "fast", "10", "10mb", "-5mbit", "0mbit", "50ms"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ConfigError, match=r"units are kbit, mbit, gbit$"):
        parse_rate(text)


@pytest.mark.parametrize(
    "setting",
    [
        {"rtt_s": -0.1},
        {"rtt_s": float("nan")},
        {"rtt_s": float("inf")},
        {"up_bits_per_s": 0.0},
        {"down_bits_per_s": float("inf")},
        {"drop_every_bytes": 0},
    ],
    ids=str,
)
def test_an_impossible_link_is_refused_by_name(setting):
    with pytest.raises(ConfigError, match=f"link {next(iter(setting))} must be .* got "):
        LinkSpec(**setting)
