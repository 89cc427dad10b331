"""The compression error beside the signal, measured during a run.

Every `EVERY_STEPS` steps the first call is made twice, compressed and uncompressed. The difference goes into the
metrics beside the signal: an error in L+ - L- is divided by 2 epsilon (methods.md (g)), so it must be far
smaller than the signal.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hosl.core.targets import Activations, StepReply, Targets
from hosl.parties.remote.packing import Packing

EVERY_STEPS = 25
"""The steps between two measurements; each costs one more upload of a pair, or one more gradient."""


class WatchesCompression(Packing):
    """A mixin for a server that compresses its requests (`RemoteServer`, `CompressedServer`)."""

    gradient: Callable[..., StepReply]
    _measured: dict[str, float] | None = None

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The losses from the server below, in some steps with the compression error measured."""
        due = self._due
        below: Any = super()
        losses = below.losses(activations, targets)
        if due and len(activations) == 2:
            plus, minus = losses
            with self._uncompressed():
                exact_plus, exact_minus = below.losses(activations, targets)
            self._measured = {
                "loss_difference_nats": exact_plus - exact_minus,
                "compression_error_nats": (plus - minus) - (exact_plus - exact_minus),
            }
        return losses

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update by the server below, in some steps with the gradient's compression error measured."""
        if self._due and want_gradient:
            compressed = self._gradient_array(activations, targets)
            with self._uncompressed():
                exact = self._gradient_array(activations, targets)
            self._measured = {
                "gradient_norm": float(np.linalg.norm(exact)),
                "compression_error_norm": float(np.linalg.norm(compressed - exact)),
            }
        below: Any = super()
        return below.step(activations, targets, step=step, want_gradient=want_gradient)

    def notes(self) -> dict[str, float]:
        """The measurements of the last step, for its metrics; empty in most steps."""
        measured, self._measured = self._measured or {}, None
        return measured

    @property
    def _due(self) -> bool:
        return self.current % EVERY_STEPS == 0 and self._requests == 0

    def _gradient_array(self, activations: Activations, targets: Targets) -> np.ndarray:
        gradient = self.gradient(activations, targets).gradient
        return self._arrays.to_wire(gradient).widened().astype(np.float64)

    @contextmanager
    def _uncompressed(self) -> Iterator[None]:
        compression, self._compression = self._compression, "none"
        try:
            yield
        finally:
            self._compression = compression
