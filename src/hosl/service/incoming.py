"""The messages that a call receives, one after the other: each is measured, parsed and held to the idle limit."""

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

    def __init__(
        self, frames: AsyncIterator[bytes], *, idle_s: float, check_access: Callable[[], None]
    ) -> None:
        """`check_access` is called at every message; it raises when the client has lost its access."""
        self._frames, self._idle_s, self._check_access = frames, idle_s, check_access
        self.received_bytes = 0

    async def message(self, kind: type[_Message]) -> _Message:
        """The next message.

        Raises:
            WireError: if the bytes are no such message, or the stream ends.
            LinkError: if nothing comes within the idle limit.
        """
        try:
            data = await asyncio.wait_for(anext(self._frames), self._idle_s)
        except StopAsyncIteration:
            raise WireError("the call ended before its request was complete; it changed nothing") from None
        except TimeoutError:
            raise LinkError(f"nothing arrived for {self._idle_s:g} s; the call was dropped") from None
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
