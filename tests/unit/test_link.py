"""The link emulator delays, paces, cuts and stalls, and changes no byte."""

import random
import socket
import threading
import time
from contextlib import suppress

import pytest

from hosl.errors import ConfigError
from hosl.transport.link import Link, LinkSpec, parse_duration, parse_rate


@pytest.fixture
def echo():
    """The address of a server that sends back what it gets, until its peer ends."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection:
            while True:
                try:
                    data = connection.recv(1 << 16)
                    if not data:
                        return
                    connection.sendall(data)
                except OSError:
                    return

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()
    listener.close()


def _send_all(connection, data):
    with suppress(OSError):  # the reader sees the break
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def _there_and_back(address, data):
    """Send `data` and read the echo to its end."""
    with socket.create_connection(address, timeout=30) as connection:
        sender = threading.Thread(
            target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR))
        )
        sender.start()
        back = bytearray()
        while part := connection.recv(1 << 16):
            back += part
        sender.join()
        if len(back) < len(data):
            raise ConnectionResetError
    return bytes(back)


def _until_broken(connection):
    while True:
        connection.sendall(b"x")
        if not connection.recv(1):
            raise ConnectionResetError


def test_bytes_come_through_unchanged_and_are_counted(echo):
    data = random.Random(0).randbytes(3_000_000)
    with Link(echo, LinkSpec(rtt_s=0.02)) as link:
        assert _there_and_back(link.address, data) == data
        assert (link.bytes_up, link.bytes_down, link.connections) == (len(data), len(data), 1)


def test_a_round_trip_takes_at_least_its_time(echo):
    with Link(echo, LinkSpec(rtt_s=0.2)) as link:
        begin = time.monotonic()
        assert _there_and_back(link.address, b"x") == b"x"
        assert time.monotonic() - begin >= 0.2


def test_a_rate_is_not_exceeded(echo):
    data = bytes(250_000)  # 2 Mbit
    with Link(echo, LinkSpec(up_bits_per_s=4e6)) as link:
        begin = time.monotonic()
        assert _there_and_back(link.address, data) == data
        assert time.monotonic() - begin >= 0.9 * 0.5


def test_a_cut_breaks_connections_and_new_ones_work(echo):
    with Link(echo, LinkSpec()) as link:
        with socket.create_connection(link.address, timeout=10) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
            link.cut()
            with pytest.raises(ConnectionError):
                _until_broken(connection)
        assert _there_and_back(link.address, b"again") == b"again"


def test_a_connection_is_cut_after_its_share(echo):
    with Link(echo, LinkSpec(drop_every_bytes=100_000)) as link:
        assert _there_and_back(link.address, bytes(40_000)) == bytes(40_000)
        with pytest.raises(ConnectionError):
            _there_and_back(link.address, bytes(500_000))


def test_a_stalled_link_delivers_when_it_goes_on(echo):
    with Link(echo, LinkSpec()) as link, socket.create_connection(link.address, timeout=0.3) as connection:
        link.pause()
        time.sleep(0.05)
        connection.sendall(b"late")
        with pytest.raises(TimeoutError):
            connection.recv(4)
        link.resume()
        connection.settimeout(10)
        assert connection.recv(4) == b"late"


@pytest.mark.parametrize(("text", "seconds"), [("50ms", 0.05), ("1.5s", 1.5), ("200us", 0.0002)])
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "rate"), [("10mbit", 1e7), ("1gbit", 1e9), ("500kbit", 5e5)])
def test_rates_are_read(text, rate):
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "10", "10mb", "-5ms", "0mbit"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ConfigError, match="units are"):
        parse_rate(text)
    with pytest.raises(ConfigError, match="must be > 0"):
        LinkSpec(up_bits_per_s=0.0)
