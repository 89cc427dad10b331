"""The server behind a connection. Every call is safe to repeat, so after a lost connection it is simply made again.

A round sees a server like any other. Hidden from it are the Hello, the session, and that a restarted server may be at
another step (`StepMoved`). No torch: `Arrays` converts the runtime's tensors to the wire's arrays.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar, overload

import numpy as np

from hosl.core.array_types import Float
from hosl.core.estimators import LARGEST_NUMBER
from hosl.core.targets import Activations, AskedPositions, ClassTargets, Pair, StepReply, Targets
from hosl.errors import CheckpointError, NonFiniteError, SessionError, StepMoved, WireError
from hosl.parties.metered import Meter, payload_bytes
from hosl.parties.remote.compression_watch import WatchesCompression
from hosl.parties.remote.packing import Arrays, Packing
from hosl.transport.channel import Channel
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import targets_to_message
from hosl.wire.tensors import Compression, Packed, Unpacking, pack
from hosl.wire.updates import check_update

_Reply = TypeVar("_Reply")
SAVE_PAUSES_S = (1.0, 5.0, 25.0)
"""The pauses between the tries of a save that the server could not do."""
_HELLOS = 10
"""The hellos in a row after which a server that forgets every session is given up."""
_JOURNAL_BYTES = 256 << 20
"""The largest journal that is read in one call."""


class PendingLosses(Sequence[float]):
    """Losses that may not have arrived yet; reading one waits for them, and raises the error of the call."""

    def __init__(self, losses: "Future[list[float]]") -> None:
        self._losses = losses

    def __len__(self) -> int:
        return len(self._losses.result())

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        return self._losses.result()[index]


class RemoteServer(Packing):
    """The server half behind a connection.

    One request may be under way while the client computes the next: `losses` returns at once, and at most one pair of
    activations is alive beside those that the client computes. Every other call first waits for that request.
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
            arrays: the conversion for the client's runtime.
            compression: the compression of uploaded activations.
            seed: the run's seed; see `Packing`.
            say: is called with a line of text about lost connections.
        """
        super().__init__(arrays, compression=compression, seed=seed)
        self.channel, self.meter = channel, Meter()
        self.wire_s = 0.0
        """The seconds of calls beyond the server's compute: sending, waiting for a turn, receiving."""
        self.client = ""
        """The client's name on the server, by its token."""
        self.journal_updates = 0
        """The number of updates in the server's journal at the last Hello; for shared halves."""
        self.classes: int | None = None
        """The number of classes of the model's head; None: any number of scores is taken."""
        self._training = pb.Training()
        self._greeting, self._say = greeting, say
        self._limits, self._session = pb.Limits(), ""
        self._changed = 0
        """The newest step that changed the server; until the client has done it, too, a restart undoes it."""
        self.follows = ""
        """The incarnation whose journal the client's half follows; empty: it follows none."""
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="hosl-sender")
        self._pending: Future[list[float]] | None = None

    def hello(self) -> int:
        """Send Hello; returns the step after which both sides continue.

        Raises:
            HandshakeError: if the two sides do not fit, naming both values.
            AccessError: if the token is unknown or revoked.
            WireError: if the server goes on from a state that this client cannot have.
        """
        request = self._greeting(self.current)
        reply = self.channel.ask("Hello", request, pb.HelloReply)
        self._training, ours = request.training, {*request.restorable, request.current}
        if request.look:  # at a run as it is, whatever its step
            self._session, self._limits, self.client = reply.session, reply.limits, reply.client
            return reply.start
        alone = request.training.clients <= 1 or request.training.personal_server
        if reply.start > request.training.max_steps or (alone and reply.start not in ours):
            raise WireError(
                f"the server goes on from step {reply.start}; this client can from {sorted(ours)}, and the run has "
                f"{request.training.max_steps} steps: the server is at fault, ask its owner"
            )
        self._session, self._limits, self.client = reply.session, reply.limits, reply.client
        self.journal_updates = reply.journal_updates
        return reply.start

    @property
    def tensor_bytes(self) -> int:
        """The largest tensor that the server takes, as it said in reply to the last Hello."""
        return self._limits.tensor_bytes

    @property
    def incarnation(self) -> str:
        """The identity of the server process that the session belongs to; a restarted server has another one."""
        return self._session.partition(".")[0]

    def close(self) -> None:
        """Leave the run and close the connection; a request that is under way is broken off."""
        if self._session:
            self.channel.leave(self._session)
        self.channel.close()
        self._sender.shutdown(wait=True)

    # ---- calls that change nothing ----

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The mean loss of each activation, in nats; reading one waits for the reply.

        NaN, and nothing is sent, where an activation is NaN or infinite: a server refuses such bytes.
        """
        self._settle()
        packed = self._finite_packed(activations)
        if packed is None:
            return PendingLosses(_finished([math.nan for _ in activations]))
        step = self.current + 1
        self._count_up(packed, targets)

        def send() -> list[float]:
            headers = [p.header for p in packed]
            request = pb.AskLosses(
                where=self._where(step), activations=headers, targets=targets_to_message(targets)
            )
            frames = upload_frames(pb.Upload(losses=request), packed)
            reply = self.channel.upload("Losses", frames, pb.LossesReply)
            if len(reply.losses) != len(packed):
                raise WireError(f"asked for {len(packed)} losses, the server sent {len(reply.losses)}")
            self._count_down("losses", reply.server_s, list(reply.losses))
            return list(reply.losses)

        self._pending = self._sender.submit(self._repeated, send, self.current, True)
        return PendingLosses(self._pending)

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token."""
        packed = [pack(self._arrays.to_wire(activations), self._compression, noise="scores")]
        self._count_up(packed, targets)

        def send() -> np.ndarray:
            request = pb.AskScores(
                where=self._where(self.current),
                activations=packed[0].header,
                targets=targets_to_message(targets),
            )
            frames = upload_frames(pb.Upload(scores=request), packed)
            reply = self.channel.upload("Scores", frames, pb.ScoresReply)
            rows, width = len(targets.mask), self._score_width(targets)
            width = reply.scores if width is None else width
            if (reply.rows, reply.scores, len(reply.values)) != (rows, width, 4 * rows * width):
                raise WireError(
                    f"asked for scores [{rows}, {width}], the server sent [{reply.rows}, {reply.scores}] in "
                    f"{len(reply.values)} bytes"
                )
            scores = np.frombuffer(reply.values, dtype="<f4").reshape(rows, width)
            self._count_down("scores", reply.server_s, scores)
            return scores

        return self._call(send, in_round=False)

    def _score_width(self, targets: Targets) -> int | None:
        """The scores of a row; None: any number is taken."""
        if isinstance(targets, ClassTargets):
            return self.classes
        return 2 if targets.mean_over == "tokens" else 1

    def gradient(self, activations: Activations, targets: Targets) -> StepReply:
        """The loss and dL/dh; theta_s unchanged."""
        packed = [self._packed(activations, targets)]

        def send() -> StepReply:
            request = pb.AskGradient(
                where=self._where(self.current + 1),
                activations=packed[0].header,
                targets=targets_to_message(targets),
            )
            return self._stepped("Gradient", pb.Upload(gradient=request), packed, want_gradient=True)

        return self._call(send)

    def probe(self, pair: Pair, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """Losses of h+ at theta_s + epsilon u(seed) and of h- at theta_s - epsilon u(seed); NaN as in `losses`."""
        self._settle()
        packed = self._finite_packed(pair)
        if packed is None:
            return math.nan, math.nan
        self._count_up(packed, targets)
        self.meter.bytes_in += payload_bytes([seed, epsilon])

        def send() -> tuple[float, float]:
            request = pb.AskProbe(
                where=self._where(self.current + 1), activations=[p.header for p in packed],
                targets=targets_to_message(targets), seed=seed, epsilon=epsilon,
            )  # fmt: skip
            frames = upload_frames(pb.Upload(probe=request), packed)
            reply = self.channel.upload("Probe", frames, pb.LossesReply)
            if len(reply.losses) != 2:
                raise WireError(f"asked for two losses, the server sent {len(reply.losses)}")
            self._count_down("probe", reply.server_s, list(reply.losses))
            return reply.losses[0], reply.losses[1]

        return self._repeated(send, self.current, True)

    # ---- calls that change the server: once per step, however often they are sent ----

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s."""
        packed = [self._packed(activations, targets)]

        def send() -> StepReply:
            request = pb.AskStep(
                where=self._where(step), activations=packed[0].header, targets=targets_to_message(targets),
                want_gradient=want_gradient,
            )  # fmt: skip
            return self._stepped("Step", pb.Upload(step=request), packed, want_gradient=want_gradient)

        reply = self._call(send)
        self._changed = step
        return reply

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """One update of a zeroth-order server."""

        def send() -> None:
            request = pb.DescendRequest(where=self._where(step), seeds=seeds, coefficients=coefficients)
            reply = self.channel.ask("Descend", request, pb.DescendReply)
            self._count_down("descend", reply.server_s, None)

        self.meter.bytes_in += payload_bytes([step, list(seeds), list(coefficients)])
        self._call(send)
        self._changed = step

    def save(self, step: int) -> int:
        """Let the server write a checkpoint of its state, the one after `step`; returns the server's step.

        Raises:
            CheckpointError: if the server cannot, tried again after each of `SAVE_PAUSES_S`.
        """

        def send() -> int:
            return self.channel.ask("Save", pb.SaveRequest(where=self._where(step)), pb.SaveReply).step

        for pause_s in SAVE_PAUSES_S:
            try:
                return self._call(send, in_round=False)
            except CheckpointError as failed:
                self._say(f"{failed}; trying again in {pause_s:g} s")
                self.channel.pause(pause_s)
        return self._call(send, in_round=False)

    def journal(
        self, step: int, have: int, seeds: Sequence[int], scales: Sequence[float], examples: int
    ) -> list[pb.JournalReply]:
        """Hand in an update of shared halves (or none); returns the updates after the first `have`.

        Raises:
            WireError: if the updates do not ascend, are more than the run's, or cannot be updates.
        """

        def send() -> list[pb.JournalReply]:
            request = pb.JournalRequest(
                where=self._where(step), have=have, seeds=seeds, scales=scales, examples=examples
            )
            replies, newest, size_bytes = list[pb.JournalReply](), have, 0
            for reply in self.channel.converse("Journal", [request], pb.JournalReply):
                size_bytes += reply.ByteSize()
                if (replies and not reply.updates) or size_bytes > _JOURNAL_BYTES:
                    raise WireError("the server's journal has no end; it is at fault, ask its owner")
                for update in reply.updates:
                    if not newest < update.step <= self._most_updates:
                        raise WireError(
                            f"the server's journal has update {update.step} after {newest}; updates ascend up to "
                            f"{self._most_updates} in this run"
                        )
                    check_update(update.seeds, update.scales)
                    newest = update.step
                replies.append(reply)
            return replies

        return self._call(send)

    @property
    def _most_updates(self) -> int:
        """The number of updates of a whole run: each client's, or one a round."""
        together = self._training.order == pb.SYNCHRONOUS
        return self._training.max_steps * (1 if together else max(self._training.clients, 1))

    # ---- how a call is made ----

    @property
    def restarted(self) -> bool:
        """Whether the client's half follows the journal of an earlier server process."""
        return self.follows not in ("", self.incarnation)

    def _call(self, send: Callable[[], _Reply], *, in_round: bool = True) -> _Reply:
        """Make a call once no other request is under way; returns its reply."""
        self._settle()
        return self._repeated(send, self.current, in_round)

    def _repeated(self, send: Callable[[], _Reply], current: int, in_round: bool) -> _Reply:
        """Make a call until there is a reply; send Hello again where the server has lost the session.

        Args:
            send: makes the call.
            current: the client's step when the call was asked for: the round may be broken off meanwhile.
            in_round: whether the call is part of a round, which begins anew where its first part is lost.

        Raises:
            StepMoved: if the server then continues from another step, or with another journal.
            SessionError: if it loses every session.
        """
        for _ in range(_HELLOS):
            try:
                return self.channel.for_ever(lambda: self._timed(send), self._say)
            except SessionError as unknown:
                start = self.channel.for_ever(self.hello, self._say)
                lost = self._changed > current or self.restarted
                if start != current or (in_round and lost):
                    self._changed = 0
                    raise StepMoved(start) from unknown
        raise SessionError(
            f"the server forgot {_HELLOS} sessions in a row, each right after its hello; ask its owner to restart it, "
            "then go on"
        )

    def _timed(self, send: Callable[[], _Reply]) -> _Reply:
        start_s, computed_s = time.perf_counter(), self.meter.seconds
        reply = send()
        self.wire_s += time.perf_counter() - start_s - (self.meter.seconds - computed_s)
        return reply

    def _settle(self) -> None:
        """Wait until no request is under way; its errors are raised where its losses are read."""
        if self._pending is not None:
            self._pending.exception()
            self._pending = None

    def _stepped(
        self, call: str, request: pb.Upload, packed: list[Packed], *, want_gradient: bool
    ) -> StepReply:
        parts = self.channel.converse(call, upload_frames(request, packed), pb.StepReply)
        done, gradient = self._done(call, parts, packed[0].header, want_gradient=want_gradient)
        self._count_down(call.lower(), done.server_s, StepReply(done.loss, gradient))
        return StepReply(done.loss, gradient)

    def _done(
        self, call: str, parts: Iterator[Any], activations: pb.Tensor, *, want_gradient: bool
    ) -> tuple[Any, Any]:
        """The last part of a reply, and dL/dh if it was asked for, of the activations' shape.

        Raises:
            WireError: if the shape differs, or parts are missing or too many.
            NonFiniteError: if the loss is NaN or infinite, or the gradient as good as infinite.
        """
        done, gradient = reply_part(call, parts, "done"), None
        if not math.isfinite(done.loss):
            raise NonFiniteError(
                f"the server's reply to {call} has the loss {done.loss}; it must be finite: lower the learning rates"
            )
        if done.HasField("gradient") != want_gradient:
            raise WireError(
                f"the reply to {call} {'lacks the' if want_gradient else 'has a'} gradient, which was "
                f"{'' if want_gradient else 'not '}asked for"
            )
        if want_gradient:
            gradient = self._filled(done.gradient, list(activations.shape), activations.dtype, parts)
        check_end(call, parts)
        return done, gradient

    def _filled(self, header: pb.Tensor, shape: list[int], dtype: Any, parts: Iterator[Any]) -> Any:
        """The tensor of the chunks in the next parts of a reply; must have this shape and dtype."""
        if (list(header.shape), header.dtype) != (shape, dtype):
            raise WireError(
                f"the server sends a tensor {list(header.shape)} of dtype {header.dtype}, due is {shape} of {dtype}"
            )
        unpacking = Unpacking(header, tensor_bytes=self._limits.tensor_bytes)
        chunks = (part.chunk for part in parts)
        while not unpacking.complete:
            unpacking.add(next(chunks, b""))
        array = unpacking.array()
        if array.largest() > LARGEST_NUMBER:
            raise NonFiniteError(
                f"the server sends a number of {array.largest():.0e}; the run has diverged: lower the learning rates"
            )
        return self._arrays.from_wire(array)

    def _packed(self, activations: Activations, targets: Targets) -> Packed:
        packed = pack(self._arrays.to_wire(activations), self._compression, noise=self._noise())
        self._count_up([packed], targets)
        return packed

    def _where(self, step: int) -> pb.Where:
        return pb.Where(session=self._session, step=step)

    def _count_up(self, packed: list[Packed], targets: Targets | AskedPositions) -> None:
        self.meter.bytes_in += sum(p.size_bytes for p in packed) + payload_bytes(targets)

    def _count_down(self, call: str, server_s: float, payload: Any) -> None:
        if not 0 <= server_s < 1e9:
            raise WireError(f"the reply to {call} says that it took {server_s} s")
        self.meter.seconds += server_s
        self.meter.by_call[call] = self.meter.by_call.get(call, 0.0) + server_s
        self.meter.bytes_out += payload_bytes(payload)


def _finished(losses: list[float]) -> "Future[list[float]]":
    future: Future[list[float]] = Future()
    future.set_result(losses)
    return future


def reply_part(call: str, parts: Iterator[Any], kind: str) -> Any:
    """The next part of a reply; raises WireError if it is missing, or of another kind."""
    part = next(parts, None)
    found = None if part is None else part.WhichOneof("part")
    if found != kind:
        raise WireError(f"the reply to {call} should go on with `{kind}`, got `{found}`")
    return getattr(part, kind)


def check_end(call: str, parts: Iterator[Any]) -> None:
    """Read the end of a reply; raises WireError if another part comes instead."""
    for _ in parts:
        raise WireError(f"the reply to {call} has more parts than it announced")


def upload_frames(request: pb.Upload, packed: list[Packed]) -> Iterator[pb.Upload]:
    """The messages of an upload: the request, then the chunks of every tensor."""
    yield request
    for tensor in packed:
        for chunk in tensor.chunks():
            yield pb.Upload(chunk=chunk)


class WatchedServer(WatchesCompression, RemoteServer):
    """A `RemoteServer` that measures its compression error."""
