"""What a call receives: one message after the other, each measured, parsed and no slower than the idle limit."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from hosl.errors import LinkError, WireError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import Unpacking, WireArray

_Message = TypeVar("_Message")


class Incoming:
    """The messages of one call, in order. Raises hosl's own errors for whatever a peer can do wrong."""

    def __init__(self, frames: AsyncIterator[bytes], *, idle_s: float, allowed: Callable[[], None]) -> None:
        """`allowed` raises when the client may no longer speak; asked at every message."""
        self._frames, self._idle_s, self._allowed = frames, idle_s, allowed
        self.received_bytes = 0

    async def message(self, kind: type[_Message]) -> _Message:
        """The next message.

        Raises:
            WireError: if it is none, or the stream ends. LinkError: if nothing comes within the idle limit.
        """
        try:
            data = await asyncio.wait_for(anext(self._frames), self._idle_s)
        except StopAsyncIteration:
            raise WireError("the call ended before its question was complete; it changed nothing") from None
        except TimeoutError:
            raise LinkError(f"nothing arrived for {self._idle_s:g} s; the call was dropped") from None
        self._allowed()
        self.received_bytes += len(data)
        parsed: Any = kind()
        try:
            parsed.ParseFromString(data)
        except DecodeError:
            raise WireError(f"{len(data)} bytes are no {kind.__name__} of protocol 1") from None
        return parsed

    async def question(self, name: str) -> Any:
        """The first message of an upload, which must ask what the call says.

        Raises:
            WireError: if it asks something else.
        """
        upload = await self.message(pb.Upload)
        if upload.WhichOneof("part") != name:
            raise WireError(f"this call begins with `{name}`, got `{upload.WhichOneof('part')}`")
        return getattr(upload, name)

    async def tensor(self, header: pb.Tensor, *, tensor_bytes: int) -> WireArray:
        """The tensor whose chunks come next.

        Raises:
            WireError, LimitError: see `Unpacking`.
        """
        arriving = Unpacking(header, tensor_bytes=tensor_bytes)
        while not arriving.complete:
            part = await self.message(pb.Upload)
            if part.WhichOneof("part") != "chunk":
                raise WireError(f"a chunk of a tensor was due, got `{part.WhichOneof('part')}`")
            arriving.add(part.chunk)
        return arriving.array()

    async def end(self) -> None:
        """The question is complete: nothing may follow.

        Raises:
            WireError: if something does.
        """
        try:
            await asyncio.wait_for(anext(self._frames), self._idle_s)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise LinkError(f"the end of the question did not come for {self._idle_s:g} s") from None
        raise WireError("more arrived than the question announced")
