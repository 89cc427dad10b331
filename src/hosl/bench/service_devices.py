"""Simulated devices of `hosl bench service`: real messages over connections of their own, and no model behind them.

A process of them reads `Orders` from its input, says that it is ready, waits for a line, does its work and prints what
it saw.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import grpc.aio
import msgspec
import numpy as np

from hosl.errors import FailureError, SessionError
from hosl.methods.synthetic import synthetic_batch
from hosl.transport.channel import SERVICE
from hosl.transport.status import ERROR_KEY
from hosl.wire import hosl_pb2 as pb
from hosl.wire.protocol import PROTOCOL
from hosl.wire.targets import targets_to_message
from hosl.wire.tensors import WireArray, pack

_AT_ONCE = 4
"""The calls that a device of `questions` has under way: as many as a server allows."""
_HELLOS_AT_ONCE = 32
_VOCABULARY = 1000
"""The least that a known shape has."""
_TAKES_PART_S = 600.0
"""The time for a call; a device that gets no answer in it has failed."""


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """The work of one process of devices."""

    address: str
    """host:port of the server."""
    certificate: str
    """The server's certificate in PEM."""
    tokens: tuple[str, ...]
    """The token of each device."""
    model: bytes
    """`pb.Model` of the hello."""
    training: bytes
    """`pb.Training` of the hello."""
    run: str
    """The name of the run that all devices take part in."""
    width: int
    """Of hidden states."""
    rows: int
    """Rows of an activation."""
    seq: int
    """Tokens of a row."""
    work: Literal["questions", "refused", "rounds"]
    """questions: as many as the server answers, for `seconds`. refused: the same, of a step that is none: all is
    received and nothing computed. rounds: a Step and a Journal for each of `rounds`."""
    seconds: float = 5.0
    """Of questions."""
    rounds: int = 3
    """Rounds of a synchronous run."""
    directions: int = 10
    """Of a device's update of the shared half."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the devices of one process saw."""

    waits_s: list[float] = []
    """Seconds from a question to its whole answer."""
    answered: list[int] = []
    """Questions of each device."""
    sent_bytes: int = 0
    """Bytes of the questions' tensors."""
    rounds_s: list[float] = []
    """Seconds of each round, from the first Step to the last Journal's answer, by this process's devices."""


class _Device:
    """One device: a connection, a session, an activation that it sends again and again."""

    def __init__(self, number: int, orders: Orders) -> None:
        self.number, self._orders = number, orders
        credentials = grpc.ssl_channel_credentials(orders.certificate.encode())
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "hosl")]
        self._channel = grpc.aio.secure_channel(orders.address, credentials, options)
        self._metadata = (("authorization", f"Bearer {orders.tokens[number]}"),)
        shape = (orders.rows, orders.seq, orders.width)
        values = np.random.Generator(np.random.Philox(key=number)).standard_normal(shape, np.float32)
        self._packed = pack(WireArray(values, "float32"), "none")
        self._chunks = [pb.Upload(chunk=chunk) for chunk in self._packed.chunks()]
        self._targets = targets_to_message(synthetic_batch(_VOCABULARY, orders.rows, orders.seq).targets)
        self._session = ""
        self.updates = 0

    async def hello(self) -> None:
        """Begin a session."""
        request = pb.HelloRequest(
            protocol=PROTOCOL, run=self._orders.run, restorable=[0], model=pb.Model.FromString(self._orders.model),
            training=pb.Training.FromString(self._orders.training),
        )  # fmt: skip
        reply: pb.HelloReply = await self._ask("Hello", request, pb.HelloReply)
        self._session = reply.session

    async def question(self) -> None:
        """One Losses of one activation."""
        where = pb.Where(session=self._session, step=1)
        ask = pb.AskLosses(where=where, activations=[self._packed.header], targets=self._targets)
        await self._upload("Losses", pb.Upload(losses=ask), pb.LossesReply)

    async def refused(self) -> None:
        """One Losses that is received whole, and refused."""
        where = pb.Where(session=self._session, step=0)
        ask = pb.AskLosses(where=where, activations=[self._packed.header], targets=self._targets)
        try:
            await self._upload("Losses", pb.Upload(losses=ask), pb.LossesReply)
        except grpc.aio.AioRpcError as refused:
            if dict(refused.trailing_metadata() or ()).get(ERROR_KEY) != SessionError.__name__:
                raise
        else:
            raise FailureError("the server answered a question about step 0 of a run")

    async def step(self, number: int) -> None:
        """The Step of one round."""
        where = pb.Where(session=self._session, step=number)
        ask = pb.AskStep(where=where, activations=self._packed.header, targets=self._targets)
        await self._upload("Step", pb.Upload(step=ask), pb.StepReply)

    async def journal(self, number: int, seeds: list[int]) -> None:
        """Hand in the update of one round, and wait for those of all."""
        request = pb.JournalRequest(
            where=pb.Where(session=self._session, step=number), have=self.updates, seeds=seeds,
            scales=[1e-6] * len(seeds), examples=self._orders.rows,
        )  # fmt: skip
        call = self._channel.unary_stream(
            f"/{SERVICE}/Journal", request_serializer=pb.JournalRequest.SerializeToString
        )(request, metadata=self._metadata, timeout=_TAKES_PART_S)
        async for reply in call:
            self.updates += len(pb.JournalReply.FromString(reply).updates)

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()

    async def _ask(self, name: str, request: Any, reply_type: Any) -> Any:
        stub = self._channel.unary_unary(
            f"/{SERVICE}/{name}", request_serializer=type(request).SerializeToString
        )
        return reply_type.FromString(
            await stub(request, metadata=self._metadata, timeout=_TAKES_PART_S, wait_for_ready=True)
        )

    async def _upload(self, name: str, first: pb.Upload, reply_type: Any) -> Any:
        async def frames() -> AsyncIterator[pb.Upload]:
            yield first
            for chunk in self._chunks:
                yield chunk

        stub = self._channel.stream_unary(
            f"/{SERVICE}/{name}", request_serializer=pb.Upload.SerializeToString
        )
        return reply_type.FromString(await stub(frames(), metadata=self._metadata, timeout=_TAKES_PART_S))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the activation as sent."""
        return self._packed.size_bytes


async def _questions(
    devices: list[_Device], seconds: float, ask: Callable[[_Device], Awaitable[None]]
) -> Seen:
    waits_s: list[float] = []
    answered, sent_bytes = [0] * len(devices), 0
    end_s = time.monotonic() + seconds

    async def asking(index: int, device: _Device) -> None:
        nonlocal sent_bytes
        while (begin_s := time.monotonic()) < end_s:
            await ask(device)
            sent_bytes += device.tensor_bytes
            if time.monotonic() < end_s:  # else it was answered after the others had stopped
                waits_s.append(time.monotonic() - begin_s)
                answered[index] += 1

    await asyncio.gather(*(asking(i, device) for i, device in enumerate(devices) for _ in range(_AT_ONCE)))
    return Seen(waits_s=waits_s, answered=answered, sent_bytes=sent_bytes)


async def _rounds(devices: list[_Device], rounds: int, directions: int) -> Seen:
    rounds_s: list[float] = []

    async def part(device: _Device, number: int) -> None:
        await device.step(number)
        first = number * directions
        await device.journal(
            number, list(range(first, first + directions))
        )  # common: all devices draw the same

    for number in range(1, rounds + 1):
        begin_s = time.monotonic()
        await asyncio.gather(*(part(device, number) for device in devices))
        rounds_s.append(time.monotonic() - begin_s)
    return Seen(rounds_s=rounds_s)


async def _work(orders: Orders) -> Seen:
    devices = [_Device(number, orders) for number in range(len(orders.tokens))]
    a_few = asyncio.Semaphore(_HELLOS_AT_ONCE)

    async def greet(device: _Device) -> None:
        async with a_few:
            await device.hello()

    await asyncio.gather(*map(greet, devices))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.readline)
    try:
        if orders.work != "rounds":
            ask = _Device.question if orders.work == "questions" else _Device.refused
            return await _questions(devices, orders.seconds, ask)
        return await _rounds(devices, orders.rounds, orders.directions)
    finally:
        await asyncio.gather(*(device.close() for device in devices))


def main() -> None:
    """The process: orders in, what was seen out, both as a line of JSON."""
    orders = msgspec.json.decode(sys.stdin.readline(), type=Orders)
    try:
        seen = asyncio.run(_work(orders))
    except grpc.aio.AioRpcError as refused:
        sys.exit(f"{refused.code().name}: {' '.join(str(refused.details()).split())}")
    sys.stdout.write(msgspec.json.encode(seen).decode() + "\n")


if __name__ == "__main__":
    main()
