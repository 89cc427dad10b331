"""What a block was called with in a forward pass, so that it can be called again: for all rows or for some."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class BlockCall:
    """The arguments of one call; the first is the hidden state [rows, seq, width]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of_rows(self, rows: slice, total: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What follows the hidden state, cut to these rows of `total`: to go with a hidden state of the same rows."""
        return _of_rows(self.args[1:], rows, total), _of_rows(self.kwargs, rows, total)


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[BlockCall]]:
    """Within this context, every call of one of `blocks` is added to the list, in order. Tensors are not copied."""
    calls: list[BlockCall] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(BlockCall(args, kwargs))

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _of_rows(content: Any, rows: slice, total: int) -> Any:
    """The same, with every tensor of `total` rows cut to these; masks have a row each, rotary angles often one."""
    if isinstance(content, torch.Tensor):
        return content[rows] if content.dim() and len(content) == total else content
    if isinstance(content, dict):
        return {key: _of_rows(value, rows, total) for key, value in content.items()}
    if isinstance(content, tuple | list):
        return tuple(_of_rows(part, rows, total) for part in content)
    return content
