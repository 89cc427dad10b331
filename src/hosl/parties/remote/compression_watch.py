"""What compression does to the signal, measured as a run goes.

Now and then a step's first question is asked twice, compressed and plain. The difference goes into the metrics beside
the signal: an error in L+ - L- is divided by 2 epsilon (methods.md (g)), so it must stay far below it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hosl.core.targets import Activations, StepReply, Targets
from hosl.parties.remote.packing import Packing

EVERY_STEPS = 25
"""Between two measurements; each costs one more upload of a pair, or one more gradient."""


class WatchesCompression(Packing):
    """Laid over a server that compresses what it is asked (`RemoteServer`, `CompressedServer`)."""

    gradient: Callable[..., StepReply]
    _noted: dict[str, float] | None = None

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """As the server below."""
        due = self._due
        below: Any = super()
        answer = below.losses(activations, targets)
        if due and len(activations) == 2:
            plus, minus = answer
            with self._plain():
                exact_plus, exact_minus = below.losses(activations, targets)
            self._noted = {
                "loss_difference_nats": exact_plus - exact_minus,
                "compression_error_nats": (plus - minus) - (exact_plus - exact_minus),
            }
        return answer

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """As the server below."""
        if self._due and want_gradient:
            sent = self._gradient_array(activations, targets)
            with self._plain():
                exact = self._gradient_array(activations, targets)
            self._noted = {
                "gradient_norm": float(np.linalg.norm(exact)),
                "compression_error_norm": float(np.linalg.norm(sent - exact)),
            }
        below: Any = super()
        return below.step(activations, targets, step=step, want_gradient=want_gradient)

    def notes(self) -> dict[str, float]:
        """What was measured in the step just done; empty in most."""
        noted, self._noted = self._noted or {}, None
        return noted

    @property
    def _due(self) -> bool:
        return self.current % EVERY_STEPS == 0 and self._asked == 0

    def _gradient_array(self, activations: Activations, targets: Targets) -> np.ndarray:
        gradient = self.gradient(activations, targets).gradient
        return self._arrays.to_wire(gradient).widened().astype(np.float64)

    @contextmanager
    def _plain(self) -> Iterator[None]:
        compression, self._compression = self._compression, "none"
        try:
            yield
        finally:
            self._compression = compression
