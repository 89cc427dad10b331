"""The trunk behind a connection, for a client that keeps its labels: a `RemoteServer` with two more calls."""

import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from hosl.core.targets import Activations, AskedPositions, StepReply, states_shape
from hosl.errors import WireError
from hosl.parties.remote.server import RemoteServer, check_end, reply_part, upload_frames
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import positions_to_message
from hosl.wire.tensors import pack


class RemoteTrunk(RemoteServer):
    """The `Trunk` of `parties.headed` across a network. Of the targets only mask and positions are sent."""

    def states(
        self, activations: Sequence[Activations], targets: AskedPositions, *, at_rest: bool = False
    ) -> list[Any]:
        """The last block's states at the scored positions (`states_shape`)."""
        noise, step = ("scores", self.current) if at_rest else (self._noise(), self.current + 1)
        packed = [pack(self._arrays.to_wire(h), self._compression, noise=noise) for h in activations]
        self._count_up(packed, targets)

        def send() -> list[Any]:
            request = pb.AskStates(
                where=self._where(step), activations=[p.header for p in packed],
                positions=positions_to_message(targets),
            )  # fmt: skip
            frames = upload_frames(pb.Upload(states=request), packed)
            parts = self.channel.converse("States", frames, pb.StatesReply)
            done = reply_part("States", parts, "done")
            if len(done.states) != len(packed):
                raise WireError(f"asked for {len(packed)} states, the server sent {len(done.states)}")
            states = [self._received(header, parts, packed[0].header, targets) for header in done.states]
            check_end("States", parts)
            self._count_down("states", done.server_s, states)
            return states

        return self._call(send, in_round=not at_rest)

    def step_states(
        self,
        activations: Activations,
        targets: AskedPositions,
        answer: Callable[[Any], Any],
        *,
        step: int,
        want_gradient: bool,
    ) -> StepReply:
        """One update in one call: activations up, states down, their gradient up, dL/dh down if `want_gradient`."""
        packed = pack(self._arrays.to_wire(activations), self._compression, noise=self._noise())
        self._count_up([packed], targets)

        def send() -> StepReply:
            gradient_chunks: SimpleQueue[bytes | None] = SimpleQueue()
            request = pb.AskStepStates(
                where=self._where(step), activations=packed.header, positions=positions_to_message(targets),
                want_gradient=want_gradient,
            )  # fmt: skip

            def frames() -> Iterator[pb.Upload]:
                yield from upload_frames(pb.Upload(step_states=request), [packed])
                while (chunk := gradient_chunks.get()) is not None:
                    yield pb.Upload(chunk=chunk)

            try:
                parts = self.channel.converse("StepStates", frames(), pb.StepStatesReply)
                header = reply_part("StepStates", parts, "states")
                states = self._received(header, parts, packed.header, targets)
                start_s = time.perf_counter()
                gradient = pack(self._arrays.to_wire(answer(states)), "none")
                self.wire_s -= time.perf_counter() - start_s  # the head computes on this device
                for chunk in gradient.chunks():
                    gradient_chunks.put(chunk)
                gradient_chunks.put(None)
                done, cut_gradient = self._done(
                    "StepStates", parts, packed.header, want_gradient=want_gradient
                )
                self._count_down("step", done.server_s, [states, cut_gradient])
                self.meter.bytes_in += gradient.size_bytes
                return StepReply(0.0, cut_gradient)
            finally:
                gradient_chunks.put(None)  # in any case: the sending thread must end

        return self._call(send)

    def _received(
        self, header: pb.Tensor, parts: Iterator[Any], activations: pb.Tensor, targets: AskedPositions
    ) -> Any:
        shape = states_shape(targets, activations.shape[2])
        return self._filled(header, list(shape), activations.dtype, parts)
