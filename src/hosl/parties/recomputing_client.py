"""A first-order client that holds one block's gradients at a time: recomputation, micro-batches, the update inside.

The gradient is that of `FirstOrderClient`, the update plain SGD. What is kept between the two verbs is each block's
input. Backward takes the blocks from last to first: each is computed again, its gradients summed over micro-batches
of rows, its weights updated at once, and its gradients let go (LOMO, arXiv 2306.09782). Memory: methods.md section 3.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hosl.core.parties import Batch
from hosl.parties.block_calls import BlockCall, recorded
from hosl.parties.probing import trained_parameters
from hosl.parties.torch_client import FrozenClient, row_slices
from hosl.split import ClientHalf


@dataclass(slots=True)
class _Kept:
    """What `backward` needs of the last forward."""

    ids: torch.Tensor
    mask: torch.Tensor
    dtype: torch.dtype
    """Of h, and so of its gradient."""
    calls: list[BlockCall]
    """Of the blocks that have something to train at or below them, first to last."""


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

    def __init__(self, half: ClientHalf, *, micro_batch_rows: int | None = None, device: str = "cpu") -> None:
        """Train what requires a gradient in `half`.

        Args:
            half: the client's.
            micro_batch_rows: how many rows of a batch a block is recomputed for at once; None: as many as a forward
                pass takes at once (`row_slices`).
            device: a torch device.
        """
        super().__init__(half, micro_batch_rows=micro_batch_rows, device=device)
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
        self._kept: _Kept | None = None

    def forward_for_backward(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the inputs of the blocks stay here until `backward`, no graph."""
        ids, mask = self._inputs(batch)
        self._kept = None  # of a forward that was never answered
        with torch.no_grad(), recorded(self._blocks[self._lowest :]) as calls:
            h = self.half(ids, mask)
        self._kept = _Kept(ids, mask, h.dtype, calls)
        return h

    def backward(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """theta_c -= learning_rate dL/dtheta_c, block by block, from dL/dh of the last `forward_for_backward`."""
        assert self._kept is not None, "backward needs a forward_for_backward before it"
        kept, self._kept = self._kept, None
        gradient = gradient.to(self.device, kept.dtype)
        while kept.calls:
            block = self._blocks[self._lowest + len(kept.calls) - 1]
            call = kept.calls.pop()
            handed_on = bool(kept.calls or self._before)
            for rows in row_slices(gradient.shape[:2], 1, self.micro_batch_rows):
                _backward_block_(block, call, gradient, rows, handed_on=handed_on)
            _descend_(_trained(block.parameters()), learning_rate)
            gradient = call.args[0]  # which holds the gradient now, where one is handed on
        if self._before:
            with _sparse_lookups(self.half.model):
                for rows in row_slices(gradient.shape[:2], 1, self.micro_batch_rows):
                    self._hidden_before_blocks(kept.ids[rows], kept.mask[rows]).backward(gradient[rows])
            _descend_(self._before, learning_rate)

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
    block: nn.Module, call: BlockCall, gradient: torch.Tensor, rows: slice, *, handed_on: bool
) -> None:
    """Add the block's gradients over these rows; its input's takes the input's own place where it is handed on.

    Source of the in-place exchange: a row's input is not needed again once its gradient is there.
    """
    hidden = call.args[0]
    at = hidden[rows].detach().requires_grad_(handed_on)
    args, kwargs = call.of_rows(rows, len(hidden))
    block(at, *args, **kwargs).backward(gradient[rows])
    if handed_on:
        hidden[rows] = at.grad


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
    """Within this fence, the gradient of an embedding table has only the rows that were looked up.

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
