"""The two parties with the authors' published defects D1-D3, D6, for the profile authors-head and nothing else.

They exist so that a difference between our numbers and the published ones can be attributed
(docs/concepts/algorithm.md). Dropout is torch's own, from a seed, in a context that puts the global random state back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.journal import Journal
from hosl.core.targets import Batch, Pair, StepReply, Targets
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.perturbation import Probe, descend_, stacked
from hosl.parties.servers.basic import FirstOrderServer


@contextmanager
def dropout(half: Any, seed: int) -> Iterator[None]:
    """Context manager: dropout in `half` as its config has it, drawn from `seed`; eval mode again afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        half.train()
        try:
            yield
        finally:
            half.eval()


class NoisyZerothOrderClient(ZerothOrderClient):
    """A zeroth-order client that can probe with dropout on in h+ only (D2)."""

    def probe_with_dropout(self, batch: Batch, seed: int, epsilon: float, dropout_seed: int) -> Pair:
        """h+ with dropout, h- without, [rows, seq, width] each."""
        ids, mask = self._inputs(batch)
        probe = Probe(seed, epsilon, self.distribution)
        with torch.no_grad(), stacked(self.half.model, [probe], 2 * len(ids)):
            with dropout(self.half, dropout_seed):
                h_plus, _ = self.half(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
            _, h_minus = self.half(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
        return h_plus, h_minus

    def replay(self, journal: Journal, *, after: int = 0) -> None:
        """Apply the journal's updates one direction at a time, as they were made (D6)."""
        for _, seeds, scales in journal.updates(after=after):
            for seed, scale in zip(seeds, scales, strict=True):
                descend_(self.trained, [seed], [scale], self.distribution)
        self.journal = journal


class NoisyFirstOrderServer(FirstOrderServer):
    """A first-order server with dropout in its training step and in evaluation (D2, D3)."""

    def loss_with_dropout(self, activations: torch.Tensor, targets: Targets, dropout_seed: int) -> float:
        """The mean loss with dropout on, in nats; theta_s unchanged."""
        with torch.no_grad(), dropout(self.half, dropout_seed):
            return float(self._loss(activations, targets))

    def step_with_dropout(
        self, activations: torch.Tensor, targets: Targets, *, step: int, dropout_seed: int
    ) -> StepReply:
        """One update of theta_s from a forward with dropout on."""
        with dropout(self.half, dropout_seed):
            return self.step(activations, targets, step=step)

    def scores(self, activations: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Scores with dropout on (D3); its seed comes from the mask, so that an evaluation repeats itself."""
        with dropout(self.half, crc32(targets.mask.tobytes())):
            return super().scores(activations, targets)
