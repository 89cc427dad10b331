"""A slow, thin or broken link, in user space: a TCP proxy on loopback in front of a server. For tests and studies.

What a link does: each direction delays every byte by half the round trip and passes no more than its rate, shared by
all connections. Nothing is reordered; TCP above it sees what it would see behind a router with a deep queue.
"""

import asyncio
import re
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hosl.errors import ConfigError

_CHUNK_BYTES = 1 << 14
_DURATIONS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """How good a link is."""

    rtt_s: float = 0.0
    """Added to every round trip."""
    up_bits_per_s: float | None = None
    """From client to server; None: no limit."""
    down_bits_per_s: float | None = None
    drop_every_bytes: int | None = None
    """Every connection is cut after so many bytes either way."""

    def __post_init__(self) -> None:
        if not self.rtt_s >= 0:
            raise ConfigError(f"link rtt must be >= 0 seconds, got {self.rtt_s}")
        for name in ("up_bits_per_s", "down_bits_per_s", "drop_every_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"link {name} must be > 0, got {value}; leave it out for no limit")


class _Direction:
    """One direction of all connections: its pacer and its counter."""

    def __init__(self, delay_s: float, bits_per_s: float | None) -> None:
        self.delay_s, self.bits_per_s = delay_s, bits_per_s
        self.passed_bytes = 0
        self._free_at = 0.0
        # what may be under way at once: the link's own content, and some
        self.window_bytes = max(1 << 20, int(2 * (bits_per_s or 0.0) / 8 * 2 * delay_s))

    def due(self, now: float, size_bytes: int) -> float:
        """When a chunk that arrives `now` has come out at the other end."""
        begin = max(now, self._free_at)
        self._free_at = begin + (size_bytes * 8 / self.bits_per_s if self.bits_per_s else 0.0)
        return self._free_at + self.delay_s


class Link:
    """The proxy, in a thread of its own while the fence is open."""

    def __init__(self, target: tuple[str, int], spec: LinkSpec, *, host: str = "127.0.0.1") -> None:
        self._target, self._spec, self._host = target, spec, host
        self._up = _Direction(spec.rtt_s / 2, spec.up_bits_per_s)
        self._down = _Direction(spec.rtt_s / 2, spec.down_bits_per_s)
        self._open: dict[Any, int] = {}
        self.connections = 0
        """Accepted so far."""

    @property
    def bytes_up(self) -> int:
        """Passed from client to server so far."""
        return self._up.passed_bytes

    @property
    def bytes_down(self) -> int:
        """Passed from server to client so far."""
        return self._down.passed_bytes

    def __enter__(self) -> "Link":
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hosl-link", daemon=True)
        self._thread.start()
        self._server = self._in_loop(asyncio.start_server(self._serve, self._host, 0))
        self.address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_loop(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Break every connection, as a router that is switched off; new ones may be made at once."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def pause(self) -> None:
        """Let nothing through until `resume`; connections stay."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def resume(self) -> None:
        """Let everything through that has waited."""
        self._loop.call_soon_threadsafe(self._flowing.set)

    def _in_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def _abort_all(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        self._flowing.set()
        self._abort_all()  # every task ends by itself when its connection is gone
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._open |= dict.fromkeys(pair, 0)
        try:
            await asyncio.gather(
                self._carry(reader, far_writer, self._up, pair),
                self._carry(far_reader, writer, self._down, pair),
            )
        except OSError:
            pass  # a side that is gone takes the other with it, below
        finally:
            for side in pair:
                self._open.pop(side, None)
                side.transport.abort()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: _Direction,
        pair: tuple[Any, Any],
    ) -> None:
        """Read, hold back until due, write; reading goes on meanwhile, so that delay costs no throughput."""
        under_way: deque[tuple[float, bytes]] = deque()
        changed, held_bytes = asyncio.Event(), 0

        async def deliver() -> None:
            nonlocal held_bytes
            while True:
                while not under_way:
                    changed.clear()
                    await changed.wait()
                due, data = under_way[0]
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._flowing.wait()
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
                under_way.popleft()
                held_bytes -= len(data)
                changed.set()
                way.passed_bytes += len(data)
                self._count(pair, len(data))

        delivery = asyncio.create_task(deliver())
        try:
            while True:
                data = await reader.read(_CHUNK_BYTES)
                under_way.append((way.due(self._loop.time(), len(data)), data))
                held_bytes += len(data)
                changed.set()
                if not data:
                    break
                while held_bytes > way.window_bytes and not delivery.done():
                    changed.clear()
                    await changed.wait()
            await delivery
        finally:
            delivery.cancel()

    def _count(self, pair: tuple[Any, Any], size_bytes: int) -> None:
        limit, near = self._spec.drop_every_bytes, pair[0]
        self._open[near] = self._open.get(near, 0) + size_bytes
        if limit is not None and self._open[near] >= limit:
            for side in pair:
                side.transport.abort()


def parse_duration(text: str) -> float:
    """Seconds of `50ms`, `1.5s`, `200us`.

    Raises:
        ConfigError: if it is none.
    """
    return _parsed(text, _DURATIONS, "a duration", "50ms")


def parse_rate(text: str) -> float:
    """Bits per second of `10mbit`, `1gbit`, `500kbit`.

    Raises:
        ConfigError: if it is none, or zero.
    """
    return _parsed(text, _RATES, "a rate", "10mbit", allowed=lambda value: value > 0)


def _parsed(
    text: str,
    units: dict[str, float],
    what: str,
    example: str,
    allowed: Callable[[float], bool] = lambda value: True,
) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if not found or found[2] not in units or not allowed(float(found[1])):
        raise ConfigError(f"{text!r} is not {what} such as {example}; units are {', '.join(units)}")
    return float(found[1]) * units[found[2]]
