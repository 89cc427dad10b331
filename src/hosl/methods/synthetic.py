"""A made-up batch and a made-up server: what a client takes by itself, without data and without the other half."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Batch, OptionTargets, StepReply, Targets


def fixed_batch(client: Any, rows: int, tokens: int) -> Batch:
    """The batch of every measured and planned step: the longest there is, one scored token per row.

    One place is padding: without any, attention would go without a mask, which batches of text hardly ever do.
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    vocabulary = client.half.config.get_text_config().vocab_size
    ids = generator.integers(3, vocabulary, (rows, tokens))
    last = np.full((rows, 1), tokens - 2, np.int32)
    mask = np.ones(ids.shape, np.int8)
    mask[0, 0] = 0
    return Batch(ids, OptionTargets(mask, last, ids[:, -1:].astype(np.int32)))


class NoServer:
    """Answers at once with made-up numbers: what a client takes by itself, to subtract."""

    def losses(self, activations: Sequence[Any], targets: Targets) -> list[float]:
        """Different from each other, so that a client has something to descend."""
        return [0.7 + 0.1 * place for place, _ in enumerate(activations)]

    def scores(self, activations: Any, targets: Targets) -> Float[np.ndarray, "rows 1"]:
        """Every answer is as likely."""
        return np.zeros((len(activations), 1))

    def step(
        self, activations: Any, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """A gradient as large as the activations, where one is wanted."""
        return StepReply(0.7, activations * 1e-3 if want_gradient else None)

    def step_at_mean(self, activations: Sequence[Any], targets: Targets, *, step: int) -> list[float]:
        """As `losses`."""
        return NoServer.losses(self, activations, targets)

    def loss_with_dropout(self, activations: Any, targets: Targets, dropout_seed: int) -> float:
        """As `losses`."""
        return self.losses([activations], targets)[0]

    def step_with_dropout(
        self, activations: Any, targets: Targets, *, step: int, dropout_seed: int
    ) -> StepReply:
        """As `step`, at activations that have crossed for `loss_with_dropout`."""
        return StepReply(0.7)

    def gradient(self, activations: Any, targets: Targets) -> StepReply:
        """As `step`."""
        return self.step(activations, targets, step=0, want_gradient=True)

    def probe(self, pair: Any, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """As `losses`."""
        return 0.7, 0.8

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """Nothing to do."""
