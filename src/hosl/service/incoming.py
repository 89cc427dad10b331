"""The messages that a call receives, one after the other: each is measured, parsed and held to the idle limit.

Questions and steps share one room for their tensors: a call whose tensors do not fit reads none of them before others
are done. Texts have limits of their own (`texts`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from hosl.errors import BusyError, LinkError, WireError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import Unpacking, WireArray, lone_chunk

_Message = TypeVar("_Message")
_SLOWEST_BYTES_PER_S = 16 << 10
"""The rate at which a tensor must arrive at least; a slower call holds memory for longer than it is worth."""
_UNPACKED_HERE_BYTES = 1 << 16
"""Larger tensors are unpacked and looked through for NaN by another thread, so that other calls go on meanwhile."""
_CUT_SHORT = "the call ended before its request was complete; it changed nothing"


class Room:
    """The bytes that the tensors of questions and steps may take together. For one loop.

    Room goes to calls in the order in which they came. But a client has a quarter at most beside its first call: one
    that announces much and sends it slowly is passed over, and its later calls with it.
    """

    def __init__(self, most_bytes: int) -> None:
        """`most_bytes`: a call that needs more gets room once it is alone."""
        self._most_bytes = most_bytes
        self._taken: Counter[str] = Counter()
        """Client -> the bytes of its calls."""
        self._waiting: list[tuple[str, int, asyncio.Future[None]]] = []

    @property
    def taken_bytes(self) -> int:
        """The bytes of all calls."""
        return self._taken.total()

    async def take(self, client: str, wanted_bytes: int, most_s: float) -> None:
        """Wait until there is room; `give_back` as many bytes later.

        Raises:
            BusyError: if there is none within `most_s` seconds.
        """
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((client, wanted_bytes, turn))
        self._next()
        try:
            await asyncio.wait_for(asyncio.shield(turn), most_s)
        except TimeoutError:
            own_bytes, all_bytes = self._taken[client], self.taken_bytes
            if self._left(client, wanted_bytes, turn):
                raise BusyError(
                    f"no room for tensors of {wanted_bytes:,} bytes for {most_s:g} s: client {client} takes "
                    f"{own_bytes:,}, all together {all_bytes:,} of {self._most_bytes:,}; wait a moment, or raise the "
                    "server's --tensor-total"
                ) from None
        except asyncio.CancelledError:
            if not self._left(client, wanted_bytes, turn):
                self.give_back(client, wanted_bytes)
            raise

    def give_back(self, client: str, taken_bytes: int) -> None:
        """Make room for others."""
        self._taken[client] -= taken_bytes
        if not self._taken[client]:
            del self._taken[client]
        self._next()

    def _left(self, client: str, wanted_bytes: int, turn: asyncio.Future[None]) -> bool:
        """Leave the queue; False if the room was given meanwhile."""
        if turn.done():
            return False
        self._waiting.remove((client, wanted_bytes, turn))
        self._next()  # a smaller one behind may fit
        return True

    def _next(self) -> None:
        passed_over = set[str]()
        for waiting in list(self._waiting):
            client, wanted_bytes, turn = waiting
            own_bytes = self._taken.get(client, 0)
            if client in passed_over or (own_bytes and own_bytes + wanted_bytes > self._most_bytes // 4):
                passed_over.add(client)
                continue
            if self._taken and self.taken_bytes + wanted_bytes > self._most_bytes:
                return
            self._waiting.remove(waiting)
            self._taken[client] += wanted_bytes
            turn.set_result(None)


class Incoming:
    """The messages of one call, in order. Raises hosl's own errors for whatever a peer can do wrong."""

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        *,
        idle_s: float,
        check_access: Callable[[], None],
        room: Room | None = None,
        client: str = "",
    ) -> None:
        """`check_access` is called at every message; it raises when the client has lost its access.

        `room`: for the tensors of all calls, in which this one is `client`'s; None: they are not counted. What was
        taken is held until `give_back`.
        """
        self._frames, self._idle_s, self._check_access = frames, idle_s, check_access
        self._room, self._client, self._held_bytes = room, client, 0
        self.received_bytes = 0
        self._end_s = float("inf")
        """The time at which the tensor that arrives must be whole, by the monotonic clock."""

    async def message(self, kind: type[_Message]) -> _Message:
        """The next message.

        Raises:
            WireError: if the bytes are no such message, or the stream ends.
            LinkError: if nothing comes within the idle limit, or a tensor comes too slowly.
        """
        message = await self.message_or_end(kind)
        if message is None:
            raise WireError(_CUT_SHORT)
        return message

    async def message_or_end(self, kind: type[_Message]) -> _Message | None:
        """The next message; None at the end of the stream. Raises as `message` otherwise."""
        data = await self._frame_or_end()
        return None if data is None else _parsed(data, kind)

    async def _frame_or_end(self) -> bytes | None:
        """The next message as it came; None at the end of the stream."""
        wait_s = min(self._idle_s, self._end_s - time.monotonic())
        try:
            data = await asyncio.wait_for(anext(self._frames), max(wait_s, 0.0))
        except StopAsyncIteration:
            return None
        except TimeoutError:
            late = wait_s < self._idle_s
            raise LinkError(
                f"{'a tensor came too slowly' if late else f'nothing arrived for {self._idle_s:g} s'}; the call was "
                "dropped"
            ) from None
        self._check_access()
        self.received_bytes += len(data)
        return data

    async def _chunk(self, kind: type[pb.Upload | pb.GenerateRequest]) -> bytes | memoryview:
        """The next part of a tensor."""
        data = await self._frame_or_end()
        if data is None:
            raise WireError(_CUT_SHORT)
        if (chunk := lone_chunk(data, kind)) is not None:
            return chunk
        part = _parsed(data, kind)
        if part.WhichOneof("part") != "chunk":
            raise WireError(f"a chunk of a tensor was due, got `{part.WhichOneof('part')}`")
        return part.chunk

    async def request(self, name: str) -> Any:
        """The first message of an upload: the request of the call, in the field `name` of `Upload`.

        Raises:
            WireError: if it is another call's request, or a chunk.
        """
        upload = await self.message(pb.Upload)
        if upload.WhichOneof("part") != name:
            raise WireError(f"this call begins with `{name}`, got `{upload.WhichOneof('part')}`")
        return getattr(upload, name)

    async def tensors(
        self, headers: Iterable[pb.Tensor], *, tensor_bytes: int, beside_bytes: int = 0
    ) -> list[WireArray]:
        """All tensors of a request, once there is room for them: before, none is read, and the sender waits, too.

        `beside_bytes`: what the call will take later. It is asked for now: a second wait could be for ever.

        Raises:
            WireError, LimitError: see `Unpacking`. BusyError: if there is no room within the idle limit. LinkError: see
                `message`.
        """
        arriving = [Unpacking(header, tensor_bytes=tensor_bytes) for header in headers]
        if self._room is not None:
            wanted = beside_bytes + sum(tensor.takes_bytes for tensor in arriving)
            await self._room.take(self._client, wanted, self._idle_s)
            self._held_bytes += wanted
        return [await self._unpacked(tensor, pb.Upload) for tensor in arriving]

    def give_back(self) -> None:
        """Give the room back that this call has; its tensors are let go of by now."""
        held, self._held_bytes = self._held_bytes, 0
        if self._room is not None and held:
            self._room.give_back(self._client, held)

    async def tensor(
        self, header: pb.Tensor, *, tensor_bytes: int, kind: type[pb.Upload | pb.GenerateRequest] = pb.Upload
    ) -> WireArray:
        """The tensor whose chunks come next, in messages of `kind`.

        Raises:
            WireError, LimitError: see `Unpacking`. LinkError: see `message`.
        """
        return await self._unpacked(Unpacking(header, tensor_bytes=tensor_bytes), kind)

    async def _unpacked(self, arriving: Unpacking, kind: type[pb.Upload | pb.GenerateRequest]) -> WireArray:
        """The tensor, once its chunks have come."""
        self._end_s = time.monotonic() + self._idle_s + arriving.wanted / _SLOWEST_BYTES_PER_S
        while not arriving.complete:
            arriving.add(await self._chunk(kind))
        self._end_s = float("inf")
        if arriving.wanted <= _UNPACKED_HERE_BYTES:
            return arriving.array()
        return await asyncio.to_thread(arriving.array)

    async def end(self) -> None:
        """Wait for the end of the request: nothing may follow.

        Raises:
            WireError: if something follows. LinkError: if the end does not come within the idle limit.
        """
        try:
            await asyncio.wait_for(anext(self._frames), self._idle_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise LinkError(f"the end of the request did not come for {self._idle_s:g} s") from None
        raise WireError("more arrived than the request announced")


def _parsed(data: bytes, kind: type[_Message]) -> _Message:
    """A message from its bytes; raises WireError if they are none."""
    parsed: Any = kind()
    try:
        parsed.ParseFromString(data)
    except DecodeError:
        raise WireError(f"{len(data)} bytes are no {kind.__name__} of protocol 1") from None
    return parsed
