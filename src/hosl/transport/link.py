"""A slow, thin or broken link, in user space: a TCP proxy on loopback in front of a server. For tests and studies.

What a link does: each direction delays every byte by half the round trip and passes no more than its rate, shared by
all connections. Nothing is reordered; TCP above it sees what it would see behind a router with a deep queue.
"""

import asyncio
import math
import re
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hosl.errors import ConfigError

_CHUNK_BYTES = 1 << 16
_CHUNK_S = 0.01
"""A chunk takes the link for no longer than this, so that connections take turns."""
_PACKET_BYTES = 1460
_CATCH_UP_S = 0.05
"""A loop that wakes late may make up for so much; more would let the backlog of a stall through at once."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, for 0 s: closing sends RST. Without it abort() sends FIN, which the peer reads as a proper end."""
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
    """From server to client; None: no limit."""
    drop_every_bytes: int | None = None
    """Every connection is reset after exactly so many bytes, both ways together; None: never."""

    def __post_init__(self) -> None:
        if not (self.rtt_s >= 0 and math.isfinite(self.rtt_s)):
            raise ConfigError(
                f"link rtt_s must be >= 0 seconds and finite, got {self.rtt_s}; 0.0 adds no delay"
            )
        for name in ("up_bits_per_s", "down_bits_per_s", "drop_every_bytes"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(
                    f"link {name} must be > 0 and finite, got {value}; leave it out for no limit"
                )


class _Direction:
    """One direction of the whole link: its delay, the pacer that all connections share, and its counter."""

    def __init__(self, rtt_s: float, bits_per_s: float | None) -> None:
        self.delay_s, self.bits_per_s = rtt_s / 2, bits_per_s
        self.passed_bytes = 0
        self._free_at = 0.0
        # twice what the link itself holds; without a rate, what it would hold at 1 Gbit/s
        self.window_bytes = max(1 << 20, int(2 * (bits_per_s or 1e9) / 8 * rtt_s))
        self.chunk_bytes = _CHUNK_BYTES
        if bits_per_s is not None:
            self.chunk_bytes = min(_CHUNK_BYTES, max(_PACKET_BYTES, int(bits_per_s / 8 * _CHUNK_S)))

    def take_turn(self, due: float, now: float, size_bytes: int) -> float:
        """When a chunk that has been delayed until `due` has passed; the next one passes after it.

        Counted from `due` and not from `now`, so that late timers do not lower the rate.
        """
        if self.bits_per_s is None:
            return due
        begin = max(due, self._free_at, now - _CATCH_UP_S)
        self._free_at = begin + size_bytes * 8 / self.bits_per_s
        return self._free_at


class _Pipe:
    """One direction of one connection: read, hold back until due, write.

    Reading goes on meanwhile, so that delay costs no throughput, until `window_bytes` are held.
    """

    def __init__(
        self, link: "Link", way: _Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._link, self._way, self._reader, self._writer = link, way, reader, writer
        self._under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        self._held_bytes, self._room = 0, asyncio.Event()
        writer.transport.set_write_buffer_limits(high=0)  # drain: all is with the kernel

    async def read(self) -> None:
        """Take in all that comes, to its end."""
        clock = asyncio.get_running_loop().time
        while True:
            data = await self._reader.read(self._way.chunk_bytes)
            self._under_way.put_nowait((clock() + self._way.delay_s, data))
            if not data:
                return
            self._held_bytes += len(data)
            while self._held_bytes > self._way.window_bytes:
                self._room.clear()
                await self._room.wait()

    async def write(self, allowance: "_Allowance") -> None:
        """Give out all that is due, to the end that was read.

        Raises:
            ConnectionAbortedError: when the allowance is used up.
        """
        clock = asyncio.get_running_loop().time
        while True:
            due, data = await self._under_way.get()
            await _sleep_until(due)
            if data:
                await _sleep_until(self._way.take_turn(due, clock(), len(data)))
            await self._link.flowing()
            if not data:
                self._writer.write_eof()
                return
            passing = data[: allowance.take(len(data))]
            self._way.passed_bytes += len(passing)  # before the write: who has the bytes finds them counted
            self._writer.write(passing)
            await self._writer.drain()
            self._held_bytes -= len(data)
            self._room.set()
            if allowance.is_used_up:
                raise ConnectionAbortedError(f"cut after its {allowance.limit_bytes} bytes")


class _Allowance:
    """How much may pass through one connection, both ways together."""

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes, self._left_bytes = limit_bytes, limit_bytes

    def take(self, size_bytes: int) -> int:
        """How many of `size_bytes` may pass."""
        if self._left_bytes is None:
            return size_bytes
        size_bytes = min(size_bytes, self._left_bytes)
        self._left_bytes -= size_bytes
        return size_bytes

    @property
    def is_used_up(self) -> bool:
        """Whether nothing more may pass."""
        return self._left_bytes == 0


class Link:
    """The proxy, in a thread of its own while the context is open; what it does, it has done when a method returns."""

    address: tuple[str, int]
    """Where clients connect to; known inside the context."""

    def __init__(self, target: tuple[str, int], spec: LinkSpec, *, host: str = "127.0.0.1") -> None:
        self._target, self._spec, self._host = target, spec, host
        self._up = _Direction(spec.rtt_s, spec.up_bits_per_s)
        self._down = _Direction(spec.rtt_s, spec.down_bits_per_s)
        self._near_sides: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
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
        ready: Future[tuple[str, int]] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(ready)), name="hosl-link", daemon=True
        )
        self._thread.start()
        try:
            self.address = ready.result()
        except (OSError, UnicodeError) as cause:
            self._thread.join()
            raise ConfigError(
                f"link host {self._host}: cannot listen there: {cause}; "
                "use an address of this machine such as 127.0.0.1"
            ) from cause
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def cut(self) -> None:
        """Reset every connection on both sides; new ones may be made at once. What was under way is lost."""
        self._in_loop(self._reset_all)

    def pause(self) -> None:
        """Let nothing through until `resume`, nor the end of a stream; connections stay, and new ones are accepted."""
        self._in_loop(self._stall)

    def resume(self) -> None:
        """Let everything through that has waited, no faster than the rate."""
        self._in_loop(self._flow)

    def _in_loop(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        assert self._thread.is_alive(), "the link's context is closed"
        asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    async def _main(self, ready: "Future[tuple[str, int]]") -> None:
        self._loop, self._ended, self._flows = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._flows.set()
        try:
            server = await asyncio.start_server(self._accept, self._host, 0)
        except (OSError, UnicodeError) as cause:
            ready.set_exception(cause)
            return
        ready.set_result(server.sockets[0].getsockname()[:2])
        await self._ended.wait()
        server.close()
        await self._reset_all()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._ended.is_set():
            writer.transport.abort()
            return
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._near_sides[task] = writer
        task.add_done_callback(self._near_sides.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sides = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            sides.append(far_writer)
            allowance = _Allowance(self._spec.drop_every_bytes)
            async with asyncio.TaskGroup() as group:
                for way, source, sink in (
                    (self._up, reader, far_writer),
                    (self._down, far_reader, writer),
                ):
                    pipe = _Pipe(self, way, source, sink)
                    group.create_task(pipe.read())
                    group.create_task(pipe.write(allowance))
            for side in sides:
                side.close()  # flushes: both streams came to their ends
                await side.wait_closed()
        except* OSError:
            pass  # a side that is gone takes the other with it, below
        finally:
            for side in sides:
                _reset(side)
            for side in sides:
                with suppress(OSError):
                    await side.wait_closed()

    async def flowing(self) -> None:
        """Waits while the link is stalled."""
        while not self._flows.is_set():  # again: it may be stalled anew before this task wakes
            await self._flows.wait()

    async def _stall(self) -> None:
        self._flows.clear()

    async def _flow(self) -> None:
        self._flows.set()

    async def _reset_all(self) -> None:
        near_sides = dict(self._near_sides)
        for task, writer in near_sides.items():
            _reset(writer)  # the task would not if it is cancelled before it begins
            task.cancel()
        await asyncio.gather(*near_sides, return_exceptions=True)


async def _sleep_until(due: float) -> None:
    wait_s = due - asyncio.get_running_loop().time()
    if wait_s > 0:
        await asyncio.sleep(wait_s)


def _reset(side: asyncio.StreamWriter) -> None:
    """End a connection by RST; of no effect on one that has ended."""
    with suppress(OSError):  # its socket is closed, or its peer was first
        side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
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
