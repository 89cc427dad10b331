"""Compression without a network: a server of the same process gets the bits that it would get over a network.

`CompressedServer` is the client's end, `Receiving` the server's. A meter between the two counts the bytes.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Activations, Pair, StepReply, Targets
from hosl.parties.remote.compression_watch import WatchesCompression
from hosl.parties.remote.packing import Arrays, Packing
from hosl.wire.tensors import Compression, Packed, Unpacking, pack


class CompressedServer(Packing):
    """The counterpart of `RemoteServer` without a network: packs activations and calls a server of this process."""

    def __init__(self, server: Any, arrays: Arrays, *, compression: Compression, seed: int) -> None:
        """`server` takes packed activations (`Receiving`); the other arguments are those of `Packing`."""
        super().__init__(arrays, compression=compression, seed=seed)
        self._server = server

    def at_rest(self) -> "CompressedServer":
        """The same in front of the same server: for evaluation, which belongs to no step."""
        return CompressedServer(self._server, self._arrays, compression=self._compression, seed=self._seed)

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The mean loss of each activation, in nats; NaN without a call where an activation is NaN or infinite."""
        packed = self._finite_packed(activations)
        return [math.nan for _ in activations] if packed is None else self._server.losses(packed, targets)

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token."""
        return self._server.scores(self._packed(activations, "scores"), targets)

    def gradient(self, activations: Activations, targets: Targets) -> StepReply:
        """The loss and dL/dh; theta_s unchanged."""
        return self._server.gradient(self._packed(activations, self._noise()), targets)

    def probe(self, pair: Pair, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """Losses of h+ and h- at theta_s +- epsilon u(seed); NaN as in `losses`."""
        packed = self._finite_packed(pair)
        if packed is None:
            return math.nan, math.nan
        return self._server.probe(packed, targets, seed, epsilon)

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s."""
        packed = self._packed(activations, self._noise())
        return self._server.step(packed, targets, step=step, want_gradient=want_gradient)

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """One update of a zeroth-order server."""
        self._server.descend(step, seeds, coefficients)

    def _packed(self, activations: Activations, noise: str) -> Packed:
        array = self._arrays.to_wire(activations)
        # NaN and Inf go uncompressed: the server reports them, as it does without compression
        return pack(array, self._compression if array.finite() else "none", noise=noise)


class WatchedCompressedServer(WatchesCompression, CompressedServer):
    """A `CompressedServer` that measures its compression error, in the same steps as a `WatchedServer`."""


class Receiving:
    """The server's end: packed activations in, the runtime's tensors to the server."""

    def __init__(self, server: Any, arrays: Arrays) -> None:
        self._server, self._arrays = server, arrays

    def losses(self, packed: Sequence[Packed], targets: Targets) -> Sequence[float]:
        """See `CompressedServer`."""
        return self._server.losses([self._unpacked(p) for p in packed], targets)

    def scores(self, packed: Packed, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """See `CompressedServer`."""
        return self._server.scores(self._unpacked(packed), targets)

    def gradient(self, packed: Packed, targets: Targets) -> StepReply:
        """See `CompressedServer`."""
        return self._server.gradient(self._unpacked(packed), targets)

    def probe(
        self, packed: Sequence[Packed], targets: Targets, seed: int, epsilon: float
    ) -> tuple[float, float]:
        """See `CompressedServer`."""
        h_plus, h_minus = (self._unpacked(p) for p in packed)
        return self._server.probe((h_plus, h_minus), targets, seed, epsilon)

    def step(self, packed: Packed, targets: Targets, *, step: int, want_gradient: bool = False) -> StepReply:
        """See `CompressedServer`."""
        return self._server.step(self._unpacked(packed), targets, step=step, want_gradient=want_gradient)

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """See `CompressedServer`."""
        self._server.descend(step, seeds, coefficients)

    def _unpacked(self, packed: Packed) -> Activations:
        unpacking = Unpacking(packed.header, tensor_bytes=sys.maxsize)
        for chunk in packed.chunks():
            unpacking.add(chunk)
        return self._arrays.from_wire(unpacking.array())
