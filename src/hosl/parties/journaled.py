"""A client whose state is a journal: updates along random directions, over its base weights. No torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hosl.core.estimators import mean_scales
from hosl.core.journal import Journal


class Journaled(ABC):
    """The updates of a client trained by probes, in any runtime; every one of them is in its journal."""

    journal: Journal
    trained: Any
    """The trained weights by name."""

    @abstractmethod
    def _move_(self, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """theta_c -= sum_q scale_q u(seed_q)."""

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c -= eta_c / Q sum_q c_q u(seed_q), and the journal's entries for it. Source: Alg. 1, line 8."""
        self.apply(step, seeds, mean_scales(coefficients, learning_rate))

    def apply(self, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """theta_c -= sum_q scale_q u(seed_q), and the journal's entries for it; `descend` by scales."""
        self.journal.append(step, seeds, scales)
        self._move_(seeds, scales)

    def replay(self, journal: Journal, *, after: int = 0) -> None:
        """Apply the updates of `journal` later than step `after`. Requires: the weights after that step."""
        for _, seeds, scales in journal.updates(after=after):
            self._move_(seeds, scales)
        self.journal = journal
