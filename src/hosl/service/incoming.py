"""The messages that a call receives, one after the other: each is measured, parsed and held to the idle limit."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from hosl.errors import LinkError, WireError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import Unpacking, WireArray

_Message = TypeVar("_Message")
_SLOWEST_BYTES_PER_S = 16 << 10
"""The rate at which a tensor must arrive at least; a slower call holds memory for longer than it is worth."""


class Incoming:
    """The messages of one call, in order. Raises hosl's own errors for whatever a peer can do wrong."""

    def __init__(
        self, frames: AsyncIterator[bytes], *, idle_s: float, check_access: Callable[[], None]
    ) -> None:
        """`check_access` is called at every message; it raises when the client has lost its access."""
        self._frames, self._idle_s, self._check_access = frames, idle_s, check_access
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
            raise WireError("the call ended before its request was complete; it changed nothing")
        return message

    async def message_or_end(self, kind: type[_Message]) -> _Message | None:
        """The next message; None at the end of the stream. Raises as `message` otherwise."""
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
        parsed: Any = kind()
        try:
            parsed.ParseFromString(data)
        except DecodeError:
            raise WireError(f"{len(data)} bytes are no {kind.__name__} of protocol 1") from None
        return parsed

    async def request(self, name: str) -> Any:
        """The first message of an upload: the request of the call, in the field `name` of `Upload`.

        Raises:
            WireError: if it is another call's request, or a chunk.
        """
        upload = await self.message(pb.Upload)
        if upload.WhichOneof("part") != name:
            raise WireError(f"this call begins with `{name}`, got `{upload.WhichOneof('part')}`")
        return getattr(upload, name)

    async def tensor(
        self, header: pb.Tensor, *, tensor_bytes: int, kind: type[pb.Upload | pb.GenerateRequest] = pb.Upload
    ) -> WireArray:
        """The tensor whose chunks come next, in messages of `kind`.

        Raises:
            WireError, LimitError: see `Unpacking`. LinkError: see `message`.
        """
        arriving = Unpacking(header, tensor_bytes=tensor_bytes)
        self._end_s = time.monotonic() + self._idle_s + arriving.wanted / _SLOWEST_BYTES_PER_S
        while not arriving.complete:
            part = await self.message(kind)
            if part.WhichOneof("part") != "chunk":
                raise WireError(f"a chunk of a tensor was due, got `{part.WhichOneof('part')}`")
            arriving.add(part.chunk)
        self._end_s = float("inf")
        return arriving.array()

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
