"""ServerSide that asks over a connection. Every call is safe to repeat, so a lost connection is simply tried again.

What a round sees is a server; what it does not see is here: the greeting, the session, and that a server which was
restarted may be at another step (`StepMoved`). No torch: `Arrays` turns the runtime's tensors into the wire's.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, overload

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Activations, Pair, PositionTargets, StepReply, Targets
from hosl.errors import SessionError, StepMoved, WireError
from hosl.parties.metered import Meter, payload_bytes
from hosl.parties.remote.compression_watch import WatchesCompression
from hosl.parties.remote.packing import Arrays, Packing
from hosl.transport.channel import Channel
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import targets_to_message
from hosl.wire.tensors import Compression, Packed, Unpacking, pack

_Answer = TypeVar("_Answer")


class PendingLosses(Sequence[float]):
    """Losses that may still be on their way; reading one waits for them, and raises what went wrong."""

    def __init__(self, answer: "Future[list[float]]") -> None:
        self._answer = answer

    def __len__(self) -> int:
        return len(self._answer.result())

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        return self._answer.result()[index]


class RemoteServer(Packing):
    """The server half behind a connection.

    One question may be on its way while the client computes the next: `losses` returns at once, so at most one pair of
    activations is alive beyond the client's own compute. Every other call waits for that one first.
    """

    def __init__(
        self,
        channel: Channel,
        greeting: Callable[[int], pb.HelloRequest],
        arrays: Arrays,
        *,
        compression: Compression = "none",
        seed: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Nothing is sent before `hello`.

        Args:
            channel: to the server.
            greeting: makes the Hello of a client that is in the state after a step.
            arrays: of the client's runtime.
            compression: of the activations on their way up.
            seed: see `Packing`.
            say: hears of lost connections.
        """
        super().__init__(arrays, compression=compression, seed=seed)
        self.channel, self.meter = channel, Meter()
        self.wire_s = 0.0
        """Seconds that calls took beyond the server's compute: sending, waiting for a turn, receiving."""
        self.client = ""
        """The name that our token stands for."""
        self.journal_updates = 0
        """Shared halves: how many updates the server's journal held at the last Hello."""
        self._greeting, self._say = greeting, say
        self._limits, self._session = pb.Limits(), ""
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="hosl-sender")
        self._pending: Future[list[float]] | None = None

    def hello(self) -> int:
        """Greet the server; returns the step after which both sides go on.

        Raises:
            HandshakeError: if the two sides do not fit, naming both values.
            AccessError: if the token is unknown or revoked.
        """
        reply = self.channel.ask("Hello", self._greeting(self.current), pb.HelloReply)
        self._session, self._limits, self.client = reply.session, reply.limits, reply.client
        self.journal_updates = reply.journal_updates
        return reply.start

    @property
    def incarnation(self) -> str:
        """Which life of the server process the session belongs to."""
        return self._session.partition(".")[0]

    def close(self) -> None:
        """End the connection; what is still on its way is waited for."""
        self._sender.shutdown(wait=True)
        self.channel.close()

    # ---- questions that change nothing ----

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The mean loss of each activation, in nats; reading them waits.

        NaN, and nothing is sent, where an activation is no number: a server refuses such bytes.
        """
        self._settle()
        packed = self._finite_packed(activations)
        if packed is None:
            return PendingLosses(_answered([math.nan for _ in activations]))
        step = self.current + 1
        self._count_up(packed, targets)

        def ask() -> list[float]:
            headers = [p.header for p in packed]
            question = pb.AskLosses(
                where=self._where(step), activations=headers, targets=targets_to_message(targets)
            )
            reply = self.channel.upload(
                "Losses", upload_frames(pb.Upload(losses=question), packed), pb.LossesReply
            )
            if len(reply.losses) != len(packed):
                raise WireError(f"asked for {len(packed)} losses, the server sent {len(reply.losses)}")
            self._count_down("losses", reply.server_s, list(reply.losses))
            return list(reply.losses)

        self._pending = self._sender.submit(self._repeated, ask)
        return PendingLosses(self._pending)

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token."""
        packed = [pack(self._arrays.to_wire(activations), self._compression, noise="scores")]

        def ask() -> np.ndarray:
            question = pb.AskScores(
                where=self._where(self.current),
                activations=packed[0].header,
                targets=targets_to_message(targets),
            )
            reply = self.channel.upload(
                "Scores", upload_frames(pb.Upload(scores=question), packed), pb.ScoresReply
            )
            values = np.frombuffer(reply.values, dtype="<f4")
            if values.size != reply.rows * reply.scores or reply.rows != len(targets.mask):
                raise WireError(
                    f"asked to score {len(targets.mask)} rows, the server sent {values.size} numbers"
                )
            return values.reshape(reply.rows, reply.scores)

        self._settle()
        return self._repeated(ask)

    def gradient(self, activations: Activations, targets: Targets) -> StepReply:
        """The loss and dL/dh; theta_s unchanged."""
        packed = [self._packed(activations, targets)]

        def ask() -> StepReply:
            question = pb.AskGradient(
                where=self._where(self.current + 1),
                activations=packed[0].header,
                targets=targets_to_message(targets),
            )
            return self._stepped("Gradient", pb.Upload(gradient=question), packed)

        self._settle()
        return self._repeated(ask)

    def probe(self, pair: Pair, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """Losses of h+ at theta_s + epsilon u(seed) and of h- at theta_s - epsilon u(seed); NaN as in `losses`."""
        self._settle()
        packed = self._finite_packed(pair)
        if packed is None:
            return math.nan, math.nan
        self._count_up(packed, targets)
        self.meter.bytes_in += payload_bytes([seed, epsilon])

        def ask() -> tuple[float, float]:
            question = pb.AskProbe(
                where=self._where(self.current + 1), activations=[p.header for p in packed],
                targets=targets_to_message(targets), seed=seed, epsilon=epsilon,
            )  # fmt: skip
            reply = self.channel.upload(
                "Probe", upload_frames(pb.Upload(probe=question), packed), pb.LossesReply
            )
            if len(reply.losses) != 2:
                raise WireError(f"asked for two losses, the server sent {len(reply.losses)}")
            self._count_down("probe", reply.server_s, list(reply.losses))
            return reply.losses[0], reply.losses[1]

        return self._repeated(ask)

    # ---- questions that change the server: once per step, however often they are sent ----

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s."""
        packed = [self._packed(activations, targets)]

        def ask() -> StepReply:
            question = pb.AskStep(
                where=self._where(step), activations=packed[0].header, targets=targets_to_message(targets),
                want_gradient=want_gradient,
            )  # fmt: skip
            return self._stepped("Step", pb.Upload(step=question), packed)

        self._settle()
        return self._repeated(ask)

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """A zeroth-order server's update."""

        def ask() -> None:
            question = pb.DescendRequest(where=self._where(step), seeds=seeds, coefficients=coefficients)
            reply = self.channel.ask("Descend", question, pb.DescendReply)
            self._count_down("descend", reply.server_s, None)

        self.meter.bytes_in += payload_bytes([step, list(seeds), list(coefficients)])
        self._settle()
        self._repeated(ask)

    def save(self, step: int) -> int:
        """Have the server write a checkpoint of its state, which is the one after `step`; returns the server's step."""
        self._settle()
        return self._repeated(
            lambda: self.channel.ask("Save", pb.SaveRequest(where=self._where(step)), pb.SaveReply).step
        )

    def journal(
        self, step: int, have: int, seeds: Sequence[int], scales: Sequence[float], examples: int
    ) -> list[pb.JournalReply]:
        """Shared halves: hand in an update (or none), and get those that come after the first `have`."""

        def ask() -> list[pb.JournalReply]:
            question = pb.JournalRequest(
                where=self._where(step), have=have, seeds=seeds, scales=scales, examples=examples
            )
            return list(self.channel.converse("Journal", [question], pb.JournalReply))

        self._settle()
        return self._repeated(ask)

    # ---- how a question is asked ----

    def _repeated(self, ask: Callable[[], _Answer]) -> _Answer:
        """Ask until there is an answer; greet again where the server does not know us any more.

        Raises:
            StepMoved: if the server then goes on from another step than ours.
        """
        while True:
            try:
                return self.channel.for_ever(lambda: self._timed(ask), self._say)
            except SessionError as unknown:
                start = self.channel.for_ever(self.hello, self._say)
                if start != self.current:
                    raise StepMoved(start) from unknown

    def _timed(self, ask: Callable[[], _Answer]) -> _Answer:
        begin, computed_s = time.perf_counter(), self.meter.seconds
        answer = ask()
        self.wire_s += time.perf_counter() - begin - (self.meter.seconds - computed_s)
        return answer

    def _settle(self) -> None:
        """Wait until no question is on its way; its own reader hears of its errors."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None

    def _stepped(self, call: str, question: pb.Upload, packed: list[Packed]) -> StepReply:
        parts = self.channel.converse(call, upload_frames(question, packed), pb.StepReply)
        done, gradient = next(parts, pb.StepReply()).done, None
        if done.HasField("gradient"):
            gradient = self._unpacked(done.gradient, packed[0].header, (part.chunk for part in parts))
        for _ in parts:
            raise WireError(f"{call} was answered by more than was announced")
        self._count_down(call.lower(), done.server_s, StepReply(done.loss, gradient))
        return StepReply(done.loss, gradient)

    def _unpacked(self, header: pb.Tensor, like: pb.Tensor, chunks: Iterator[bytes]) -> Any:
        if list(header.shape) != list(like.shape):
            raise WireError(
                f"the gradient has shape {list(header.shape)}, the activations {list(like.shape)}"
            )
        return self._filled(Unpacking(header, tensor_bytes=self._limits.tensor_bytes), chunks)

    def _filled(self, arriving: Unpacking, chunks: Iterator[bytes]) -> Any:
        while not arriving.complete:
            arriving.add(next(chunks, b""))
        return self._arrays.from_wire(arriving.array())

    def _packed(self, activations: Activations, targets: Targets) -> Packed:
        packed = pack(self._arrays.to_wire(activations), self._compression, noise=self._noise())
        self._count_up([packed], targets)
        return packed

    def _where(self, step: int) -> pb.Where:
        return pb.Where(session=self._session, step=step)

    def _count_up(self, packed: list[Packed], targets: Targets | PositionTargets) -> None:
        self.meter.bytes_in += sum(p.size_bytes for p in packed) + payload_bytes(targets)

    def _count_down(self, call: str, server_s: float, answer: Any) -> None:
        self.meter.seconds += server_s
        self.meter.by_call[call] = self.meter.by_call.get(call, 0.0) + server_s
        self.meter.bytes_out += payload_bytes(answer)


def _answered(losses: list[float]) -> "Future[list[float]]":
    answer: Future[list[float]] = Future()
    answer.set_result(losses)
    return answer


def upload_frames(question: pb.Upload, packed: list[Packed]) -> Iterator[pb.Upload]:
    """The messages of an upload: the question, then every tensor's chunks."""
    yield question
    for tensor in packed:
        for chunk in tensor.chunks():
            yield pb.Upload(chunk=chunk)


class WatchedServer(WatchesCompression, RemoteServer):
    """A `RemoteServer` that measures its own compression."""
