"""A first-order client that holds one block's gradients at a time: recomputation, micro-batches, the update inside.

The gradient is that of `FirstOrderClient`, the update plain SGD. What is kept between the two calls is each block's
input. Backward takes the blocks from last to first: each is computed again, its gradients summed over micro-batches
of rows, its weights updated at once, and its gradients let go (LOMO, arXiv 2306.09782). Memory: methods.md section 3.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hosl.core.targets import Batch
from hosl.parties.clients.frozen import FrozenClient, in_one
from hosl.parties.engine.block_calls import BlockCall, recorded
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf


@dataclass(frozen=True, slots=True)
class _Part:
    """What `backward` needs of rows that went forward together."""

    rows: slice
    ids: torch.Tensor
    mask: torch.Tensor
    calls: list[BlockCall]
    """Of the blocks that have something to train at or below them, first to last; backward takes them away."""


class _Reached(Exception):  # noqa: N818  (control flow: it stops a forward and is always caught)
    """The forward has come to block 0."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__("block 0")
        self.hidden = hidden


class RecomputingClient(FrozenClient):
    """A client trained by backprop in little memory: weights, block inputs, and one block's gradients and activations.

    Requires: rows that do not see each other (true of every family here: no batch norm), hidden states as the blocks'
    first argument and only answer, and no trained tensor in two blocks: the upper one would change the lower one's.
    """

    def __init__(self, half: ClientHalf, *, micro_batch_size: int | None = None, device: str = "cpu") -> None:
        """Train what requires a gradient in `half`.

        Args:
            half: the client's.
            micro_batch_size: how many rows of a batch go forward and are recomputed at once; None: as many as memory
                suggests (`row_slices`).
            device: a torch device.
        """
        super().__init__(half, micro_batch_size=micro_batch_size, device=device)
        self.trained = trained_parameters(half.model)
        blocks: Any = half.model.get_submodule(half.blocks_name)
        self._blocks: list[nn.Module] = list(blocks)
        of_blocks = [_trained(block.parameters()) for block in self._blocks]
        inside = [id(p) for parameters in of_blocks for p in parameters]
        assert len(inside) == len(set(inside)), "a trained tensor is in two blocks"
        self._before = [p for p in self.trained.values() if id(p) not in set(inside)]
        """Trained tensors of the embeddings and whatever else comes before block 0."""
        with_trained = [i for i, parameters in enumerate(of_blocks) if parameters]
        self._lowest = 0 if self._before else min(with_trained, default=len(self._blocks))
        """The first block that a gradient has to reach."""
        self._parts: list[_Part] = []
        """Of the last `forward_for_backward`."""

    def forward_for_backward(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the inputs of the blocks stay here until `backward`, no graph."""
        self._parts = []  # of a forward that was never answered
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._part(rows, ids, mask)) for rows in self._slices(ids)), len(ids))

    def _part(self, rows: slice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), recorded(self._blocks[self._lowest :]) as calls:
            h = self.half(ids[rows], mask[rows])
        self._parts.append(_Part(rows, ids[rows], mask[rows], calls))
        return h

    def backward(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """theta_c -= learning_rate dL/dtheta_c, block by block, from dL/dh of the last `forward_for_backward`."""
        assert self._parts, "backward needs a forward_for_backward before it"
        parts, self._parts = self._parts, []
        gradients = [gradient[part.rows].to(self.device, self._dtype) for part in parts]
        for place in reversed(range(self._lowest, len(self._blocks))):
            block, handed_on = self._blocks[place], place > self._lowest or bool(self._before)
            for i, part in enumerate(parts):
                gradients[i] = _backward_block_(block, part.calls.pop(), gradients[i], handed_on=handed_on)
            _descend_(_trained(block.parameters()), learning_rate)
        if self._before:
            with _sparse_lookups(self.half.model):
                for part, of_rows in zip(parts, gradients, strict=True):
                    self._hidden_before_blocks(part.ids, part.mask).backward(of_rows)
            _descend_(self._before, learning_rate)

    @property
    def _dtype(self) -> torch.dtype:
        """Of h, and so of its gradient."""
        return next(p.dtype for p in self.half.parameters() if p.is_floating_point())

    def _hidden_before_blocks(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What block 0 is called with, and its graph; without blocks (cut 0), the hidden state at the cut."""
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
    block: nn.Module, call: BlockCall, gradient: torch.Tensor, *, handed_on: bool
) -> torch.Tensor:
    """Add the block's gradients over these rows; returns its input's, where that is handed on.

    The input's gradient takes the input's own place: it is not needed again.
    """
    hidden = call.args[0]
    at = hidden.detach().requires_grad_(handed_on)
    block(at, *call.args[1:], **call.kwargs).backward(gradient)
    if handed_on:
        hidden.copy_(at.grad)
    return hidden


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def _descend_(parameters: Iterable[nn.Parameter], learning_rate: float) -> None:
    """p -= learning_rate * gradient, in place; the gradients are let go."""
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.add_(p.grad.coalesce() if p.grad.is_sparse else p.grad, alpha=-learning_rate)
                p.grad = None


@contextmanager
def _sparse_lookups(model: nn.Module) -> Iterator[None]:
    """Within this context, the gradient of an embedding table has only the rows that were looked up.

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
