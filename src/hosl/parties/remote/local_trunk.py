"""A trunk of this process, for a client that keeps its labels; the bits and the bytes are those of a `RemoteTrunk`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from hosl.core.targets import Activations, AskedPositions, StepReply
from hosl.parties.metered import Meter
from hosl.parties.remote.packing import Arrays, Packing
from hosl.wire.tensors import Compression, Packed, Unpacking, pack


class LocalTrunk(Packing):
    """The `Trunk` of `parties.headed` in one process; activations are packed as those that cross a network."""

    def __init__(
        self, server: Any, arrays: Arrays, *, compression: Compression = "none", seed: int = 0
    ) -> None:
        """`server` is a `TrunkServer`; the other arguments are those of `Packing`."""
        super().__init__(arrays, compression=compression, seed=seed)
        self._server = server
        self.meter = Meter()
        """The meter of the server's calls."""

    def states(
        self, activations: Sequence[Activations], targets: AskedPositions, *, at_rest: bool = False
    ) -> list[Any]:
        """The last block's states at the scored positions (`states_shape`)."""

        def states(sent: Sequence[Any], targets: AskedPositions) -> list[Any]:
            return self._server.states([self._received(h) for h in sent], targets)

        noise = "scores" if at_rest else self._noise()
        return self.meter.call(states, [self._sent(h, noise) for h in activations], targets)

    def step_states(
        self,
        activations: Activations,
        targets: AskedPositions,
        answer: Callable[[Any], Any],
        *,
        step: int,
        want_gradient: bool,
    ) -> StepReply:
        """One update from the gradient at the states, with dL/dh in the reply if `want_gradient`."""
        update: list[Callable[[Any, int, bool], StepReply]] = []

        def states_for_step(sent: Any, targets: AskedPositions) -> Any:
            states, finish = self._server.states_for_step(self._received(sent), targets)
            update.append(finish)
            return states

        def step_at_states(gradient: Any) -> Any:
            return update[0](gradient, step, want_gradient).gradient

        states = self.meter.call(states_for_step, self._sent(activations, self._noise()), targets)
        gradient = self.meter.call(step_at_states, answer(states))
        return StepReply(loss=0.0, gradient=gradient)

    def _sent(self, activations: Activations, noise: str) -> Any:
        if self._compression == "none":
            return activations
        array = self._arrays.to_wire(activations)
        # NaN and Inf go uncompressed: the head reports them, as it does without compression
        return pack(array, self._compression if array.finite() else "none", noise=noise)

    def _received(self, sent: Any) -> Activations:
        if not isinstance(sent, Packed):
            return sent
        unpacking = Unpacking(sent.header, tensor_bytes=sys.maxsize)
        for chunk in sent.chunks():
            unpacking.add(chunk)
        return self._arrays.from_wire(unpacking.array())
