"""A client on the engine that learns by residual feedback: the returned gradient used as it is, by a graph per block.

The graph was traced from the formulas of `parties.clients.residual`, which explains them: output projections move along
g x^T, with g the gradient at the cut, or where norms stand on the residual stream the gradient carried through them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Batch
from hosl.errors import ConfigError
from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.gradients import Kept, block_gradients, trained_by_block
from hosl.parties.edge.half import EdgeHalf
from hosl.parties.edge.optimisers import EdgeOptimiser, check_gradients
from hosl.parties.edge.update import descend_gradient_
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.micro_batches import row_slices

KeptOf: TypeAlias = Literal["auto", "stream", "blocks"]
"""What of the clean pass is kept until the gradient comes: the hidden state below the lowest moved block, or the input
of each moved block. auto: `blocks`, where it takes little (`AFFORDABLE`), else `stream`."""

AFFORDABLE = 0.08
"""The share of the half's own bytes that the kept inputs of blocks may take where `kept` is auto."""
EVALUATIONS = 2
"""The forward passes whose activations a block's feedback needs at once, about (`row_slices`)."""


class ResidualEdgeClient(FrozenEdgeClient):
    """A client whose last blocks move along the returned gradient; the twin of `ResidualClient`."""

    def __init__(
        self,
        half: EdgeHalf,
        trained: Sequence[str],
        *,
        decay: float = 1.0,
        kept: KeptOf = "auto",
        optimiser: OptimiserSpec | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        """Train output projections of the last blocks with the norms above them, or adapters on them.

        Args:
            half: the client half.
            trained: the parameters by their names in the half.
            decay: the factor of the learning rate for each block further down.
            kept: see `KeptOf`; it changes memory and time, not a bit of the update.
            optimiser: None: plain SGD.
            micro_batch_size: the rows that are evaluated at once; None: chosen by memory.

        Raises:
            ConfigError: if the half was split without these graphs, or nothing but the stream shall be kept of a model
                with norms on the stream.
        """
        super().__init__(half, trained, micro_batch_size=micro_batch_size)
        self._of_block = trained_by_block(half, self.trained, "feedback")
        self._lowest = min((i for i, names in enumerate(self._of_block) if names), default=half.cut)
        self._decay, self._kept_of = decay, kept
        if half.norms_on_stream and kept == "stream":
            raise ConfigError(
                "residual.kept: stream does not go with a model whose norms stand on the residual stream (post-LN): "
                "the gradient comes down through them, which needs the inputs of blocks; leave it out"
            )
        spec = optimiser or OptimiserSpec()
        self.optimiser = None if spec.plain else EdgeOptimiser(spec)
        self._kept: Kept | None = None

    def forward_keeping_inputs(self, batch: Batch) -> Float[np.ndarray, "rows seq width"]:
        """h; what the gradient will be combined with stays here until the update."""
        self._kept = None  # of a forward pass whose gradient never came
        slices = row_slices(batch.input_ids.shape, EVALUATIONS, self.micro_batch_size)
        hidden, extras = self._before_blocks(batch, slices)
        hidden = self._through(range(self._lowest), hidden, slices, extras)
        kept, stream_alone = Kept(slices, extras, batch), self._stream_alone(batch.input_ids.shape)
        for index in range(self._lowest, self.half.cut):
            if index == self._lowest or not stream_alone:
                kept.inputs.append(hidden)
            hidden = self._through([index], hidden, slices, extras)
        self._kept = kept
        return hidden

    def descend_by_feedback(
        self, gradient: Float[np.ndarray, "rows seq width"], learning_rate: float
    ) -> None:
        """W -= learning_rate sum_tokens g x^T for every moved layer, from dL/dh; biases and norms likewise.

        Raises:
            NonFiniteError: if the gradient is NaN, infinite or so large that its square is; nothing is changed then. Or
                if an optimiser refuses the gradients of a block; the blocks that were before it have moved.
        """
        check_gradients([gradient])
        for index, sums in self._gradients(gradient):
            rate = learning_rate * self._decay ** (self.half.cut - 1 - index)
            if self.optimiser is not None:
                self.optimiser.step_(self.trained, sums, rate)
                continue
            while sums:
                name, total = sums.popitem()
                descend_gradient_(self.trained[name], total, rate)

    def _gradients(self, gradient: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The gradients of each moved block; the block may move when they are given.

        From the cut down, or where only the stream was kept from the lowest up, as each is the next one's input.
        """
        assert self._kept is not None, "residual feedback needs a forward_keeping_inputs before it"
        kept, self._kept = self._kept, None
        at_output = np.ascontiguousarray(gradient, np.float32)
        moved = range(self._lowest, self.half.cut)
        if len(kept.inputs) < len(moved):
            hidden = kept.inputs.pop()
            for index in moved:
                below, last = hidden, index == moved[-1]
                hidden = below if last else self._through([index], below, kept.slices, kept.extras)
                yield index, self._feedback(index, kept, below, at_output, to_input=False)[0]
            return
        for index in reversed(moved):
            to_input = bool(self.half.norms_on_stream) and index > self._lowest
            sums, below = self._feedback(index, kept, kept.inputs.pop(), at_output, to_input=to_input)
            at_output = at_output if below is None else below
            yield index, sums

    def _feedback(
        self, index: int, kept: Kept, hidden: np.ndarray, at_output: np.ndarray, *, to_input: bool
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        return block_gradients(
            self.half, index, "feedback", kept, hidden, at_output,
            wanted=self._of_block[index], to_input=to_input,
        )  # fmt: skip

    def _stream_alone(self, shape: Sequence[int]) -> bool:
        """Whether nothing but the hidden state below the lowest moved block is kept, for a batch [rows, seq]."""
        if self._kept_of != "auto" or self.half.norms_on_stream:
            return self._kept_of == "stream"
        inputs = (self.half.cut - self._lowest) * math.prod(shape) * self.half.facts.width * 4
        return inputs > AFFORDABLE * sum(stored.size_bytes for stored in self.half.weights.stored.values())
