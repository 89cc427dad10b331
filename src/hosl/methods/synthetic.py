"""A synthetic batch and a synthetic server: they measure a client alone, without data and without the other half."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Batch, OptionTargets, StepReply, Targets


def fixed_batch(client: Any, rows: int, tokens: int, *, scored: int = 0) -> Batch:
    """`synthetic_batch` in the vocabulary of a torch client's half."""
    return synthetic_batch(client.half.config.get_text_config().vocab_size, rows, tokens, scored=scored)


def synthetic_batch(vocabulary: int, rows: int, tokens: int, *, scored: int = 0) -> Batch:
    """The batch of every measured and planned step: the longest there is, one scored token per row.

    One position is padding: without any, attention would run without a mask, which is rare for batches of text.
    `scored`: so many of a row's last tokens are learned, and the loss is the mean over all of them.
    """
    generator = np.random.Generator(np.random.Philox(key=0))
    ids = generator.integers(3, vocabulary, (rows, tokens))
    last = np.full((rows, 1), tokens - 2, np.int32)
    mask = np.ones(ids.shape, np.int8)
    mask[0, 0] = 0
    if scored:
        places = np.tile(np.arange(tokens - scored, tokens, dtype=np.int32), (rows, 1))
        return Batch(ids, OptionTargets(mask, places - 1, ids[:, -scored:].astype(np.int32), "tokens"))
    return Batch(ids, OptionTargets(mask, last, ids[:, -1:].astype(np.int32)))


class NoServer:
    """A server that replies at once with synthetic numbers."""

    def losses(self, activations: Sequence[Any], targets: Targets) -> list[float]:
        """Losses that differ from each other, so that a client's coefficients are not 0."""
        return [0.7 + 0.1 * i for i, _ in enumerate(activations)]

    def scores(self, activations: Any, targets: Targets) -> Float[np.ndarray, "rows 1"]:
        """Zeros [rows, 1]: every option is as likely."""
        return np.zeros((len(activations), 1))

    def step(
        self, activations: Any, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """A loss, and with `want_gradient` a gradient of the activations' shape."""
        return StepReply(0.7, activations * 1e-3 if want_gradient else None)

    def loss_with_dropout(self, activations: Any, targets: Targets, dropout_seed: int) -> float:
        """The first of `losses`."""
        return self.losses([activations], targets)[0]

    def step_with_dropout(
        self, activations: Any, targets: Targets, *, step: int, dropout_seed: int
    ) -> StepReply:
        """A loss; its activations are those of `loss_with_dropout`."""
        return StepReply(0.7)

    def gradient(self, activations: Any, targets: Targets) -> StepReply:
        """The reply of `step` with a gradient."""
        return self.step(activations, targets, step=0, want_gradient=True)

    def probe(self, pair: Any, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """Two losses that differ."""
        return 0.7, 0.8

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """Do nothing."""
