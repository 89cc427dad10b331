"""The trunk behind a connection, for a client that keeps its labels; a `RemoteServer` with two more calls."""

import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from hosl.core.targets import Activations, PositionTargets, StepReply
from hosl.errors import WireError
from hosl.parties.remote.server import RemoteServer, upload_frames
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import positions_to_message
from hosl.wire.tensors import Unpacking, pack


class RemoteTrunk(RemoteServer):
    """Implements `headed_server.Trunk`. Of the targets only mask and positions are sent."""

    def states(self, activations: Sequence[Activations], targets: PositionTargets) -> list[Any]:
        """The last block's states at the scored positions [rows, positions, width]."""
        noise, step = self._noise(), self.current + 1
        packed = [pack(self._arrays.to_wire(h), self._compression, noise=noise) for h in activations]
        self._count_up(packed, targets)

        def ask() -> list[Any]:
            question = pb.AskStates(
                where=self._where(step), activations=[p.header for p in packed],
                positions=positions_to_message(targets),
            )  # fmt: skip
            parts = self.channel.converse(
                "States", upload_frames(pb.Upload(states=question), packed), pb.StatesReply
            )
            done = next(parts, pb.StatesReply()).done
            if len(done.states) != len(packed):
                raise WireError(f"asked for {len(packed)} states, the server sent {len(done.states)}")
            states = [
                self._received(header, (part.chunk for part in parts), targets) for header in done.states
            ]
            for _ in parts:
                raise WireError("States was answered by more than was announced")
            self._count_down("states", done.server_s, states)
            return states

        self._settle()
        return self._repeated(ask)

    def step_states(
        self,
        activations: Activations,
        targets: PositionTargets,
        answer: Callable[[Any], Any],
        *,
        step: int,
        want_gradient: bool,
    ) -> StepReply:
        """One update, in one call: activations up, states down, their gradient up, dL/dh down if wanted."""
        packed = pack(self._arrays.to_wire(activations), self._compression, noise=self._noise())
        self._count_up([packed], targets)

        def ask() -> StepReply:
            more: SimpleQueue[bytes | None] = SimpleQueue()
            question = pb.AskStepStates(
                where=self._where(step), activations=packed.header, positions=positions_to_message(targets),
                want_gradient=want_gradient,
            )  # fmt: skip

            def frames() -> Iterator[pb.Upload]:
                yield from upload_frames(pb.Upload(step_states=question), [packed])
                while (chunk := more.get()) is not None:
                    yield pb.Upload(chunk=chunk)

            try:
                parts = self.channel.converse("StepStates", frames(), pb.StepStatesReply)
                header = next(parts, pb.StepStatesReply()).states
                states = self._received(header, (part.chunk for part in parts), targets)
                begin = time.perf_counter()
                gradient = pack(self._arrays.to_wire(answer(states)), "none")
                self.wire_s -= (
                    time.perf_counter() - begin
                )  # the head's compute is this device's, not the wire's
                for chunk in gradient.chunks():
                    more.put(chunk)
                more.put(None)
                done = next(parts, pb.StepStatesReply()).done
                back = None
                if done.HasField("gradient"):
                    back = self._unpacked(done.gradient, packed.header, (part.chunk for part in parts))
                for _ in parts:
                    raise WireError("StepStates was answered by more than was announced")
                self._count_down("step", done.server_s, [states, back])
                self.meter.bytes_in += gradient.size_bytes
                return StepReply(0.0, back)
            finally:
                more.put(None)  # whatever happened, the sending thread must end

        self._settle()
        return self._repeated(ask)

    def _received(self, header: pb.Tensor, chunks: Iterator[bytes], targets: PositionTargets) -> Any:
        expected = [len(targets.mask), len(targets.positions)]
        if list(header.shape)[:2] != expected:
            raise WireError(f"asked for states {expected}, the server sent {list(header.shape)}")
        return self._filled(Unpacking(header, tensor_bytes=self._limits.tensor_bytes), chunks)
