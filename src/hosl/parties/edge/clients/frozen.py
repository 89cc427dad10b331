"""A client on the engine that only computes activations, and the base class of the others."""

from collections.abc import Sequence

import numpy as np

from hosl.core.array_types import Float, Int
from hosl.core.targets import Batch
from hosl.parties.edge.half import EdgeHalf, Extras, Reads, in_slices
from hosl.parties.micro_batches import row_slices


class FrozenEdgeClient:
    """A client that only computes activations; the twin of `FrozenClient`."""

    def __init__(
        self, half: EdgeHalf, trained: Sequence[str] = (), *, micro_batch_size: int | None = None
    ) -> None:
        """Take the half over.

        Args:
            half: the client half.
            trained: the parameters that are trained, by their names in the half; here none.
            micro_batch_size: the rows of a batch that are evaluated at once; None: chosen by memory (`row_slices`).
                Rows are independent of each other, so this changes memory only.
        """
        self.half = half
        self.trained: dict[str, np.ndarray] = half.trained_(trained)
        """The trained parameters, float32, by Hugging Face's names; adapters by peft's."""
        self.micro_batch_size = micro_batch_size
        self.device = "cpu"

    def forward(self, batch: Batch) -> Float[np.ndarray, "rows seq width"]:
        """h = f_c(x; theta_c), float32."""
        slices = self._slices(batch)
        hidden, extras = self._before_blocks(batch, slices)
        return self._through(range(self.half.cut), hidden, slices, extras)

    def _slices(self, batch: Batch) -> list[slice]:
        return row_slices(batch.input_ids.shape, 1, self.micro_batch_size)

    def _inputs(self, batch: Batch) -> tuple[Int[np.ndarray, "rows seq"], Int[np.ndarray, "rows seq"]]:
        return batch.input_ids, batch.targets.mask.astype(np.int64)

    def _before_blocks(
        self, batch: Batch, slices: Sequence[slice], read: Reads | None = None
    ) -> tuple[np.ndarray, list[Extras]]:
        """The input of block 0 for all rows, and for each slice what its blocks are given beside it."""
        ids, mask = self._inputs(batch)
        extras: list[Extras] = []

        def prelude(rows: slice, number: int) -> np.ndarray:
            hidden, beside = self.half.prelude(ids[rows], mask[rows], read)
            extras.append(beside)
            return hidden

        return in_slices(prelude, slices, (*ids.shape, self.half.facts.width)), extras

    def _through(
        self, blocks: Sequence[int], hidden: np.ndarray, slices: Sequence[slice], extras: Sequence[Extras]
    ) -> np.ndarray:
        """The hidden state after some blocks, all rows through one before the next."""
        for index in blocks:
            hidden = self._through_block(index, hidden, slices, extras, self.half.block_weights(index))
            self.half.release(index)
        return hidden

    def _through_block(
        self,
        index: int,
        hidden: np.ndarray,
        slices: Sequence[slice],
        extras: Sequence[Extras],
        weights: dict[str, np.ndarray],
    ) -> np.ndarray:
        """The output of one block for all rows."""
        return in_slices(
            lambda rows, number: self.half.block(index, hidden[rows], extras[number], weights),
            slices,
            hidden.shape,
        )
