"""A client on the engine trained by exact gradients, one block at a time: recomputation, micro-batches, fused updates.

The gradients are those of backprop through the half. Between the two calls only each block's input is kept; each
block's graph of gradients computes the block again, and the block moves before the one below it is reached.
"""

from collections.abc import Sequence

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Batch
from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.gradients import Kept, block_gradients, trained_by_block
from hosl.parties.edge.half import EdgeHalf
from hosl.parties.edge.optimisers import EdgeOptimiser
from hosl.parties.edge.update import descend_gradient_
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.micro_batches import row_slices

EVALUATIONS = 4
"""The share of a batch's rows that are evaluated and recomputed at once, for memory: a block's gradients hold the
activations of about four forward passes. Fewer rows take longer: a tenth at 2 of 64 tokens against 4, as matrices are
read again for each micro-batch; a third over an int8 base, where they are widened again, too."""


class RecomputingEdgeClient(FrozenEdgeClient):
    """A client trained by backprop in little memory; the twin of `RecomputingClient`.

    Requires: trained parameters in blocks. The weights after a step depend on the micro-batches by rounding.
    """

    def __init__(
        self,
        half: EdgeHalf,
        trained: Sequence[str],
        *,
        optimiser: OptimiserSpec | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        """Train parameters of blocks, or adapters.

        Args:
            half: the client half.
            trained: the parameters by their names in the half.
            optimiser: None: plain SGD.
            micro_batch_size: the rows that are evaluated and recomputed at once; None: chosen by memory.

        Raises:
            ConfigError: if one of them is before block 0, or the half was split without graphs of gradients.
        """
        super().__init__(half, trained, micro_batch_size=micro_batch_size)
        self._of_block = trained_by_block(half, self.trained, "gradient")
        """The trained parameters of each block."""
        self._lowest = min((i for i, names in enumerate(self._of_block) if names), default=half.cut)
        spec = optimiser or OptimiserSpec()
        self.optimiser = None if spec.plain else EdgeOptimiser(spec)
        self._kept: Kept | None = None

    def forward_for_backward(self, batch: Batch) -> Float[np.ndarray, "rows seq width"]:
        """h; the inputs of the blocks from the lowest trained one on stay here until `backward`, but for block 0's."""
        self._kept = None  # of a forward pass whose gradient never came
        slices = row_slices(batch.input_ids.shape, EVALUATIONS, self.micro_batch_size)
        hidden, extras = self._before_blocks(batch, slices)
        hidden = self._through(range(self._lowest), hidden, slices, extras)
        kept = Kept(slices, extras, batch)
        for index in range(self._lowest, self.half.cut):
            if index > 0:  # that of block 0 is as quickly made again
                kept.inputs.append(hidden)
            hidden = self._through([index], hidden, slices, extras)
        self._kept = kept
        return hidden

    def backward(self, gradient: Float[np.ndarray, "rows seq width"], learning_rate: float) -> None:
        """One update of theta_c, block by block, from dL/dh of the last `forward_for_backward`.

        Raises:
            NonFiniteError: if an optimiser refuses the gradients of a block; the blocks above it have moved.
        """
        assert self._kept is not None, "backward needs a forward_for_backward before it"
        kept, self._kept = self._kept, None
        at_output = np.ascontiguousarray(gradient, np.float32)
        for index in reversed(range(self._lowest, self.half.cut)):
            hidden = kept.inputs.pop() if index > 0 else self._before_blocks(kept.batch, kept.slices)[0]
            sums, below = block_gradients(
                self.half, index, "gradient", kept, hidden, at_output,
                wanted=self._of_block[index], to_input=index > self._lowest,
            )  # fmt: skip
            if self.optimiser is not None:
                self.optimiser.step_(self.trained, sums, learning_rate)
                sums.clear()
            while sums:  # each is released once its weights have moved
                name, total = sums.popitem()
                descend_gradient_(self.trained[name], total, learning_rate)
            at_output = at_output if below is None else below
