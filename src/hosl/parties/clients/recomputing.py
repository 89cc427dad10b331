"""A first-order client that holds one block's gradients at a time: recomputation, micro-batches, the update inside.

Gradient and update are those of `FirstOrderClient`. Between the two calls only each block's input is kept.
Backward goes through the blocks from last to first: each is computed again, its gradients are summed over micro-batches
of rows, its weights updated at once, and its gradients released (LOMO, arXiv 2306.09782). Memory: methods.md section 3.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hosl.core.targets import Batch
from hosl.parties.clients.frozen import FrozenClient, in_one
from hosl.parties.engine.block_calls import BlockCall, recorded
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch of the last forward pass, as `backward` needs it."""

    rows: slice
    ids: torch.Tensor
    mask: torch.Tensor
    calls: list[BlockCall]
    """The calls of the blocks with trained weights at or below them, first to last; backward removes them."""


class _Reached(Exception):  # noqa: N818  (control flow: it ends a forward pass and is always caught)
    """The forward pass has reached block 0."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("block 0")
        self.hidden = hidden


class RecomputingClient(FrozenClient):
    """A client trained by backprop in little memory: weights, block inputs, and one block's gradients and activations.

    Requires: independent rows (true of every family here: no batch norm), hidden states as the blocks' first argument
    and first result, and no trained tensor in two blocks, since the upper block's update would change the lower block.
    """

    def __init__(
        self,
        half: ClientHalf,
        *,
        optimiser: OptimiserSpec | None = None,
        micro_batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Train the parameters of `half` that require a gradient.

        Args:
            half: the client half.
            optimiser: None: plain SGD. Another one has a state of the trained weights' size, or twice that, and the
                gradient of an embedding table is dense with it.
            micro_batch_size: the rows of a batch that are evaluated and recomputed at once; None: chosen by memory
                (`row_slices`).
            device: a torch device.
        """
        super().__init__(half, micro_batch_size=micro_batch_size, device=device)
        self.trained = trained_parameters(half.model)
        blocks: Any = half.model.get_submodule(half.blocks_name)
        self._blocks: list[nn.Module] = list(blocks)
        trained_by_block = [_trained(block.parameters()) for block in self._blocks]
        inside = [id(p) for parameters in trained_by_block for p in parameters]
        assert len(inside) == len(set(inside)), "a trained tensor is in two blocks"
        self._before = [p for p in self.trained.values() if id(p) not in set(inside)]
        """The trained tensors before block 0, such as the embeddings."""
        with_trained = [i for i, parameters in enumerate(trained_by_block) if parameters]
        self._lowest = 0 if self._before else min(with_trained, default=len(self._blocks))
        """The index of the first block that a gradient has to reach."""
        spec = optimiser or OptimiserSpec()
        self.optimiser = None if spec.plain else make_optimiser(spec, self.trained.values())
        self._parts: list[_Part] = []
        """The micro-batches of the last `forward_for_backward`."""

    def forward_for_backward(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the inputs of the blocks stay here until `backward`, no graph."""
        self._parts = []  # of a forward pass whose gradient never came
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._part(rows, ids, mask)) for rows in self._slices(ids)), len(ids))

    def _part(self, rows: slice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), recorded(self._blocks[self._lowest :]) as calls:
            h = self.half(ids[rows], mask[rows])
        self._parts.append(_Part(rows, ids[rows], mask[rows], calls))
        return h

    def backward(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """One update of theta_c, block by block, from dL/dh of the last `forward_for_backward`.

        Raises:
            NonFiniteError: if an optimiser refuses the gradients of a block; the blocks above it have moved.
        """
        assert self._parts, "backward needs a forward_for_backward before it"
        parts, self._parts = self._parts, []
        gradients = [gradient[part.rows].to(self.device, self._dtype) for part in parts]
        for index in reversed(range(self._lowest, len(self._blocks))):
            block, to_input = self._blocks[index], index > self._lowest or bool(self._before)
            for i, part in enumerate(parts):
                gradients[i] = _backward_block_(block, part.calls.pop(), gradients[i], to_input=to_input)
            self._descend_(_trained(block.parameters()), learning_rate)
        if self._before:
            with _sparse_lookups(self.half.model) if self.optimiser is None else nullcontext():
                for part, part_gradient in zip(parts, gradients, strict=True):
                    self._hidden_before_blocks(part.ids, part.mask).backward(part_gradient)
            self._descend_(self._before, learning_rate)

    def _descend_(self, parameters: list[nn.Parameter], learning_rate: float) -> None:
        """The update of these weights by their gradients, which are released; no other weight has one."""
        if self.optimiser is not None:
            if parameters:
                optimiser_step(self.optimiser, learning_rate)
            return
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.add_(p.grad.coalesce() if p.grad.is_sparse else p.grad, alpha=-learning_rate)
                    p.grad = None

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype of h and of its gradient."""
        return next(p.dtype for p in self.half.parameters() if p.is_floating_point())

    def _hidden_before_blocks(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The input of block 0 with its graph; without blocks (cut 0), the hidden state at the cut."""
        if not self._blocks:
            return self.half(ids, mask)

        def stop(block: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0])

        hook = self._blocks[0].register_forward_pre_hook(stop)
        try:
            self.half(ids, mask)
        except _Reached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise AssertionError("the half's forward never called block 0")


def _backward_block_(
    block: nn.Module, call: BlockCall, gradient: torch.Tensor, *, to_input: bool
) -> torch.Tensor:
    """Add the block's gradients over these rows; returns its input's gradient, if `to_input`.

    The input's gradient overwrites the input, which is not needed again.
    """
    hidden = call.args[0]
    leaf = hidden.detach().requires_grad_(to_input)
    call.hidden(block(leaf, *call.args[1:], **call.kwargs)).backward(gradient)
    if to_input:
        hidden.copy_(leaf.grad)
    return hidden


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


@contextmanager
def _sparse_lookups(model: nn.Module) -> Iterator[None]:
    """Context manager: the gradient of an embedding table has only the rows that were looked up.

    A dense one would be as large as the table: at OPT-1.3B two blocks' worth (methods.md section 3).
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and not m.sparse]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False
