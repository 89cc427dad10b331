"""Activations made ready for the wire: by which compression, and by which noise int8 rounds.

Whoever asks a server with packed activations counts its questions here, over a connection or in one process: so both
round by the same noise.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from hosl.core.targets import Activations
from hosl.wire.tensors import Compression, Packed, WireArray, pack


@runtime_checkable
class Arrays(Protocol):
    """A runtime's tensors <-> the wire's arrays (`torch_wire`)."""

    def to_wire(self, tensor: Any) -> WireArray:
        """Shares memory where it can."""
        ...

    def from_wire(self, array: WireArray) -> Any:
        """Shares memory where it can."""
        ...


class Packing:
    """Which step the client begins next, how many questions it has asked in it, and how activations are packed."""

    def __init__(self, arrays: Arrays, *, compression: Compression, seed: int) -> None:
        """No question has been asked yet.

        Args:
            arrays: of the client's runtime.
            compression: of the activations on their way up.
            seed: of the run; keys the rounding noise of int8.
        """
        self._arrays, self._seed = arrays, seed
        self._compression: Compression = compression
        self.current = 0
        """The step whose state the client is in (`at`)."""
        self._asked = 0

    def at(self, step: int) -> None:
        """The client is in the state after `step` now, and will begin the next one."""
        self.current, self._asked = step, 0

    def _finite_packed(self, activations: Sequence[Activations]) -> list[Packed] | None:
        """By one noise, as both probes of a direction are; None where one holds NaN or infinity."""
        arrays = [self._arrays.to_wire(h) for h in activations]
        if not all(array.finite() for array in arrays):
            return None
        noise = self._noise()
        return [pack(array, self._compression, noise=noise) for array in arrays]

    def _noise(self) -> str:
        """The key of the next question's rounding noise: the same when a step is done again."""
        self._asked += 1
        return f"{self._seed}/{self.current}/{self._asked}"
