"""Activations packed for the wire: their compression, and the noise by which int8 rounds.

Requests with packed activations are counted here, over a connection and in one process alike: so both round by the same
noise.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from hosl.core.targets import Activations
from hosl.wire.tensors import Compression, Packed, WireArray, pack


@runtime_checkable
class Arrays(Protocol):
    """The conversion between a runtime's tensors and the wire's arrays (`torch_wire`)."""

    def to_wire(self, tensor: Any) -> WireArray:
        """The tensor as an array; shares memory where it can."""
        ...

    def from_wire(self, array: WireArray) -> Any:
        """The array as a tensor; shares memory where it can."""
        ...


class Packing:
    """The packing of activations, and the client's step with the number of its requests, which key the noise."""

    def __init__(self, arrays: Arrays, *, compression: Compression, seed: int) -> None:
        """Start at step 0, without requests.

        Args:
            arrays: the conversion for the client's runtime.
            compression: the compression of uploaded activations.
            seed: the run's seed; keys the rounding noise of int8.
        """
        self._arrays, self._seed = arrays, seed
        self._compression: Compression = compression
        self.current = 0
        """The step after which the client is (`at`); it begins the next one."""
        self._requests = 0

    def at(self, step: int) -> None:
        """Record that the client is in the state after `step` and begins the next one."""
        self.current, self._requests = step, 0

    def _finite_packed(self, activations: Sequence[Activations]) -> list[Packed] | None:
        """The activations packed by one noise, as both probes of a direction are; None if one holds NaN or infinity."""
        arrays = [self._arrays.to_wire(h) for h in activations]
        if not all(array.finite() for array in arrays):
            return None
        noise = self._noise()
        return [pack(array, self._compression, noise=noise) for array in arrays]

    def _noise(self) -> str:
        """The key of the next request's rounding noise: the same when a step is repeated."""
        self._requests += 1
        return f"{self._seed}/{self.current}/{self._requests}"
