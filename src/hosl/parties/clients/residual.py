"""A client that learns by forward passes alone: residual feedback, the returned gradient used as it is.

In a pre-LN model the residual stream hands the gradient down: dL/dh_l = (I + J_l)^T dL/dh_{l+1}, with J_l small against
I. So g, the gradient at the cut, stands for the gradient at the output of every block below, and an output projection
y = W x, whose output is added to the stream, moves by W -= eta sum_tokens g x^T. No perturbation, no measured slope, no
backprop; direct feedback alignment whose feedback matrix is the identity, because the architecture made it so.
Biased: the deeper the block, the less g is its gradient. Source: methods.md (o); docs/concepts/residual-feedback.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from hosl.core.targets import Batch
from hosl.parties.clients.output_projections import OutputProjectionClient, Part, forget_hidden_
from hosl.parties.engine.block_calls import recorded
from hosl.parties.engine.optimisers import OptimiserSpec, check_gradients, make_optimiser, optimiser_step
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf
from hosl.split.adapters import lora_layers, set_trainable
from hosl.split.residual_feedback import (
    BlockLayers,
    Term,
    block_layers,
    exact,
    feedback_terms,
    inputs_read,
    layer_terms,
)

Kept: TypeAlias = Literal["auto", "stream", "blocks", "inputs"]
"""What of the clean pass is kept until the gradient comes: the hidden state below the lowest moved block, the input of
each moved block, or that of each moved layer. auto: `blocks`, where it takes little (`AFFORDABLE`), else `stream`."""

AFFORDABLE = 0.08
"""The share of the half's own bytes that the kept inputs of blocks may take where `kept` is auto."""


class ResidualClient(OutputProjectionClient):
    """A `ResidualClientSide`: the output projections of the last blocks move along the returned gradient.

    A step is one forward pass and, unless the inputs of layers were kept, most of another one through the moved blocks.
    Memory beside the weights: what is kept, and one block's gradients where there are several micro-batches or an
    optimiser with a state. Autograd is used for norms between a layer and the stream alone, one at a time; pre-LN
    blocks have none.
    """

    def __init__(
        self,
        half: ClientHalf,
        *,
        blocks: int = 1,
        decay: float = 1.0,
        kept: Kept = "auto",
        optimiser: OptimiserSpec | None = None,
        micro_batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Train the output projections of the last `blocks` blocks, and norms between them and the stream.

        Args:
            half: the client half, with float weights, or with adapters on these layers, which are then trained alone.
            blocks: at least 1, at most the half's cut.
            decay: the factor of the learning rate for each block further down.
            kept: see `Kept`; it changes memory and time, not a bit of the update. Not `stream` where norms stand on the
                stream (post-LN), through which the gradient is carried from the cut down.
            optimiser: None: plain SGD.
            micro_batch_size: the rows that are evaluated at once; None: chosen by memory (`row_slices`).
            device: a torch device.
        """
        super().__init__(half, blocks=blocks, decay=decay, micro_batch_size=micro_batch_size, device=device)
        self._kept = "blocks" if kept == "auto" and half.norms_on_stream else kept
        assert not (half.norms_on_stream and kept == "stream"), (
            "norms on the stream need the inputs of blocks"
        )
        self._layers_of = [self._layers_in(index) for index in range(blocks)]
        """The layers of each trained block, by their names in the half."""
        if not lora_layers(half):
            set_trainable(half, "output-projections", blocks=blocks)  # the norms, too
            self.trained = trained_parameters(half.model)
        spec = optimiser or OptimiserSpec()
        self.optimiser = None if spec.plain else make_optimiser(spec, self.trained.values())

    def _layers_in(self, index: int) -> BlockLayers:
        layers = block_layers(self.half, self._blocks[index], f"{self._block_names[index]}.")
        # None: without adapters, where others have some
        trained = {name: self._of_block[index].get(name) for name in layers.projections}
        return replace(layers, projections=trained)

    def descend_by_feedback(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """W -= learning_rate sum_tokens g x^T for every moved layer, from dL/dh [rows, seq, width]; biases likewise.

        Raises:
            NonFiniteError: if the gradient is NaN, infinite or so large that its square is; nothing is changed then. Or
                if an optimiser refuses the gradients of a block; the blocks that were before it have moved.
        """
        check_gradients([gradient])
        for index, parts in self._blocks_with(gradient):
            self._descend_block_(index, parts, learning_rate * self._decayed(index))

    def feedback_gradients(self, batch: Batch, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """By trained weight, the gradient that residual feedback takes for its own; no weight changes."""
        self.forward_keeping_inputs(batch)
        names: dict[torch.Tensor, str] = {p: name for name, p in self.trained.items()}
        found: dict[str, torch.Tensor] = {}
        for index, parts in self._blocks_with(gradient):
            found |= {names[p]: total for p, total in self._sums(index, parts).items()}
        return found

    def _blocks_with(self, gradient: torch.Tensor) -> Iterator[tuple[int, list[Part]]]:
        """The trained blocks by index, with the micro-batches and their gradients; without a graph.

        From the cut down, or where only the stream was kept from the lowest up, as each is the next one's input.
        """
        assert self._parts, "residual feedback needs a forward_keeping_inputs before it"
        parts, self._parts = self._parts, []
        gradient = gradient.to(self.device)
        for part in parts:
            part.gradient = gradient[part.rows]
        upwards = range(len(self._blocks))
        with torch.no_grad():
            for index in upwards if parts[0].stream_alone else reversed(upwards):
                yield index, parts

    @property
    def layers(self) -> tuple[str, ...]:
        """The trained output projections by their names in the half, in block order."""
        return tuple(self._projections)

    def _part(self, rows: slice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = self._kept if self._kept != "auto" else self._affordable(ids.shape)
        reads: dict[str, torch.Tensor] = {}
        everywhere = range(len(self._blocks)) if kept == "inputs" else ()
        modules = {
            name: module for index in everywhere for name, module in self._layers_of[index].read.items()
        }
        with torch.no_grad(), recorded(self._blocks) as calls, inputs_read(modules, reads.__setitem__):
            h = self.half(ids[rows], mask[rows])
        forget_hidden_(calls if kept == "inputs" else calls[1:] if kept == "stream" else [])
        self._parts.append(Part(rows, calls, reads, stream_alone=kept == "stream"))
        return h

    def _affordable(self, shape: Sequence[int]) -> Kept:
        """blocks or stream, for a batch [rows, seq]."""
        width = self.half.config.get_text_config().hidden_size
        size = next(p.dtype for p in self.half.parameters() if p.is_floating_point()).itemsize
        held = sum(t.nbytes for t in (*self.half.model.parameters(), *self.half.model.buffers()))
        inputs = len(self._blocks) * math.prod(shape) * width * size
        return "blocks" if inputs <= AFFORDABLE * held else "stream"

    def _descend_block_(self, index: int, parts: list[Part], rate: float) -> None:
        """The update of one block from the micro-batches."""
        if self.optimiser is not None:
            for p, total in self._sums(index, parts).items():
                p.grad = total.to(p.dtype)
            optimiser_step(self.optimiser, rate)
            return
        if len(parts) == 1 and all(p.dtype == exact(p.dtype) for p in self.trained.values()):
            for term in self._terms(index, parts[0]):
                term.add_to_(term.parameter, -rate)  # without a copy as large as the weights
            return
        for p, total in self._sums(index, parts).items():
            p.copy_(p.to(total.dtype).sub_(total, alpha=rate))

    def _sums(self, index: int, parts: list[Part]) -> dict[torch.Tensor, torch.Tensor]:
        """The gradients of one block's weights over all micro-batches, in at least float32."""
        sums: dict[torch.Tensor, torch.Tensor] = {}
        for part in parts:
            for term in self._terms(index, part):
                p = term.parameter
                if p not in sums:
                    sums[p] = torch.zeros_like(p, dtype=exact(p.dtype))
                term.add_to_(sums[p], 1.0)
        return sums

    def _reads(self, index: int, part: Part) -> dict[str, torch.Tensor]:
        """The inputs of one block's layers and norms for the rows of a part, kept or computed again."""
        modules = self._layers_of[index].read
        if part.reads:
            return {name: part.reads.pop(name) for name in modules}
        call, above = part.calls[index], part.calls[index + 1 : index + 2] if part.stream_alone else []
        reads: dict[str, torch.Tensor] = {}

        def read(name: str, x: torch.Tensor) -> None:
            reads[name] = x
            if len(reads) == len(modules) and not above:
                raise _AllRead

        with inputs_read(modules, read):
            try:
                output = self._blocks[index](*call.args, **call.kwargs)
            except _AllRead:
                output = None
        if above:
            above[0].args = (call.hidden(output), *above[0].args[1:])
        forget_hidden_([call])
        return reads

    def _terms(self, index: int, part: Part) -> list[Term]:
        """The gradients of one block's weights over the rows of a part, all formed before a weight may move.

        The gradient at the block's output is carried down to each layer, through the multipliers and norms above it,
        and through norms on the stream to the block below.
        """
        assert part.gradient is not None
        reads = self._reads(index, part)
        terms, part.gradient = feedback_terms(self._layers_of[index], reads, part.gradient, layer_terms)
        return terms


class _AllRead(Exception):  # noqa: N818  (control flow: it ends a block's evaluation and is always caught)
    """The inputs of all layers have been read."""
